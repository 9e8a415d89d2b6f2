"""`frequency` and `head-aware`: what is minimised, against numpy's SVD and random rivals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank.methods import METHODS, SVD, Frequency, HeadAware, Whitened
from lowrank.methods.resolved import Resolved
from lowrank.testing import embedding_case
from lowrank.types import Statistics
from tests.zoo import calibration, inputs_of, make, tokens

TABLE = torch.randn(30, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def case(head: bool):
    return embedding_case("table", TABLE, dtype=torch.float64, head=head)


def shares(stats: Statistics) -> np.ndarray:
    """A third evenly, two thirds as counted."""
    counts = stats.freq.numpy()
    return counts / counts.sum() * 2 / 3 + 1 / 3 / len(counts)


def metric(stats: Statistics) -> np.ndarray:
    gram = np.eye(12) if stats.gram is None else stats.gram.numpy()
    return 0.75 * np.eye(12) + 0.25 * gram * 12 / np.trace(gram)


def error(difference: np.ndarray, stats: Statistics) -> float:
    """Token by token, as the docstring says it."""
    c = metric(stats)
    return sum(p * (d @ c @ d) for p, d in zip(shares(stats), difference, strict=True))


def made(method, given, rank: int) -> np.ndarray:
    curve = method.curve(given.site, given.stats)
    option = next(o for o in curve.options if o.size == (rank,))
    new = method.factor(given.module, option, given.stats)
    found = new.dense_weight(torch.float64).detach().numpy()
    assert option.error == pytest.approx(error(TABLE.numpy() - found, given.stats), rel=1e-9)
    return found


@pytest.mark.parametrize(("method", "head"), [(Frequency(), False), (HeadAware(), True)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_it_reaches_the_optimum_of_its_norm(method, head: bool, rank: int) -> None:
    given = case(head)
    scaled = np.sqrt(shares(given.stats))[:, None] * TABLE.numpy()
    scaled = scaled @ np.linalg.cholesky(metric(given.stats))
    optimum = (np.linalg.svd(scaled, compute_uv=False)[rank:] ** 2).sum()
    found = error(TABLE.numpy() - made(method, given, rank), given.stats)
    assert found == pytest.approx(optimum, rel=1e-10)
    rng = np.random.default_rng(0)
    for size in (1e-2, 1e-4):  # no rival nearby is better
        u, s, v = np.linalg.svd(made(method, given, rank))
        up, down = u[:, :rank] * s[:rank], v[:rank]
        rival = (up + size * rng.normal(size=up.shape)) @ (
            down + size * rng.normal(size=down.shape)
        )
        assert error(TABLE.numpy() - rival, given.stats) > found


def test_each_is_best_in_its_own_norm() -> None:
    for head, best, others in (
        (False, Frequency(), [SVD()]),
        (True, HeadAware(), [Frequency(), SVD()]),
    ):
        given = case(head)
        of = {}
        for method in (best, *others):
            option = next(
                o for o in method.curve(given.site, given.stats).options if o.size == (4,)
            )
            weight = method.factor(given.module, option, given.stats).dense_weight(torch.float64)
            of[method] = error(TABLE.numpy() - weight.detach().numpy(), given.stats)
        assert all(of[best] < of[other] * 0.999 for other in others)


def test_without_a_head_they_agree() -> None:
    given = case(False)
    assert np.array_equal(made(Frequency(), given, 4), made(HeadAware(), given, 4))


def test_a_frequent_row_is_kept_better_and_no_row_is_free() -> None:
    given = case(False)
    counts = torch.zeros(30, dtype=torch.float64)
    counts[7] = 1e6
    stats = Statistics(count=10**6, freq=counts)
    option = next(o for o in Frequency().curve(given.site, stats).options if o.size == (2,))
    table = Frequency().factor(given.module, option, stats).dense_weight(torch.float64).detach()
    lost = ((table - TABLE) ** 2).sum(1) / (TABLE**2).sum(1)
    assert lost[7] < 0.01
    others = torch.cat([lost[:7], lost[8:]])
    assert others.mean() < 0.95  # the second component serves them


def test_counts_are_those_of_the_ids_and_the_heads_input_is_seen() -> None:
    model = make("gpt2")
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    batches = [{"input_ids": tokens(), "attention_mask": mask}, {"input_ids": tokens(1, 5, 3)}]
    stats = calibration(model, batches).statistics["transformer.wte"]
    ids = np.concatenate([tokens()[mask == 1].numpy(), tokens(1, 5, 3).flatten().numpy()])
    assert np.array_equal(stats.freq.numpy(), np.bincount(ids, minlength=61))
    assert stats.count == len(ids)
    rows = np.concatenate(
        [
            inputs_of(model, ["lm_head"], lambda b=b: model(**b))["lm_head"][keep]
            for b, keep in zip(batches, (mask.flatten().numpy() == 1, slice(None)), strict=True)
        ]
    )
    np.testing.assert_allclose(stats.gram.numpy(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_padding_is_no_token() -> None:
    table = nn.Embedding(9, 4, padding_idx=2)
    stats = calibration(nn.Sequential(table), torch.tensor([[2, 2, 5, 1]])).statistics["0"]
    assert stats.freq.tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0]


def test_which_method_a_kind_gets() -> None:
    assert type(Resolved(Whitened()).for_kind("embedding")) is HeadAware
    assert Resolved(Whitened()).for_kind("linear") == Whitened()
    for name in ("svd", "frequency", "head-aware"):
        way = METHODS[name]()
        assert Resolved(way).for_kind("embedding") is way


def test_no_statistics_no_factors() -> None:
    model = nn.Sequential(nn.Embedding(20, 8))
    with pytest.raises(
        lowrank.LowrankError,
        match=r"method frequency needs calibration data \(freq\): pass data",
    ):
        lowrank.compress(model, 0.5, method="frequency", target_modules="all")
    other = calibration(nn.Sequential(nn.Embedding(30, 8)), torch.arange(30))
    with pytest.raises(lowrank.LowrankError, match="counted 30 ids, the table has 20"):
        lowrank.compress(model, 0.5, data=other, target_modules="all")


def test_macs_and_speed_leave_lookups_dense_and_time_heads() -> None:
    model = nn.Sequential(nn.Embedding(400, 64), nn.Linear(64, 64))
    plan = lowrank.plan(model, 0.5, unit="macs", target_modules="all")
    assert [bool(entry.size) for entry in plan.entries] == [False, True]
    assert "a lookup takes no MACs" in plan.entries[0].reason
    _, report = lowrank.compress(
        model, 0.5, prefer="speed", target_modules="all", data=torch.arange(9), progress=False
    )
    assert "a factored lookup takes a product" in report.sites[0].reason
    _, report = lowrank.compress(
        make("gpt2"), 0.5, prefer="speed", target_modules=["wte"], data=tokens(), progress=False
    )
    assert "a factored lookup takes a product" not in report.sites[0].reason
