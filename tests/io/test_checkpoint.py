"""save and load for any nn.Module, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank.errors import LowrankError
from lowrank.io import from_pretrained, load, save
from lowrank.nn import LowRankLinear

pytestmark = pytest.mark.filterwarnings("error")

WEIGHTS, INDEX = "model.safetensors", "lowrank.json"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture
def folder(net: nn.Module, tmp_path: Path) -> Path:
    save(net, tmp_path / "net")
    return tmp_path / "net"


def x() -> torch.Tensor:
    return torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_is_exact(net: nn.Module, zoo, tmp_path: Path, dtype: torch.dtype) -> None:
    net.to(dtype)
    save(net, tmp_path)
    loaded = load(tmp_path, zoo.Net().eval().to(dtype))
    before, after = net.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert torch.equal(net(x().to(dtype)), loaded(x().to(dtype)))


def test_ties_and_shared_modules_come_back(folder: Path, zoo) -> None:
    loaded = load(folder, zoo.Net)
    assert loaded.again is loaded.shared and isinstance(loaded.shared, LowRankLinear)
    assert loaded.head.weight is loaded.embed.weight
    with torch.no_grad():
        loaded.embed.weight.fill_(7)
    assert loaded.head.weight.eq(7).all()


def test_ties_are_restored_in_a_skeleton_without_them(folder: Path, zoo, net) -> None:
    skeleton = zoo.Net().eval()
    skeleton.head.weight = nn.Parameter(torch.zeros(9, 12))
    loaded = load(folder, skeleton)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(x()), net(x()))


def test_each_tensor_is_stored_once_and_contiguous(folder: Path, net: nn.Module) -> None:
    index = json.loads((folder / INDEX).read_text())
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
        size = sum(file.get_tensor(n).numel() * file.get_tensor(n).itemsize for n in names)
    assert names | index["aliases"].keys() == net.state_dict().keys()
    assert not names & index["aliases"].keys()
    assert index["aliases"]["head.weight"] == "embed.weight"
    distinct = {id(t): t for t in net.state_dict(keep_vars=True).values()}
    assert size == sum(t.numel() * t.itemsize for t in distinct.values())


def test_views_and_transposed_tensors_are_saved_whole(tmp_path: Path) -> None:
    """Parameters that look into one memory, in part or transposed, come back as their values."""
    base = torch.arange(24.0).reshape(4, 6)

    def build() -> nn.Module:
        model = nn.Module()
        model.a = nn.Parameter(base[:2])
        model.b = nn.Parameter(base[1:])
        model.t = nn.Parameter(base.T)
        model.flat = nn.Parameter(base.reshape(-1))
        return model

    save(build(), tmp_path)
    loaded = load(tmp_path, build)
    for name, tensor in build().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].is_contiguous()


def test_skeleton_keeps_mode_and_gradient_flags(folder: Path, zoo) -> None:
    skeleton = zoo.Net().train()
    skeleton.body[0].weight.requires_grad_(False)
    skeleton.conv.requires_grad_(False)
    skeleton.shared.eval()
    loaded = load(folder, skeleton)
    assert loaded is skeleton
    flags = {n: p.requires_grad for n, p in loaded.named_parameters()}
    frozen = {"conv.weight", "conv.bias", "body.0.down.weight", "body.0.up.weight"}
    assert {name for name, flag in flags.items() if not flag} == frozen
    assert loaded.body[0].training and not loaded.shared.down.training


def test_root_is_factored(tmp_path: Path) -> None:
    layer = LowRankLinear.from_factors(torch.randn(2, 5), torch.randn(7, 2), torch.randn(7))
    save(layer, tmp_path)
    loaded = load(tmp_path, nn.Linear(5, 7))
    assert isinstance(loaded, LowRankLinear)
    assert torch.equal(loaded(torch.ones(5)), layer(torch.ones(5)))


def test_dense_model_round_trips(tmp_path: Path, zoo) -> None:
    net = zoo.Net().eval()
    save(net, tmp_path)
    assert torch.equal(load(tmp_path, lambda: zoo.Net().eval())(x()), net(x()))


def test_dtype_and_device(folder: Path, zoo) -> None:
    loaded = load(folder, zoo.Net, device="cpu", dtype=torch.float64)
    floating = [t for t in (*loaded.parameters(), *loaded.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float64}
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_skeleton_on_meta(folder: Path, zoo, net: nn.Module) -> None:
    with torch.device("meta"):
        skeleton = zoo.Net().eval()
    check = zoo.snapshot(skeleton)
    with pytest.raises(LowrankError, match="no file holds these of its buffers: scale"):
        load(folder, skeleton)
    check()
    skeleton.scale = torch.full((1,), 0.5)
    assert torch.equal(load(folder, skeleton)(x()), net(x()))


def test_saving_twice_replaces(folder: Path, zoo, net: nn.Module) -> None:
    with torch.no_grad():
        net.embed.weight.add_(1)
    save(net, folder)
    assert torch.equal(load(folder, zoo.Net().eval())(x()), net(x()))
    assert sorted(p.name for p in folder.iterdir()) == [INDEX, WEIGHTS]


# -- wrong folders: one error, and the skeleton as before -----------------------------------------

SPEC = {"type": "LowRankLinear", "in_features": 12, "out_features": 20, "rank": 4, "bias": True}


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) - 40])


def set_module(name: str, spec: object) -> Callable[[Path], None]:
    return lambda f: edit_index(f, lambda index: index["modules"].update({name: spec}))


def set_entry(**entries: object) -> Callable[[Path], None]:
    return lambda f: edit_index(f, lambda index: index.update(entries))


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda f: edit_weights(f, lambda tensors: tensors.update({name: tensor}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "no file model.safetensors in"),
    "weights truncated": (cut, "is truncated or no safetensors file"),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "is truncated or no safetensors"),
    "weights a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "no file model.safetensors in",
    ),
    "index no json": (lambda f: (f / INDEX).write_text("{"), "lowrank.json is no JSON"),
    "index no text": (
        lambda f: (f / INDEX).write_bytes(b"\xff\xfe\xfa"),
        "lowrank.json is no JSON",
    ),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "expected an object with format"),
    "other format": (set_entry(format="other"), "expected an object with format 'lowrank'"),
    "newer version": (set_entry(version=2), "format version 2 is unknown, expected 1"),
    "no version": (
        lambda f: edit_index(f, lambda index: index.pop("version")),
        "format version None is unknown",
    ),
    "modules a list": (set_entry(modules=[]), "'modules' must map names to specs"),
    "modules missing": (
        lambda f: edit_index(f, lambda index: index.pop("modules")),
        "'modules' must map names to specs, got None",
    ),
    "aliases a list": (set_entry(aliases=[1]), "'aliases' must map names to names"),
    "alias of nothing": (
        set_entry(aliases={"head.weight": "nothing"}),
        "aliases that do not fit the file: head.weight",
    ),
    "unknown module": (set_module("body.7", SPEC), "modules that Net does not have: body.7"),
    "parent folder": (set_module("../body", SPEC), "'../body' is not a module name"),
    "absolute path": (set_module("/body", SPEC), "'/body' is not a module name"),
    "backslash": (set_module("..\\body", SPEC), "is not a module name"),
    "leading dot": (set_module(".body", SPEC), "'.body' is not a module name"),
    "attribute": (set_module("__class__", SPEC), "modules that Net does not have: __class__"),
    "not linear": (set_module("conv", SPEC), "conv: expected a linear layer"),
    "other sizes": (
        set_module("body.0", {**SPEC, "in_features": 13}),
        r"body.0: stored as \(out, in\) = \(20, 13\), but Linear is \(20, 12\)",
    ),
    "other rank": (
        set_module("body.0", {**SPEC, "rank": 5}),
        r"body.0.down.weight \[4, 12\] floating instead of \[5, 12\] floating",
    ),
    "layer not in the index": (
        lambda f: edit_index(f, lambda index: index["modules"].pop("body.0")),
        r"missing: body.0.weight, body.0.bias; unexpected: body.0.down.weight, body.0.up",
    ),
    "tensor missing": (
        lambda f: edit_weights(f, lambda tensors: tensors.pop("conv.bias")),
        "missing: conv.bias",
    ),
    "tensor too many": (set_tensor("more", torch.ones(1)), "unexpected: more"),
    "tensor of another shape": (
        set_tensor("conv.bias", torch.ones(13)),
        r"conv.bias \[13\] floating instead of \[12\] floating",
    ),
    "tensor of another kind": (
        set_tensor("conv.bias", torch.ones(12, dtype=torch.int64)),
        r"conv.bias \[12\] integer instead of \[12\] floating",
    ),
    "shared module as two": (
        lambda f: (
            edit_index(f, lambda i: [i["aliases"].pop(k) for k in list(i["aliases"]) if "ag" in k]),
            edit_weights(
                f,
                lambda t: t.update(
                    {k.replace("shared", "again"): v.clone() for k, v in t.items() if "shared" in k}
                ),
            ),
        ),
        "as two tensors, but the model has one for both",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_wrong_folder_is_one_error_and_changes_nothing(folder: Path, zoo, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(folder)
    skeleton = zoo.Net()
    check = zoo.snapshot(skeleton)
    with pytest.raises(LowrankError, match=message):
        load(folder, skeleton)
    check()


def test_trouble_while_filling_is_rolled_back(folder: Path, zoo) -> None:
    """Not even a user's own loading hook leaves a half-filled model."""
    skeleton = zoo.Net()

    def fail(*args: object) -> None:
        raise RuntimeError("hook")

    skeleton.head.register_load_state_dict_pre_hook(fail)
    check = zoo.snapshot(skeleton)
    with pytest.raises(RuntimeError, match="hook"):
        load(folder, skeleton)
    check()


def test_layers_with_hooks_or_parametrizations_are_refused(folder: Path, zoo) -> None:
    hooked = zoo.Net()
    hooked.body[0].register_forward_hook(lambda *a: None)
    with pytest.raises(LowrankError, match=r"body\.0: Linear cannot be replaced: it carries hooks"):
        load(folder, hooked)
    normed = zoo.Net()
    nn.utils.parametrizations.weight_norm(normed.body[0])
    with pytest.raises(LowrankError, match=r"body\.0: .* is parametrized"):
        load(folder, normed)


def test_already_factored_skeleton_is_refused(folder: Path, net: nn.Module) -> None:
    with pytest.raises(LowrankError, match=r"body\.0: expected a linear layer .* LowRankLinear"):
        load(folder, net)


def test_no_folder_no_skeleton_wrong_skeleton(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(LowrankError, match=r"neither lowrank.json nor config.json .* notes.txt"):
        load(tmp_path / "empty")
    with pytest.raises(LowrankError, match="no architecture: pass skeleton="):
        load(folder)
    with pytest.raises(LowrankError, match=r"must be or return an nn\.Module, got int"):
        load(folder, lambda: 3)  # type: ignore[arg-type,return-value]


def test_save_refuses_before_writing(net: nn.Module, zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LowrankError, match="is a file, expected a folder"):
        save(net, tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LowrankError, match=r"holds another checkpoint \(config.json\)"):
        save(net, tmp_path)
    with pytest.raises(LowrankError, match="are for transformers models, got Net"):
        save(net, tmp_path / "out", card="# card")
    with torch.device("meta"):
        empty = zoo.Net()
    with pytest.raises(LowrankError, match=r"conv\.weight: expected a dense tensor with values"):
        save(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_state_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"any": object()}

    with pytest.raises(LowrankError, match="_extra_state: dict cannot be stored without pickle"):
        save(Extra(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- transformers folders --------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_transformers_folder(zoo, tmp_path: Path, kind: str) -> None:
    model = zoo.compressed(kind)
    save(model, tmp_path, card="| site | rank |\n|---|---|\n| q_proj | 6 |")
    for loaded in (load(tmp_path), from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    card = (tmp_path / "README.md").read_text()
    for text in ("import lowrank", "random weights", "trust_remote_code", "| q_proj | 6 |"):
        assert text in card
    name = "AutoModelForSequenceClassification" if kind == "bert" else "AutoModelForCausalLM"
    assert f"from transformers import {name}\n" in card
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"][name] == f"modeling_lowrank.LowRank{type(model).__name__}"
    assert not hasattr(model.config, "auto_map")


@pytest.mark.filterwarnings("default")
def test_transformers_folder_dtype_class_and_tokenizer(zoo, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    save(zoo.compressed("llama"), tmp_path, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("b a").input_ids == tokenizer("b a").input_ids
    loaded = load(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    base = from_pretrained(tmp_path, "AutoModel", dtype=torch.float16)
    assert type(base).__name__ == "LlamaModel" and base.dtype == torch.float16
    model, info = from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    with pytest.raises(LowrankError, match="transformers has no class 'AutoNothing'"):
        from_pretrained(tmp_path, "AutoNothing")
    with pytest.raises(LowrankError, match="needs no skeleton: leave it out"):
        load(tmp_path, model)


@pytest.mark.filterwarnings("default")
def test_dense_transformers_model_gets_no_card(zoo, tmp_path: Path) -> None:
    save(zoo.make("llama"), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", WEIGHTS} <= names and not names & {"README.md", "modeling_lowrank.py"}
    assert type(load(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.filterwarnings("default")
def test_card_of_somebody_else_is_kept(zoo, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine")
    save(zoo.compressed("llama"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"


TRANSFORMERS_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "cannot load .*SafetensorError"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot load .*OSError"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither lowrank.json nor config.json"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), "cannot load .*JSON"),
    "tensor missing": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.0.self_attn.q_proj.up.weight")),
        "do not fit config.json; missing: model.layers.0.self_attn.q_proj.up.weight",
    ),
    "tensor too many": (set_tensor("more", torch.ones(1)), "unexpected: more"),
    "other shape": (
        set_tensor("model.layers.0.self_attn.q_proj.up.weight", torch.ones(32, 7)),
        "do not fit config.json; of another shape: model.layers.0.self_attn.q_proj.up.weight",
    ),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("what", TRANSFORMERS_DAMAGE)
def test_wrong_transformers_folder_is_one_error(zoo, tmp_path: Path, what: str) -> None:
    save(zoo.compressed("llama"), tmp_path)
    damage, message = TRANSFORMERS_DAMAGE[what]
    damage(tmp_path)
    with pytest.raises(LowrankError, match=message):
        load(tmp_path)


@pytest.mark.filterwarnings("default")
def test_one_folder_holds_one_form(folder: Path, zoo) -> None:
    model = zoo.compressed("llama")
    with pytest.raises(LowrankError, match=r"holds another checkpoint \(lowrank.json\)"):
        save(model, folder)
