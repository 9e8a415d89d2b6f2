"""Every way in which a folder or a skeleton can be wrong: one error, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank.errors import LowrankError
from lowrank.io import load, save

WEIGHTS, INDEX = "model.safetensors", "lowrank.json"


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


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
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "there is no model.safetensors in"),
    "weights truncated": (cut, "is truncated or not a safetensors file"),
    "weights empty": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        "is truncated or not a safetensors",
    ),
    "weights a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "there is no model.safetensors in",
    ),
    "index no json": (lambda f: (f / INDEX).write_text("{"), "lowrank.json is not valid JSON"),
    "index no text": (
        lambda f: (f / INDEX).write_bytes(b"\xff\xfe\xfa"),
        "lowrank.json is not valid JSON",
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
        "aliases do not match the file: head.weight",
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
        r"conv.bias \[12\] I64 instead of \[12\] floating",
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
        "as two tensors, which the model ties",
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
    with pytest.raises(LowrankError, match=r"body\.0: Linear cannot be replaced: it has hooks"):
        load(folder, hooked)
    normed = zoo.Net()
    nn.utils.parametrizations.weight_norm(normed.body[0])
    with pytest.raises(LowrankError, match=r"body\.0: .* is parametrized"):
        load(folder, normed)


def test_already_factored_skeleton_is_refused(folder: Path, net: nn.Module) -> None:
    with pytest.raises(LowrankError, match=r"body\.0: expected a linear layer .* LowRankLinear"):
        load(folder, net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype must be a floating-point torch.dtype or None, got 'bf"),
        ({"dtype": torch.int8}, "dtype must be a floating-point torch.dtype or None, got torch.i"),
        ({"device": "cuda:99"}, "could not be read to cuda:99: "),
    ],
)
def test_wrong_options(folder: Path, zoo, options: dict[str, object], message: str) -> None:
    with pytest.raises(LowrankError, match=message):
        load(folder, zoo.Net(), **options)


def test_what_is_no_path(net: nn.Module) -> None:
    for call in (lambda: load(None), lambda: save(net, None)):  # type: ignore[arg-type]
        with pytest.raises(LowrankError, match="expected the path of a folder, got NoneType"):
            call()


def test_a_skeleton_in_a_wrapper(folder: Path, zoo) -> None:
    """Names in files are those of the model inside."""
    wrapped = nn.DataParallel(zoo.Net())
    assert load(folder, wrapped) is wrapped
    plain = load(folder, zoo.Net())
    for one, other in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


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
    lazy = nn.Sequential(nn.LazyLinear(3))
    for call in (lambda: load(folder, lazy), lambda: save(lazy, tmp_path / "lazy")):
        with pytest.raises(LowrankError, match=r"no shape yet \(0.weight, 0.bias\): run the model"):
            call()


def test_save_refuses_before_writing(net: nn.Module, zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LowrankError, match="is a file, expected a folder"):
        save(net, tmp_path / "file")
    for model in (net, zoo.compressed("llama")):
        with pytest.raises(LowrankError, match=r"inside cannot be written to \(.*Not a directory"):
            save(model, tmp_path / "file" / "inside")
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


class DTensor(torch.Tensor):
    """Of the name of FSDP2's slices, which need a group of processes."""


def test_slices_are_not_saved(net: nn.Module, tmp_path: Path) -> None:
    name, weight = next(iter(net.named_parameters()))
    owner, _, key = name.rpartition(".")
    sharded = nn.Parameter(weight.detach().as_subclass(DTensor))
    setattr(net.get_submodule(owner), key, sharded)
    with pytest.raises(LowrankError, match=rf"1 tensors are sharded by FSDP \({name}\): gather"):
        save(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()
