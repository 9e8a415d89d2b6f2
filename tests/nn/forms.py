"""The forms that are sized by several numbers, with NumPy's word for what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.nn import (
    BlastLinear,
    BlockLowRankLinear,
    DenseSparseLinear,
    LowRankMaskedLinear,
    LowRankSparseLinear,
    SparseDenseLinear,
)


def check_differences(
    layer: nn.Module, x: Tensor, *, names: Sequence[str] | None = None, **options: Any
) -> None:
    """Gradients at x and at the parameters (all of them, or those named) are the quotients'."""
    names = [name for name, _ in layer.named_parameters()] if names is None else names
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    x = x.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values), **options)


def factors(
    out: int, inner: int, rank: int, *, bias: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """down (rank, in), up (out, rank), and a bias."""
    normal = drawn(seed)
    down, up = normal(rank, inner), normal(out, rank)
    return down, up, normal(out) if bias else None


class Made(NamedTuple):
    layer: nn.Module
    weight: np.ndarray  # (out, in), by NumPy
    bias: np.ndarray | None


def drawn(seed: int) -> Callable[..., Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)


def dense_sparse(out: int, inner: int, *, bias: bool = True, seed: int = 0) -> Made:
    normal, rng = drawn(seed), np.random.default_rng(seed)
    rank, count = max(inner // 2, 2), 2
    basis, value = normal(rank, inner), normal(out, count)
    index = np.stack([rng.permutation(rank)[:count] for _ in range(out)])
    shift = normal(out) if bias else None
    weight = np.zeros((out, inner))
    for row in range(out):
        for number in range(count):
            weight[row] += value[row, number].item() * basis[index[row, number]].numpy()
    layer = DenseSparseLinear.from_code(basis, value, torch.from_numpy(index), shift)
    return Made(layer, weight, None if shift is None else shift.numpy())


def sparse_dense(out: int, inner: int, *, bias: bool = True, seed: int = 0) -> Made:
    normal, rng = drawn(seed), np.random.default_rng(seed)
    rank, count = max(out // 2, 2), 2
    basis, value = normal(out, rank), normal(inner, count)
    index = np.stack([rng.permutation(rank)[:count] for _ in range(inner)])
    shift = normal(out) if bias else None
    weight = np.zeros((out, inner))
    for column in range(inner):
        for number in range(count):
            atom = basis[:, index[column, number]].numpy()
            weight[:, column] += value[column, number].item() * atom
    layer = SparseDenseLinear.from_code(basis, value, torch.from_numpy(index), shift)
    return Made(layer, weight, None if shift is None else shift.numpy())


def lowrank_sparse(out: int, inner: int, *, bias: bool = True, seed: int = 0) -> Made:
    normal, rng = drawn(seed), np.random.default_rng(seed)
    down, up, columns = normal(2, inner), normal(out, 2), normal(out, 3)
    index = np.sort(rng.permutation(inner)[:3])
    shift = normal(out) if bias else None
    weight = up.numpy() @ down.numpy()
    weight[:, index] += columns.numpy()
    layer = LowRankSparseLinear.from_parts(down, up, columns, torch.from_numpy(index), shift)
    return Made(layer, weight, None if shift is None else shift.numpy())


def blast(out: int, inner: int, *, bias: bool = True, seed: int = 0) -> Made:
    normal, blocks = drawn(seed), 3
    rows, columns = -(-out // blocks), -(-inner // blocks)
    left, mix = normal(blocks, rows, 2), normal(blocks, blocks, 2)
    right = normal(blocks, 2, columns)
    shift = normal(out) if bias else None
    weight = np.block(
        [
            [left[i].numpy() @ np.diag(mix[i, j].numpy()) @ right[j].numpy() for j in range(blocks)]
            for i in range(blocks)
        ]
    )[:out, :inner]
    layer = BlastLinear.from_factors(left, mix, right, shift, shape=(out, inner))
    return Made(layer, weight, None if shift is None else shift.numpy())


def lowrank_masked(out: int, inner: int, *, bias: bool = True, seed: int = 0) -> Made:
    normal, rng = drawn(seed), np.random.default_rng(seed)
    down, up, entries = normal(2, inner), normal(out, 2), normal(out, inner)
    mask = rng.random((out, inner)) < 0.4
    shift = normal(out) if bias else None
    weight = up.numpy() @ down.numpy() + np.where(mask, entries.numpy(), 0)
    layer = LowRankMaskedLinear.from_parts(down, up, entries, torch.from_numpy(mask), shift)
    return Made(layer, weight, None if shift is None else shift.numpy())


def block_lowrank(out: int, inner: int, *, bias: bool = True, seed: int = 0) -> Made:
    normal, rng, rank = drawn(seed), np.random.default_rng(seed), 3
    up, down = normal(out, rank), normal(rank, inner)
    sizes = np.array([[out], [inner]])
    starts = rng.integers(sizes, size=(2, rank))
    starts[:, 0] = sizes[:, 0] - 1  # the first run goes round the end
    widths = rng.integers(2, sizes + 1, size=(2, rank))
    shift = normal(out) if bias else None
    weight = np.zeros((out, inner))
    for k in range(rank):
        for i in range(widths[0, k]):
            for j in range(widths[1, k]):
                row, column = (starts[0, k] + i) % out, (starts[1, k] + j) % inner
                weight[row, column] += up[row, k].item() * down[k, column].item()
    places = torch.from_numpy(starts), torch.from_numpy(widths)
    layer = BlockLowRankLinear.from_terms(up, down, *places, shift)
    return Made(layer, weight, None if shift is None else shift.numpy())


FORMS: dict[str, Callable[..., Made]] = {
    "DenseSparseLinear": dense_sparse,
    "SparseDenseLinear": sparse_dense,
    "LowRankSparseLinear": lowrank_sparse,
    "BlastLinear": blast,
    "BlockLowRankLinear": block_lowrank,
    "LowRankMaskedLinear": lowrank_masked,
}
