"""A convolution through fewer channels: equal to the whole at full rank, whatever its geometry."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lowrank import LowrankError, linalg
from lowrank.nn import ChannelConv, Geometry, build, describe
from lowrank.walk import layouts

from .convs import blocks, channel_first, conv

MODES = ("zeros", "reflect", "replicate", "circular")
GRID = list(itertools.product((1, 2), (0, 1, "same", "valid"), (1, 2), MODES, (True, False)))
MAKE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def whole(conv: nn.Module) -> ChannelConv:
    """At full rank: nothing is lost."""
    weight = layouts.matrix(conv).detach()
    up, down = linalg.factor(weight, min(weight.shape))
    return ChannelConv.from_factors(conv, down.to(weight), up.to(weight))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_full_rank_is_the_convolution(dims: int) -> None:
    for stride, padding, dilation, mode, bias in GRID:
        if padding == "same" and stride != 1:
            continue
        kernel = (3, 3, 3)[:dims]
        conv = MAKE[dims - 1](3, 6, kernel, stride, padding, dilation, bias=bias, padding_mode=mode)
        new, x = whole(conv), torch.randn(2, 3, *(8, 7, 6)[:dims])
        where = f"{stride} {padding} {dilation} {mode} {bias}"
        torch.testing.assert_close(new(x), conv(x), rtol=1e-5, atol=1e-5, msg=where)
        spec = json.loads(json.dumps(describe(new)))
        again = build(spec, where)
        assert not any(not p.is_meta for p in again.parameters())
        again.load_state_dict(load(save(new.state_dict())), assign=True)
        assert torch.equal(again(x), new(x)), where


def test_a_swapped_factor_shows() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    new, x = whole(conv), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        new.down.weight.copy_(
            new.down.weight.transpose(2, 3).clone()
        )  # rows and columns of the kernel
    assert float((new(x) - conv(x)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_bias_and_memory(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2).to(dtype)
    new = whole(conv)
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert torch.equal(new.bias, conv.bias)
    assert new.bias is not conv.bias
    assert all(p.is_contiguous() for p in new.parameters())
    assert new.weight.shape == conv.weight.shape
    assert new.cost().params == 8 * (36 + 8)
    x = torch.randn(2, 4, 7, 7).to(dtype)
    error = (new(x) - conv(x)).detach().abs().max()
    assert float(error) <= 40 * torch.finfo(dtype).eps


def test_channels_last() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    new = whole(conv)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    torch.testing.assert_close(new(x), conv(x), rtol=1e-5, atol=1e-5)
    moved = new.to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x), conv(x), rtol=1e-5, atol=1e-5)


def test_it_exports() -> None:
    new, x = whole(nn.Conv2d(4, 8, 3, padding=1)).eval(), torch.randn(2, 4, 6, 6)
    program = torch.export.export(new, (x,))
    assert torch.equal(program.module()(x), new(x))


def test_geometry_is_checked() -> None:
    good = Geometry.of(nn.Conv2d(3, 4, 3)).spec()
    for change in ({"stride": [1]}, {"padding": "some"}, {"padding_mode": "none"},
                   {"kernel_size": [3, 3, 3, 3]}):  # fmt: skip
        with pytest.raises(LowrankError):
            Geometry.from_spec({**good, **change})
    with pytest.raises(LowrankError, match="sizes must be"):
        build({"type": "ChannelConv", **good, "stride": [1, -1], "rank": 2, "bias": True}, "here")


@pytest.mark.parametrize("groups", [1, 2])
def test_the_leading_components_are_those_of_every_group(groups: int) -> None:
    dense = conv(2, groups=groups)
    whole, new = channel_first(dense), channel_first(dense).leading(2)
    wanted = []
    for block in blocks(dense):
        u, s, v = np.linalg.svd(block.reshape(len(block), -1), full_matrices=False)
        wanted.append(u[:, :2] * s[:2] @ v[:2])
    assert new.rank == 2
    assert build(describe(new), "").state_dict().keys() == new.state_dict().keys()
    got = new.dense_weight().detach().numpy()
    np.testing.assert_allclose(got, np.concatenate(wanted), atol=1e-12)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(new.dense_weight().view(dense.weight.shape))
    torch.testing.assert_close(new(x), dense(x))
    assert whole.rank > 2
