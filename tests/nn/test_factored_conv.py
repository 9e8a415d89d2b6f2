"""Every factored form of a convolution: the arithmetic, the geometry, files, export."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank import LowrankError, linalg
from lowrank.nn import FACTORED, Geometry, TuckerConv, build, channel_cost, describe, is_factored
from lowrank.types import Factored

from .convs import PLANE, WHOLE, conv

SPACE = (9, 8, 7)
MODES = ("zeros", "reflect", "replicate", "circular")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Different numbers along every dimension, so that a swap of two shows.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel": (3, 2, 3)},
    "strided": {"kernel": (3, 2, 1), "stride": (2, 3, 1), "padding": (2, 1, 0)},
    "dilated": {"kernel": (2, 3, 2), "dilation": (3, 2, 1), "padding": (1, 2, 1)},
    "same": {"kernel": (3, 2, 3), "padding": "same", "dilation": (1, 2, 1)},
    "valid": {"kernel": (1, 3, 2), "padding": "valid", "stride": (1, 2, 2)},
    "one": {"kernel": (1, 1, 1), "stride": (2, 1, 3)},
    "all": {"kernel": (3, 2, 2), "stride": (1, 2, 1), "padding": (2, 1, 1), "dilation": (2, 1, 2)},
}
GROUPS = {1: (3, 5), 2: (4, 6), 4: (4, 4)}  # (in, out); the last one is depthwise


@pytest.fixture(params=WHOLE)
def form(request: Any) -> Any:
    return request.param


def cut(options: dict[str, Any], dims: int) -> dict[str, Any]:
    return {k: v[:dims] if isinstance(v, tuple) else v for k, v in options.items()}


def drawn(dims: int, inputs: int, *, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, inputs, *SPACE[:dims], dtype=torch.float64)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_full_rank_is_the_convolution(form: str, dims: int) -> None:
    """T7: stride, padding and its modes, dilation, groups, with and without bias."""
    if form in PLANE and dims != 2:
        with pytest.raises(LowrankError, match="only a 2-dimensional convolution"):
            FACTORED["SpatialConv"](Geometry.of(conv(dims)), 2, bias=True)
        return
    for (name, options), mode, groups in itertools.product(GEOMETRIES.items(), MODES, GROUPS):
        inputs, outputs = GROUPS[groups]
        bias = (groups + len(mode)) % 2 == 0  # both, with every geometry
        where = f"{name} {mode} groups {groups}, bias {bias}"
        layer = conv(
            dims, inputs, outputs, groups=groups, bias=bias, padding_mode=mode, **cut(options, dims)
        )
        new, x = WHOLE[form](layer), drawn(dims, inputs)
        weight = layer.weight.detach().flatten(1).numpy()
        np.testing.assert_allclose(new.dense_weight().detach(), weight, atol=1e-12, err_msg=where)
        with torch.no_grad():
            torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-11, msg=where)
        for field, value in Geometry.of(layer).__dict__.items():
            assert getattr(new, field) == value, (where, field)


@pytest.mark.parametrize("mode", MODES[1:])
def test_an_odd_number_is_padded_after(mode: str) -> None:
    """Of an even kernel and "same"; with zeros torch pads, and warns of it."""
    layer = conv(2, 4, 6, (2, 4), padding="same", padding_mode=mode)
    new, x = WHOLE["tubal"](layer), drawn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-11)


def test_in_float32_too(form: str) -> None:
    layer = conv(2, 8, 12, 3, padding=1, groups=2, dtype=torch.float32)
    new, x = WHOLE[form](layer), torch.randn(3, 8, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new(x[0]), layer(x[0]), rtol=1e-5, atol=1e-5)  # no batch


def test_every_tensor_matters(form: str) -> None:
    """The oracle would see a factor that is transposed or a bias that is lost."""
    layer = conv(2, 6, 6, 3, padding=1)
    new, x = WHOLE[form](layer), drawn(2, 6)
    with torch.no_grad():
        want = layer(x)
        for name, tensor in new.named_parameters():
            broken = copy.deepcopy(new)
            wrong = dict(broken.named_parameters())[name]
            if name.endswith("bias"):
                wrong.zero_()
            else:
                wrong.copy_(tensor.flip(0))
            assert float((broken(x) - want).abs().max()) > 1e-2, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_bias_and_memory(form: str, dtype: torch.dtype) -> None:
    layer = conv(2, 8, 12, 3, stride=2, padding=1, dtype=torch.float32).to(dtype)
    new = WHOLE[form](layer)
    assert isinstance(new, Factored)
    assert is_factored(new)
    for name, tensor in new.state_dict().items():
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize, name
    assert torch.equal(new.bias, layer.bias)
    assert new.bias.data_ptr() != layer.bias.data_ptr()
    weights = [p for name, p in new.named_parameters() if not name.endswith("bias")]
    cost = new.cost()
    assert cost.params == sum(p.numel() for p in weights)
    assert cost.bytes == sum(p.untyped_storage().nbytes() for p in weights)
    x = torch.randn(2, 8, 7, 7).to(dtype)
    error = (new(x).double() - layer(x).double()).detach().abs().max()
    assert float(error) <= 60 * torch.finfo(dtype).eps


def counted(new: Any, x: torch.Tensor) -> int:
    """Products in all convolutions for this input, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        new(x)
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_macs_are_those_of_the_convolutions(
    form: str, stride: tuple[int, int], groups: int
) -> None:
    """Where strides divide the image and padding keeps it, the count is exact."""
    layer = conv(2, 4, 6, (3, 5), stride=stride, padding=(1, 2), groups=groups)
    new, x = WHOLE[form](layer), torch.randn(1, 4, 12, 12, dtype=torch.float64)
    positions = math.prod(layer(x).shape[2:])
    assert counted(new, x) == new.cost().macs * positions


def test_weight_reads_as_the_dense_one(form: str) -> None:
    layer = conv(2, 6, 8, (3, 2), groups=2)
    new = WHOLE[form](layer)
    assert new.weight.shape == layer.weight.shape
    torch.testing.assert_close(new.weight + 0, layer.weight.detach() + 0)
    assert new.dense_weight(torch.float32).dtype == torch.float32
    assert new.weight.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
def test_files(form: str, bias: bool) -> None:
    layer = conv(
        2, 4, 6, (3, 2), stride=(1, 2), padding=(2, 1), padding_mode="reflect", groups=2, bias=bias
    )
    new, x = WHOLE[form](layer), drawn(2, 4)
    spec = json.loads(json.dumps(describe(new)))
    state = torch.get_rng_state()
    again = build(spec, "net.conv")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in again.parameters())
    assert describe(again) == describe(new)
    again.load_state_dict(load(save(new.state_dict())), assign=True)
    assert torch.equal(again(x), new(x))
    for copied in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(copied(x), new(x))


def test_channels_last(form: str) -> None:
    layer = conv(2, 4, 8, 3, padding=1, dtype=torch.float32).to(memory_format=torch.channels_last)
    new = WHOLE[form](layer)
    assert all(p.is_contiguous() for p in new.parameters())
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)
        moved = copy.deepcopy(new).to(memory_format=torch.channels_last)
        torch.testing.assert_close(moved(x), layer(x), rtol=1e-5, atol=1e-5)
        assert moved(x).is_contiguous(memory_format=torch.channels_last)


def test_it_exports(form: str) -> None:
    layer = conv(2, 4, 8, 3, padding=1, padding_mode="circular", groups=2, dtype=torch.float32)
    new, x = WHOLE[form](layer).eval(), torch.randn(2, 4, 6, 6)
    program = torch.export.export(new, (x,))
    assert torch.equal(program.module()(x), new(x))


def test_gradients_reach_every_factor(form: str) -> None:
    layer = conv(2, 4, 6, 3, groups=2)
    new = WHOLE[form](layer)
    new(drawn(2, 4)).square().sum().backward()
    for name, parameter in new.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_groups_are_matrices_of_their_own() -> None:
    """A weight whose groups have rank 2 each: kept exactly by 2 channels a group, and not by as
    many for all groups together, which is what a decomposition that overlooks them would do."""
    layer = conv(2, 8, 12, 3, groups=2)
    low = [torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 36, dtype=torch.float64)
           for _ in range(2)]  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(torch.cat(low).view_as(layer.weight))
    ups, downs = zip(*(linalg.factor(part, 2) for part in low), strict=True)
    new = FACTORED["ChannelConv"].from_factors(layer, torch.cat(downs), torch.cat(ups))
    assert (new.rank, new.down.out_channels) == (2, 4)
    x = drawn(2, 8)
    torch.testing.assert_close(new(x), layer(x))
    whole = layer.weight.detach().flatten(1)
    up, down = linalg.factor(whole, 2)
    assert float((up @ down - whole).norm() / whole.norm()) > 0.3


def test_the_kernel_counts_for_where_a_form_pays() -> None:
    """64 → 64 channels under 3×3: 36,864 numbers, 640 of them for each channel between."""
    geometry = Geometry.of(nn.Conv2d(64, 64, 3, device="meta"))
    dense = 64 * 64 * 9
    pays = [r for r in range(1, 65) if channel_cost(geometry, r, itemsize=4).params < dense]
    assert max(pays) == 57


def test_children_that_are_there_are_held() -> None:
    made = WHOLE["tucker"](conv(2, 4, 6, (3, 2), stride=(2, 1), padding=1, groups=2))
    held = TuckerConv.of_children(made.first, made.core, made.last)
    assert held.core is made.core
    assert describe(held) == describe(made)
    x = drawn(2, 4)
    assert torch.equal(held(x), made(x))


def test_other_layers_are_refused() -> None:
    for other in (nn.ConvTranspose2d(4, 6, 3), nn.Linear(4, 6)):
        with pytest.raises(LowrankError, match=r"expected nn\.Conv1d, 2d or 3d"):
            Geometry.of(other)


def test_factors_that_do_not_fit_are_refused(form: str) -> None:
    new = WHOLE[form](conv(2, 4, 6, 3, groups=2))
    another = conv(2, 4, 8, 3, groups=2)
    weights = [p.detach() for n, p in new.named_parameters() if not n.endswith("bias")]
    if form == "tucker":
        first, core, last = weights
        with pytest.raises(LowrankError, match="`last`"):
            type(new).from_parts(another, last, core, first)
    elif form == "cp":
        first, high, wide, last = weights
        with pytest.raises(LowrankError, match="`last`"):
            type(new).from_factors(another, last, [high, wide], first)
        with pytest.raises(LowrankError, match="one factor for each dimension"):
            type(new).from_factors(another, last, [high], first)
    elif form == "tubal":
        down, up = weights
        with pytest.raises(LowrankError, match=r"`up` must have shape \(8, 18\), .* got \(6, 18\)"):
            type(new).from_factors(another, down, up, new.ranks)
        with pytest.raises(LowrankError, match=r"9 frequencies, .* got ranks \[2, 1\]"):
            type(new).from_factors(another, down, up, [2, 1])
        with pytest.raises(LowrankError, match="one component at least"):
            type(new).from_factors(another, down, up, [0] * 9)
    else:
        down, up = weights
        options = {"wide": "last"} if form == "mirror" else {}
        with pytest.raises(LowrankError, match="`up`"):
            type(new).from_factors(another, down, up, **options)
        with pytest.raises(LowrankError, match="multiple of the 2 groups, got 3"):
            type(new).from_factors(another, down[:3], up, **options)


def test_a_kernel_elsewhere_is_refused() -> None:
    spec = describe(WHOLE["mirror"](conv(2)))
    assert spec["wide"] == "last"
    assert "wide" not in describe(WHOLE["channel"](conv(2)))
    with pytest.raises(LowrankError, match="wide"):
        build({**spec, "wide": "middle"}, "net.conv")
