"""Layers of integers: what they compute, what they say of themselves, and how they are rebuilt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.nn import (
    QuantizedFactorsLinear,
    QuantizedLinear,
    QuantizedLowRankLinear,
    build,
    describe,
    form_of,
    remember_layout,
)
from lowrank.nn.form import notes_of
from lowrank.types import Cost

from .forms import check_differences, drawn

Part = tuple[Tensor, Tensor]


def part(rows: int, columns: int, bits: int, group: int, seed: int) -> tuple[Part, np.ndarray]:
    """Codes and scales, and the numbers that they stand for, by NumPy."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=draw)
    scale = drawn(seed)(rows, -(-columns // group))
    steps = np.repeat(scale.numpy(), group, 1)[:, :columns]
    return (codes, scale), steps * (codes.numpy() - 2 ** (bits - 1))


def whole(bias: bool = True) -> tuple[Any, np.ndarray]:
    held, weight = part(7, 10, 4, 4, 0)
    layer = build({"type": "QuantizedLinear", "in_features": 10, "out_features": 7,
                   "bits": 4, "group": 4, "bias": bias}, "here")  # fmt: skip
    return layer.hold(whole=held, bias=drawn(9)(7) if bias else None), weight


def factors(bias: bool = True) -> tuple[Any, np.ndarray]:
    (down, right), (up, left) = part(3, 10, 8, 10, 1), part(3, 7, 8, 7, 2)
    layer = build({"type": "QuantizedFactorsLinear", "in_features": 10, "out_features": 7,
                   "rank": 3, "bits": 8, "bias": bias}, "here")  # fmt: skip
    return layer.hold(down=down, up=up, bias=drawn(9)(7) if bias else None), left.T @ right


def both(bias: bool = True) -> tuple[Any, np.ndarray]:
    (rest, weight), (down, right) = part(7, 10, 3, 10, 0), part(2, 10, 8, 10, 1)
    up, left = part(2, 7, 8, 7, 2)
    layer = build({"type": "QuantizedLowRankLinear", "in_features": 10, "out_features": 7,
                   "rank": 2, "factor_bits": 8, "bits": 3, "group": 10, "bias": bias},
                  "here")  # fmt: skip
    shift = drawn(9)(7) if bias else None
    return layer.hold(whole=rest, down=down, up=up, bias=shift), weight + left.T @ right


MADE: dict[type, Callable[..., tuple[Any, np.ndarray]]] = {
    QuantizedLinear: whole, QuantizedFactorsLinear: factors, QuantizedLowRankLinear: both,
}  # fmt: skip


@pytest.fixture(params=MADE, ids=lambda kind: kind.__name__)
def made(request: pytest.FixtureRequest) -> Callable[..., tuple[Any, np.ndarray]]:
    return MADE[request.param]


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_its_numbers_say(made: Any, bias: bool) -> None:
    layer, weight = made(bias)
    x = drawn(5)(2, 3, 10)
    want = x.numpy() @ weight.T + (layer.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(layer(x).detach(), want, rtol=1e-12)
    np.testing.assert_allclose(layer.dense_weight().detach(), weight, rtol=1e-12)
    assert layer.weight.shape == (7, 10)
    check_differences(layer, drawn(6)(3, 10))
    with pytest.raises(LowrankError, match="cannot trace"):
        torch.fx.symbolic_trace(nn.Sequential(layer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_spec_and_cost_are_those_of_what_is_stored(made: Any, dtype: torch.dtype) -> None:
    layer = made()[0].to(dtype)
    remember_layout(layer, "conv1d")
    again = build(json.loads(json.dumps(describe(layer))), "here")
    assert all(t.is_meta for t in again.state_dict().values())
    again.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 10).to(dtype)
    assert torch.equal(again(x), layer(x))
    tensors = {k: t for k, t in layer.state_dict().items() if k != "bias"}
    params = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    macs = (layer.whole is not None) * 70 + (layer.down is not None and layer.rank) * 17
    assert layer.cost() == Cost(params, stored, macs)
    size = tuple(layer.spec()[name] for name in type(layer).SIZE)
    assert type(layer).size_cost((7, 10), size, itemsize=dtype.itemsize) == layer.cost()
    assert form_of(type(layer).STORAGE) is type(layer)
    assert "smaller, not faster" in notes_of([layer])[0]


def test_under_autocast_it_does_as_a_linear_layer(made: Any) -> None:
    layer, weight = made()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = layer.float()(x := torch.randn(4, 10))
    assert got.dtype == torch.bfloat16
    want = nn.functional.linear(x, torch.from_numpy(weight).float(), layer.bias.detach())
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05 * float(want.abs().max()))


def test_files_hold_codes_and_scales_and_give_the_same_layer(made: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(10, 10), made()[0], nn.Linear(7, 2)).double().eval()
    lowrank.save(net, tmp_path / "net")
    held = load_file(tmp_path / "net/model.safetensors")
    codes = {name: t for name, t in held.items() if name.endswith("codes")}
    assert codes
    assert all(t.dtype == torch.uint8 for t in codes.values())
    skeleton = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 7), nn.Linear(7, 2))
    again = lowrank.load(tmp_path / "net", skeleton).eval()
    x = drawn(3)(4, 10)
    assert type(again[1]) is type(net[1])
    assert torch.equal(again(x), net(x))
    lowrank.io.verify(tmp_path / "net")
    low = copy.deepcopy(again).bfloat16()[1]
    assert low.dense_weight().dtype == torch.bfloat16
    assert all(torch.equal(low.state_dict()[k.removeprefix("1.")], t) for k, t in codes.items())
    plain = lowrank.to_dense(again, copy=True)
    assert type(plain[1]) is nn.Linear
    torch.testing.assert_close(plain(x), net(x))


@pytest.mark.parametrize("change", [{"bits": 9}, {"bits": 0}, {"group": 11}, {"group": -1}])
def test_a_spec_that_cannot_be(change: dict[str, int]) -> None:
    with pytest.raises(LowrankError, match="here"):
        build({**describe(whole()[0]), **change}, "here")
