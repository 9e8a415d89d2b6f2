"""The plug-ins as their engines use them: registered twice, built, renamed, loaded, left out.

The engines are stand-ins here, of the few classes that the plug-ins take from them. `make
vllm-check` runs vLLM itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank import LowrankError
from lowrank.io.specs import VERSION
from lowrank.nn import LowRankLinear, SharedLowRankLinear, describe
from tests.zoo import said

WIDTH = 8


class Base(nn.Module):
    """An engine's linear layer: one or several of the checkpoint, and a bias of its own."""

    def __init__(self, config: Any, prefix: str, *sizes: int) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        out = sum(sizes)
        self.quant_method.create_weights(
            self, WIDTH, list(sizes), WIDTH, out, torch.float32, weight_loader=None
        )
        self.register_parameter("bias", None)


class Dense:
    """Its method of dense layers, which keeps weights turned."""

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        layer.weight = nn.Parameter(torch.empty(0))

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.turned = layer.weight.data.T.contiguous()
        layer.weight = nn.Parameter(torch.empty(0))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        assert x.is_contiguous()
        assert bias is None
        return x @ layer.turned


class Abstract:
    """A base class of the engine's, with nothing in it."""


class Config(Abstract):
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class Renaming:
    """How an engine renames tensors."""

    def apply_dict(self, given: dict[str, Any]) -> dict[str, Any]:
        return {f"language.{name}": value for name, value in given.items()}


def no_group() -> Any:
    raise AssertionError("no group is there")


def register_quantization_config(name: str) -> Any:
    def keep(cls: type) -> type:
        sys.modules["vllm.model_executor.layers.quantization"].QUANTIZATION_METHODS[name] = cls
        return cls

    return keep


PARALLEL = {
    "get_pp_group": no_group,
    "get_tensor_model_parallel_rank": lambda: 0,
    "get_tensor_model_parallel_world_size": lambda: 1,
}
STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "vllm": {
        "vllm.distributed": PARALLEL,
        "vllm.model_executor.layers.linear": {
            "LinearBase": Base, "LinearMethodBase": Abstract, "UnquantizedLinearMethod": Dense,
        },
        "vllm.model_executor.layers.quantization": {
            "register_quantization_config": register_quantization_config,
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": Config},
    },
    "sglang": {
        "sglang.srt.distributed": PARALLEL,
        "sglang.srt.layers.linear": {"LinearBase": Base},
        "sglang.srt.layers.quantization": {},
        "sglang.srt.layers.quantization.base_config": {
            "LinearMethodBase": Abstract, "QuantizationConfig": Config,
        },
        "sglang.srt.layers.quantization.unquant": {"UnquantizedLinearMethod": Dense},
    },
}  # fmt: skip


@pytest.fixture(params=STAND_INS)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plug-in's module, and the methods that its engine knows."""
    for name, held in STAND_INS[request.param].items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules or not hasattr(sys.modules[path], "stand_in"):
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                sys.modules[path].stand_in = True
        module = sys.modules[name]
        for key, value in held.items():
            monkeypatch.setattr(module, key, value, raising=False)
        if name.endswith("quantization"):
            module.QUANTIZATION_METHODS = {"fp8": Config}
    own = f"lowrank.engines.{request.param}"
    monkeypatch.delitem(sys.modules, own, raising=False)
    known = sys.modules[next(n for n in STAND_INS[request.param] if n.endswith("quantization"))]
    yield SimpleNamespace(plugin=importlib.import_module(own), known=known.QUANTIZATION_METHODS)
    sys.modules.pop(own, None)


def config_of(engine: Any, layers: dict[str, nn.Module], version: Any = VERSION) -> Any:
    engine.plugin.register()
    specs = {name: dict(describe(m)) for name, m in layers.items() if not isinstance(m, nn.Linear)}
    for name, module in layers.items():
        if isinstance(module, SharedLowRankLinear):
            specs[name]["shared"] = next(n for n, m in layers.items() if m is module.owner)
    given = {"quant_method": "lowrank", "version": version, "modules": specs, "lowrank": {"a": 1}}
    made = engine.known["lowrank"].from_config(given)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def attention() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    owner = LowRankLinear(WIDTH, 6, 3, bias=False)
    shared = SharedLowRankLinear(WIDTH, 4, 3, bias=False).bind(owner)
    return {"a.q_proj": owner, "a.k_proj": nn.Linear(WIDTH, 4, bias=False), "a.v_proj": shared}


def loaded(layer: Base, layers: dict[str, nn.Module]) -> None:
    for shard, module in zip("qkv", layers.values(), strict=True):
        for key, tensor in module.state_dict().items():
            parameter: Any = layer.get_parameter(key)
            parameter.weight_loader(parameter, tensor, shard)


def product(layers: dict[str, nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(x) for module in layers.values()], -1)


def test_registered_once(engine: Any) -> None:
    for _ in range(2):
        engine.plugin.register()
    assert engine.known["lowrank"] is engine.plugin.LowRankConfig
    made = config_of(engine, {})
    assert (made.get_name(), made.get_min_capability(), made.get_config_filenames()) == (
        "lowrank", 0, [],
    )  # fmt: skip
    assert torch.bfloat16 in made.get_supported_act_dtypes()


def test_weights_that_were_quantized_since_are_refused(engine: Any) -> None:
    engine.plugin.register()
    given = {"version": VERSION, "modules": {}, "quantized": {"a.down.weight": {}}}
    with pytest.raises(LowrankError, match=r"is given 1 weights that torchao quantized"):
        engine.known["lowrank"].from_config(given)


def test_the_parts_of_a_fused_layer(engine: Any) -> None:
    layers, x = attention(), torch.randn(3, WIDTH)
    layer = Base(config_of(engine, layers), "a.qkv_proj", 6, 4, 4)
    loaded(layer, layers)
    for _ in range(2):  # engines may call it again
        layer.quant_method.process_weights_after_loading(layer)
    y = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(y, product(layers, x))
    # All products are the engine's own.
    assert all(not p.numel() for p in layer.lowrank.parameters())
    shift = torch.randn(14)
    torch.testing.assert_close(layer.quant_method.apply(layer, x, shift), y + shift)


def test_names_that_the_engine_changes(engine: Any) -> None:
    layers, x = attention(), torch.randn(3, WIDTH)
    config = config_of(engine, layers)
    way = (
        "apply_vllm_mapper" if hasattr(config, "apply_vllm_mapper") else "apply_weight_name_mapper"
    )
    getattr(config, way)(Renaming())
    layer = Base(config, "language.a.qkv_proj", 6, 4, 4)
    loaded(layer, layers)
    layer.quant_method.process_weights_after_loading(layer)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), product(layers, x))


def test_what_is_dense_stays_the_engines(engine: Any) -> None:
    config = config_of(engine, attention())
    assert isinstance(Base(config, "b.qkv_proj", 6, 4, 4).quant_method, Dense)
    assert isinstance(Base(config, "o_proj", 6).quant_method, Dense)
    assert config.get_quant_method(nn.Embedding(3, 3), "embed") is None


def test_a_factored_layer_that_is_none_of_the_engines_linear_ones(engine: Any) -> None:
    config = config_of(engine, {"embed": LowRankLinear(4, 4, 1)})
    with pytest.raises(LowrankError, match="embed is a LowRankLinear") as caught:
        config.get_quant_method(nn.Embedding(3, 3), "embed")
    said(caught)


def test_a_factored_layer_that_no_layer_of_the_engine_claims(engine: Any) -> None:
    layers = attention()
    config = config_of(engine, {**layers, "vision.fc": LowRankLinear(4, 4, 1)})
    layer = Base(config, "a.qkv_proj", 6, 4, 4)
    loaded(layer, layers)
    with pytest.raises(LowrankError, match=r"no layer for 1 factored ones: vision\.fc") as caught:
        layer.quant_method.process_weights_after_loading(layer)
    said(caught)


def test_with_other_processes_for_other_layers_none_is_missed(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = attention()
    config = config_of(engine, {**layers, "vision.fc": LowRankLinear(4, 4, 1)})
    monkeypatch.setattr(
        engine.plugin.distributed, "get_pp_group", lambda: SimpleNamespace(world_size=2)
    )
    layer = Base(config, "a.qkv_proj", 6, 4, 4)
    loaded(layer, layers)
    layer.quant_method.process_weights_after_loading(layer)


def test_a_version_of_the_format_that_is_unknown(engine: Any) -> None:
    with pytest.raises(LowrankError, match="format version 99 is unknown"):
        config_of(engine, {}, version=99)


def test_tensors_that_never_came(engine: Any) -> None:
    layers = attention()
    layer = Base(config_of(engine, layers), "a.qkv_proj", 6, 4, 4)
    with pytest.raises(
        LowrankError, match=r"4 tensors are not in the files: a\.q_proj\.down\.weig"
    ):
        layer.quant_method.process_weights_after_loading(layer)
