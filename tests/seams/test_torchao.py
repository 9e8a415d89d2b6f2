"""Factored layers that are quantized run; saving them is refused before anything is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from tests.zoo import make, mlp, tokens

REFUSED = r"tensors are quantized and cannot be stored .*: save the factored model before it"
DATA: dict[str, Any] = {"data": [tokens(16, 32)]}
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"data": None},
    "pivoted": {"data": None, "storage": "pivoted"},
    "columns": {"method": "lowrank-sparse", **DATA},
    "entries": {"method": "lowrank-masked", **DATA},
    "2:4": {"method": "lowrank-2:4", **DATA},
    "shared": {"method": "basis-sharing", **DATA},
}


class Codes(Tensor):
    """A weight in eight bits with one scale a row, made as torchao makes its own."""

    code: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, code: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, code.shape, dtype=scale.dtype)

    def __init__(self, code: Tensor, scale: Tensor) -> None:
        self.code, self.scale = code, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["code", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.code * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Codes(args[0].code, args[0].scale)
        raise NotImplementedError(func)


def in_eight_bits(model: nn.Module) -> None:
    """By torchao where it is installed; it cannot take a weight of one column."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.in_features > 1]
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        for layer in layers:
            weight = layer.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            held = Codes((weight / scale).round().to(torch.int8), scale)
            layer.weight = nn.Parameter(held, requires_grad=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(model, Int8WeightOnlyConfig(), lambda module, _: module in layers)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 6)).logits


@pytest.mark.parametrize("form", FORMS)
def test_eight_bits_run_and_are_not_saved(form: str, tmp_path: Path) -> None:
    model, _ = lowrank.compress(make("llama"), 0.6, progress=False, **FORMS[form])
    before = logits(model)
    in_eight_bits(model)
    after = logits(model)
    assert 0 < float((after - before).norm() / before.norm()) < 0.03
    with pytest.raises(LowrankError, match=REFUSED):
        model.save_pretrained(tmp_path / "stock")
    with pytest.raises(LowrankError, match=REFUSED):
        lowrank.save(model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), after)


def test_the_way_that_the_error_names(tmp_path: Path) -> None:
    model, _ = lowrank.compress(make("llama"), 0.6, data=None)
    model.save_pretrained(tmp_path)
    again = lowrank.from_pretrained(tmp_path).eval()
    in_eight_bits(model)
    in_eight_bits(again)
    assert torch.equal(logits(again), logits(model))


def test_any_other_module(tmp_path: Path) -> None:
    net, _ = lowrank.compress(mlp(24, 40, 16), 0.6, data=None)
    in_eight_bits(net)
    with pytest.raises(LowrankError, match=REFUSED):
        lowrank.save(net, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["svd", "lowrank-sparse", "lowrank-masked", "dense-sparse"])
def test_dynamic_quantisation(method: str, tmp_path: Path) -> None:
    """torch's own; the sparse parts stay as they are, and no shortcut passes the packed ones by."""
    torch.manual_seed(0)
    net, _ = lowrank.compress(
        mlp(24, 40, 16), 0.6, method=method, data=[torch.randn(64, 24)], progress=False
    )
    lean = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    for rows in (3, 700):  # forms have one way for few rows and another for many
        x = torch.randn(rows, 24)
        with torch.no_grad():
            want, found = net(x), lean(x)
        assert 0 < float((found - want).norm() / want.norm()) < 0.05
    with pytest.raises(LowrankError, match=REFUSED):
        lowrank.save(lean, tmp_path / "out")
    assert not list(tmp_path.iterdir())
