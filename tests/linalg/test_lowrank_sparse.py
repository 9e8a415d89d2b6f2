"""Low rank plus channels: the identity, the choice by brute force, the Schur complement."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import linalg
from lowrank.linalg.lowrank_sparse import ColumnParts

from .oracle import grams


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def dense(parts: ColumnParts) -> Tensor:
    whole = parts.up @ parts.down
    return whole.index_add(1, parts.inputs, parts.columns)


def fitted(weight: Tensor, basis: np.ndarray, inputs: list[int], root: np.ndarray) -> float:
    """‖(W − U V − S) H^½‖² by NumPy's lstsq, over V and the columns of S at once."""
    rest = weight.numpy() - basis @ (basis.T @ weight.numpy())
    target = rest @ root
    solved = np.linalg.lstsq(root[inputs].T, target.T, rcond=None)[0].T
    return float(np.square(target - solved @ root[inputs]).sum())


def test_what_columns_of_the_tail_take_away_is_exactly_theirs() -> None:
    """‖W − L − S‖² = ‖R‖² − ‖R[:, J]‖², o = 48, i = 64, r = 8, c = 6 and seed 0."""
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    left, values, right = np.linalg.svd(weight.double().numpy())
    tail = (left[:, 8:48] * values[8:]) @ right[8:48]
    parts = linalg.low_rank_sparse(weight, 8, 6, rounds=0)
    lengths = np.square(tail).sum(0)
    assert parts.inputs.tolist() == sorted(np.argsort(-lengths)[:6].tolist())
    np.testing.assert_allclose(parts.columns, tail[:, parts.inputs], atol=1e-9)
    error = linalg.squared_error(weight, dense(parts))
    want = np.square(tail).sum() - np.sort(lengths)[-6:].sum()
    assert error == pytest.approx(want, rel=1e-12)
    assert np.sqrt(error / np.square(weight.double().numpy()).sum()) == pytest.approx(
        0.7011652, abs=1e-6
    )


def test_channels_chosen_by_a_part_of_the_tail_are_no_better() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64).double()
    left, values, right = np.linalg.svd(weight.numpy())
    tail = (left[:, 8:48] * values[8:]) @ right[8:48]
    part = (left[:, 8:16] * values[8:16]) @ right[8:16]
    whole = np.square(tail).sum(0)

    def relative(inputs: np.ndarray) -> float:
        return float(((whole.sum() - whole[inputs].sum()) / weight.square().sum()) ** 0.5)

    by_part = relative(np.argsort(-np.square(part).sum(0))[:6])
    assert by_part == pytest.approx(0.70405, abs=1e-5)
    ours = linalg.channels(torch.from_numpy(tail), 6).numpy()
    assert relative(ours) == pytest.approx(0.70117, abs=1e-5)


@pytest.mark.parametrize("name", ["good", "condition 1e14", "few tokens", "dead inputs"])
def test_columns_are_the_regression_on_their_inputs(name: str) -> None:
    """Measured error = what NumPy's lstsq leaves on the same basis and channels."""
    weight, gram = normal(12, 15), grams(15)[name]
    values, vectors = np.linalg.eigh(gram.numpy())
    root = vectors * np.sqrt(values.clip(min=0))
    for rounds in (0, 5):
        parts = linalg.low_rank_sparse(weight, 3, 4, gram, rounds=rounds)
        basis = np.linalg.qr(parts.up.numpy())[0]
        want = fitted(weight, basis, parts.inputs.tolist(), root)
        got = linalg.squared_error(weight, dense(parts), gram)
        total = linalg.squared_error(weight, torch.zeros_like(weight), gram)
        assert got == pytest.approx(want, abs=1e-7 * total)


def test_the_first_channel_is_the_best_one_and_pairs_are_near_the_best() -> None:
    weight, gram = normal(9, 8), grams(8)["good"]
    root = np.linalg.cholesky(gram.numpy())
    order = linalg.channels(weight, 2, gram).tolist()
    nothing = np.zeros((9, 1))
    errors = {j: fitted(weight, nothing, [j], root) for j in range(8)}
    assert order[0] == min(errors, key=errors.__getitem__)
    pairs = {pair: fitted(weight, nothing, list(pair), root) for pair in combinations(range(8), 2)}
    assert fitted(weight, nothing, order, root) <= 1.05 * min(pairs.values())


def test_fewer_channels_are_a_beginning_of_more() -> None:
    weight, gram = normal(9, 12), grams(12)["good"]
    for metric in (None, gram):
        order = linalg.channels(weight, 7, metric).tolist()
        assert linalg.channels(weight, 3, metric).tolist() == order[:3]
        assert len(set(order)) == 7


@pytest.mark.parametrize("aware", [True, False])
def test_what_remains_is_the_schur_complement(aware: bool) -> None:
    gram = grams(10)["good"]
    index, rest = torch.tensor([2, 5, 7]), [0, 1, 3, 4, 6, 8, 9]
    found = linalg.remaining(gram if aware else None, index, gram)
    h = gram.numpy() if aware else np.eye(10)
    inner = np.linalg.inv(h[np.ix_(index, index)])
    want = np.zeros((10, 10))
    cross = h[np.ix_(rest, index)]
    want[np.ix_(rest, rest)] = h[np.ix_(rest, rest)] - cross @ inner @ cross.T
    full = found.numpy() if aware else np.diag(found.numpy())
    np.testing.assert_allclose(full, want, atol=1e-10)


def test_refinement_never_raises_the_error_and_finds_what_was_planted() -> None:
    """Two columns stand out in a weight of rank 3: the tail of the plain SVD hides one of them."""
    weight = normal(30, 3) @ normal(3, 20, seed=1)
    weight[:, [4, 11]] += normal(30, 2, seed=2)
    for gram in (None, grams(20)["good"]):
        errors = [
            linalg.squared_error(
                weight, dense(linalg.low_rank_sparse(weight, 3, 2, gram, rounds=n)), gram
            )
            for n in (0, 1, 5)
        ]
        assert errors[0] >= errors[1] >= errors[2]
    parts = linalg.low_rank_sparse(weight, 3, 2, rounds=20)
    assert parts.inputs.tolist() == [4, 11]
    np.testing.assert_allclose(dense(parts), weight, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [None, "zero", "dead inputs", "good"])
def test_any_dtype_all_inputs_and_zeros(dtype: torch.dtype, name: str | None) -> None:
    gram = None if name is None else grams(8)[name]
    for weight in (normal(6, 8).to(dtype), torch.zeros(6, 8, dtype=dtype)):
        parts = linalg.low_rank_sparse(weight, 2, 8, gram)
        assert parts.inputs.tolist() == list(range(8))
        assert all(part.isfinite().all() for part in parts)
        scale = float(weight.double().square().sum()) or 1.0
        assert linalg.squared_error(weight, dense(parts), gram) <= 1e-9 * scale
