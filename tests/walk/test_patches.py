"""Rows that layers read: patches of a convolution are what its matrix is multiplied by."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lowrank.walk import layouts
from tests.nets import images, small_net

MODES = ("zeros", "reflect", "replicate", "circular")
GRID = list(itertools.product((1, 2), (0, 1, "same", "valid"), (1, 2), MODES, (True, False)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_matrix_on_patches_is_the_convolution(dims: int) -> None:
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    for stride, padding, dilation, mode, bias in GRID:
        if padding == "same" and stride != 1:
            continue
        kernel = (3, 3, 3)[:dims]
        conv = make(2, 4, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).double()
        x = torch.randn(3, 2, *(8, 7, 6)[:dims], dtype=torch.float64)
        rows = torch.cat(list(layouts.chunks(conv, x)))
        want = conv(x)
        got = rows @ layouts.matrix(conv).T
        if bias:
            got = got + conv.bias
        where = f"{stride} {padding} {dilation} {mode}"
        torch.testing.assert_close(got, layouts.output_rows(conv, want), msg=where)


def test_chunks_are_bounded_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(7, 3, 6, 6)
    whole = torch.cat(list(layouts.chunks(conv, x)))
    monkeypatch.setattr(layouts, "ENTRIES", 2 * 27 * 36)
    parts = list(layouts.chunks(conv, x))
    assert [len(part) for part in parts] == [32, 32, 32, 16]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat(list(layouts.chunks(conv, x[0]))), whole[:16])  # no batch axis
    assert list(layouts.chunks(conv, x[:0])) == []


def test_what_a_layer_can_read() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert layouts.fits(conv, torch.zeros(2, 3, 5, 5))
    assert layouts.fits(conv, torch.zeros(3, 5, 5))
    assert not layouts.fits(conv, torch.zeros(2, 4, 5, 5))
    assert not layouts.fits(conv, torch.zeros(2, 3, 5))
    assert layouts.fits(nn.Linear(3, 4), torch.zeros(2, 5, 3))


def test_statistics_are_those_of_the_patches() -> None:
    import lowrank

    net, x = small_net(), images(12)
    seen = lowrank.calibrate(net, [x[:8], x[8:]], progress=False)
    with torch.no_grad():
        h = net.stem(x).relu()
    unfold = nn.functional.unfold(h, 3, padding=1).transpose(1, 2).reshape(-1, 72).double()
    stats = seen.statistics["stage1.0.conv1"]
    assert stats.count == 12 * 144
    torch.testing.assert_close(stats.gram, unfold.T @ unfold / len(unfold), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.mean, unfold.mean(0), rtol=1e-5, atol=1e-6)


def test_one_tensor_read_in_two_ways_is_two_inputs() -> None:
    import lowrank

    seen = lowrank.calibrate(small_net(), [images(4)], progress=False)
    groups = {group for group in seen.observation.groups if "stage2.0.conv1" in group}
    assert groups == {("stage2.0.conv1",)}  # the shortcut reads it by a 1×1 kernel
    assert seen.statistics["stage2.0.down"].gram.shape == (8, 8)
    stages = ("stage1.0", "stage1.1"), ("stage2.0", "stage2.1")
    assert seen.observation.chains == stages


def test_the_fisher_of_a_convolution_is_that_of_its_patches() -> None:
    """Against autograd: the squared gradient of each sample's own loss, and the outputs' Gram."""
    import lowrank
    from lowrank.calibration.gradients import _drawn

    net, x = small_net().double(), images(6).double()
    seen = lowrank.with_fisher(net, lowrank.calibrate(net, [x], progress=False), seed=3)
    stats = seen.statistics["stage2.1.conv2"]
    drawn = _drawn(net(x).detach(), torch.Generator().manual_seed(3))
    conv, kept = net.stage2[1].conv2, []
    hook = conv.register_forward_hook(lambda _m, _a, out: kept.append(out))
    rows = torch.zeros(12, dtype=torch.float64)
    for index in range(len(x)):
        loss = nn.functional.cross_entropy(net(x[index : index + 1]), drawn[index : index + 1])
        (own,) = torch.autograd.grad(loss, conv.weight)
        rows += own.square().flatten(1).sum(1)
    torch.testing.assert_close(stats.row_fisher, rows / len(x))
    kept.clear()
    loss = nn.functional.cross_entropy(net(x), drawn, reduction="sum")
    (outer,) = torch.autograd.grad(loss, kept)
    hook.remove()
    g = outer.movedim(1, -1).reshape(-1, 12)
    torch.testing.assert_close(stats.out_gram, g.T @ g / len(x))  # positions summed, per sample
