"""Configs that lie: refused before any module is swapped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.errors import LowrankError
from lowrank.io.verifying import verify
from lowrank.nn import BlockLowRankLinear, DenseSparseLinear, LowRankLinear
from lowrank.walk.surgery import swap

Q = "model.layers.0.self_attn.q_proj"


def edit(folder: Path, **changes: object) -> None:
    """Change entries of the quantization_config on disk."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.fixture
def damaged(zoo, tmp_path: Path) -> Path:
    zoo.compressed("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2 is unknown, expected 1"),
        ({"version": True}, "format version True is unknown"),
        ({"version": None}, "format version None is unknown"),
        ({"future": 1}, "unknown entries future"),
        ({"modules": ["a"]}, "'modules' must map names to specs"),
    ],
)
def test_bad_config_is_refused(damaged: Path, changes: dict, message: str) -> None:
    from transformers import AutoModelForCausalLM

    edit(damaged, **changes)
    with pytest.raises(LowrankError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged)


SPEC = {"type": "LowRankLinear", "in_features": 32, "out_features": 32, "rank": 6, "bias": False}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.9.self_attn.q_proj": SPEC}, r"does not have: model\.layers\.9\.self_attn"),
        ({"../q_proj": SPEC}, "is not a module name"),
        ({"/etc/passwd": SPEC}, "is not a module name"),
        ({".model": SPEC}, "is not a module name"),
        ({"model..layers": SPEC}, "is not a module name"),
        ({"model.": SPEC}, "is not a module name"),
        ({Q: {**SPEC, "out_features": 31}}, rf"{Q}: stored as \(out, in\) = \(31, 32\)"),
        ({Q: {**SPEC, "in_features": "32"}}, f"{Q}: sizes must be integers >= 0"),
        ({Q: {**SPEC, "rank": -1}}, f"{Q}: sizes must be integers >= 0"),
        ({Q: {**SPEC, "rank": 10**30}}, f"{Q}: LowRankLinear cannot be built"),
        ({Q: {**SPEC, "width": 2}}, f"{Q}: LowRankLinear cannot be built"),
        ({Q: {**SPEC, "type": "Nothing"}}, f"unknown factored module at {Q}: 'Nothing'"),
        ({Q: {**SPEC, "layout": "conv1d"}}, f"{Q}: stored for a layer of layout 'conv1d'"),
        ({Q: {**SPEC, "layout": "conv9d"}}, f"unknown layout at {Q}: 'conv9d'|stored for"),
        ({Q: 7}, f"{Q}: expected a spec with a 'type', got 7"),
        ({"model.embed_tokens": SPEC}, "model.embed_tokens: expected a linear layer"),
        ({"model.layers": SPEC}, "model.layers: expected a linear layer"),
    ],
)
def test_bad_modules_are_refused_before_any_swap(zoo, modules: dict, message: str) -> None:
    from lowrank.io.hf import LowRankConfig, LowRankHfQuantizer

    model = zoo.make("llama")
    good = {f"model.layers.1.{name}": SPEC for name in ("self_attn.q_proj", "self_attn.o_proj")}
    quantizer = LowRankHfQuantizer(LowRankConfig(modules={**good, **modules}))
    check = zoo.snapshot(model)
    with pytest.raises(LowrankError, match=message):
        quantizer._process_model_before_weight_loading(model)
    check()


def test_names_must_be_strings(zoo) -> None:
    from lowrank.io.hf import LowRankConfig, LowRankHfQuantizer

    quantizer = LowRankHfQuantizer(LowRankConfig(modules={3: SPEC}))  # type: ignore[dict-item]
    with pytest.raises(LowrankError, match="a module name must be a string, got 3"):
        quantizer.validate_environment()


def test_shared_module_is_swapped_under_all_its_names(zoo) -> None:
    from lowrank.io.hf import LowRankConfig, LowRankHfQuantizer

    spec = {"type": "LowRankLinear", "in_features": 12, "out_features": 12, "rank": 3, "bias": True}
    with torch.device("meta"):
        model = zoo.Net()
    quantizer = LowRankHfQuantizer(LowRankConfig(modules={"shared": spec}))
    quantizer._process_model_before_weight_loading(model)
    assert isinstance(model.shared, LowRankLinear)
    assert model.again is model.shared
    assert model.shared.down.weight.is_meta


def test_one_module_with_two_specs_is_refused(zoo) -> None:
    from lowrank.io.specs import prepare

    spec = {"type": "LowRankLinear", "in_features": 12, "out_features": 12, "rank": 3, "bias": True}
    with pytest.raises(LowrankError, match="shared and again are the same module, but their specs"):
        prepare(zoo.Net(), {"shared": spec, "again": {**spec, "rank": 4}}, "test")


def test_specs_alone_are_no_way_to_compress_while_loading(zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lowrank.io.hf import LowRankConfig

    zoo.make("llama").save_pretrained(tmp_path)
    with pytest.raises(LowrankError, match="give it a ratio, as in LowRankConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LowRankConfig({Q: SPEC}))


def test_names_do_not_carry_what_activation_checkpointing_adds(zoo) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from lowrank.io.specs import prepare, specs_of
    from lowrank.walk.surgery import swap

    model = zoo.factor(zoo.Net(), ("0", "shared", "again"), rank=4)
    plain = specs_of(model)
    model.body = checkpoint_wrapper(model.body)
    assert specs_of(model) == plain
    other = zoo.Net()
    other.body = checkpoint_wrapper(other.body)
    swap(other, prepare(other, plain, "test"))
    assert specs_of(other) == plain
    assert other.state_dict().keys() == model.state_dict().keys()


def test_factors_of_factors_are_not_saved(tmp_path: Path) -> None:
    inner = LowRankLinear(8, 8, 2)
    inner.down = LowRankLinear(8, 2, 1, bias=False)  # type: ignore[assignment]
    with pytest.raises(LowrankError, match=r"0 is factored, and so is a layer inside it"):
        lowrank.save(torch.nn.Sequential(inner), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def shorten(folder: Path) -> list[str]:
    """Store in two bytes what earlier versions did, and without their checksum."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    long = [name for name, tensor in tensors.items() if tensor.dtype == torch.int32]
    save_file({**tensors, **{name: tensors[name].short() for name in long}}, file, {"format": "pt"})
    if (folder / "lowrank.json").exists():
        index = json.loads((folder / "lowrank.json").read_text())
        del index["sha256"]
        (folder / "lowrank.json").write_text(json.dumps(index))
    return sorted(long)


def as_today(model: torch.nn.Module, again: torch.nn.Module) -> bool:
    """Whether every tensor is as it was before the file was rewritten."""
    found = again.state_dict()
    return all(
        torch.equal(value, found[name]) and value.dtype == found[name].dtype
        for name, value in model.state_dict().items()
    )


def test_indices_of_two_bytes_become_four(tmp_path: Path) -> None:
    """Those of files of earlier versions: DistributedDataParallel broadcasts no int16."""
    net = torch.nn.Sequential(DenseSparseLinear(3, 2, 300, 2), BlockLowRankLinear(2, 3, 1, 2, 2))
    lowrank.save(net, tmp_path)
    assert shorten(tmp_path) == ["0.index", "1.down.place", "1.up.place"]
    verify(tmp_path)
    dense = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3))
    assert as_today(net, lowrank.load(tmp_path, dense))


def test_indices_of_two_bytes_in_a_transformers_model(zoo, tmp_path: Path) -> None:
    model = zoo.compressed("llama")
    up = model.model.layers[0].mlp.up_proj
    sizes = up.in_features, up.out_features
    swap(model, {id(up): BlockLowRankLinear(*sizes, 3, 20, 20, bias=False)})
    lowrank.save(model, tmp_path)
    assert len(shorten(tmp_path)) == 2
    verify(tmp_path)
    assert as_today(model, type(model).from_pretrained(tmp_path))


def test_a_factor_that_no_file_holds_is_not_drawn(damaged: Path) -> None:
    """transformers warns, and goes on with random numbers."""
    tensors = load_file(damaged / "model.safetensors")
    del tensors[f"{Q}.up.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowrankError, match=rf"do not fit config.json; missing: {Q}.up.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(damaged)


class Biased(transformers.PreTrainedModel):
    """All its linear layers have biases, which it draws without asking for them."""

    config_class = transformers.BertConfig

    def __init__(self, config: transformers.BertConfig) -> None:
        super().__init__(config)
        self.fc = torch.nn.Linear(16, 16)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def test_layers_inside_of_factored_ones_are_not_drawn(tmp_path: Path) -> None:
    model = Biased(transformers.BertConfig())
    torch.nn.init.normal_(model.fc.weight)
    lowrank.compress(model, 0.5, data=None, target_modules=["fc"], progress=False)
    model.save_pretrained(tmp_path)
    assert as_today(model, Biased.from_pretrained(tmp_path))
