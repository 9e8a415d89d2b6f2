"""N:M masks against a loop over groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank.linalg.nm import nm_bytes, nm_mask


@pytest.mark.parametrize("shape", [(5, 16), (3, 18), (2, 3, 7), (4,), (6, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 16), (4, 4), (2, 5)])
def test_the_n_largest_of_every_group_are_kept(shape: tuple[int, ...], n: int, m: int) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    mask = nm_mask(weight, n, m)
    assert mask.shape == weight.shape
    rows, found = weight.numpy().reshape(-1, shape[-1]), mask.numpy().reshape(-1, shape[-1])
    for row, got in zip(rows, found, strict=True):
        for start in range(0, shape[-1], m):
            group = np.abs(row[start : start + m])
            keep = math.ceil(n * len(group) / m)
            want = np.zeros(len(group), dtype=bool)
            want[np.argsort(-group)[:keep]] = True
            assert got[start : start + m].tolist() == want.tolist()


def test_ties_and_zeros_keep_exactly_n() -> None:
    for weight in (torch.zeros(4, 8), torch.ones(4, 8)):
        assert nm_mask(weight, 2, 4).view(4, 2, 4).sum(-1).unique().tolist() == [2]
        assert nm_mask(weight[:, :6], 2, 4)[:, 4:].sum(-1).tolist() == [1] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bytes_count_values_and_places(dtype: torch.dtype) -> None:
    """2:4 keeps half of the values and two bits for each."""
    weight = torch.randn(8, 32, dtype=torch.float64).to(dtype)
    size = dtype.itemsize
    assert nm_bytes(nm_mask(weight, 2, 4), 4, size) == 128 * size + 128 * 2 // 8
    assert nm_bytes(nm_mask(weight, 1, 16), 16, size) == 16 * size + 16 * 4 // 8
