"""FWSVD: the factors of the authors' formula, without their division."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank.methods import FWSVD, SVD
from lowrank.types import Statistics

from .layers import at_rank, linear, site

SHAPES = [(12, 20), (20, 12), (16, 16)]


def rows_of(out: int, seed: int = 0) -> Statistics:
    rows = torch.rand(out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Statistics(9, row_fisher=rows**4 * 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_svd_of_the_weighted_rows_scaled_back(shape: tuple[int, int]) -> None:
    for seed in range(3):
        layer, stats = linear(*shape, seed), rows_of(shape[0], seed)
        weight, scale = layer.weight.detach().numpy(), np.sqrt(stats.row_fisher.numpy())[:, None]
        left, values, right = np.linalg.svd(scale * weight, full_matrices=False)
        curve = FWSVD().curve(site(layer), stats)
        assert (curve.norm, curve.exact) == ("row-fisher", True)
        assert curve.total == pytest.approx(float(((scale * weight) ** 2).sum()), rel=1e-12)
        for rank in (1, 4):
            option = at_rank(curve, rank)
            want = (left[:, :rank] * values[:rank]) @ right[:rank] / scale
            new = FWSVD().factor(layer, option, stats).dense_weight().detach()
            np.testing.assert_allclose(new.numpy(), want, atol=1e-8 * np.abs(want).max())
            error = float(((scale * (weight - new.numpy())) ** 2).sum())
            assert error == pytest.approx(option.error, abs=1e-12 * curve.total)
            measured = FWSVD().error(layer, new, stats)
            assert measured == pytest.approx(error, rel=1e-10)


def test_rows_that_count_alike_make_it_plain_svd() -> None:
    layer, stats = linear(12, 20), Statistics(9, row_fisher=torch.full((12,), 3.0))
    option = at_rank(FWSVD().curve(site(layer), stats), 4)
    one, two = (m.factor(layer, option, stats).dense_weight() for m in (FWSVD(), SVD()))
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_without_gradient_need_no_floor(shape: tuple[int, int]) -> None:
    """Five rows count: rank five serves them without error, and the others stay tame."""
    layer, stats = linear(*shape), rows_of(shape[0])
    unread = torch.arange(5, shape[0])
    stats = replace(stats, row_fisher=stats.row_fisher.index_fill(0, unread, 0))
    option = at_rank(FWSVD().curve(site(layer), stats), 5)
    assert option.error <= 1e-10 * FWSVD().curve(site(layer), stats).total
    new, weight = (
        FWSVD().factor(layer, option, stats).dense_weight().detach(),
        layer.weight.detach(),
    )
    torch.testing.assert_close(new[:5], weight[:5], atol=1e-8, rtol=0)
    assert float(new[5:].norm()) <= float(weight[5:].norm())  # a projection


def test_a_layer_without_any_gradient_is_factored_all_the_same() -> None:
    layer, stats = linear(12, 20), Statistics(9, row_fisher=torch.zeros(12))
    curve = FWSVD().curve(site(layer), stats)
    assert curve.total == 0
    new = FWSVD().factor(layer, curve.options[0], stats)
    assert torch.isfinite(new.dense_weight()).all()
