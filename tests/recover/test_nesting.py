"""Layers cut for a step: as `at_rank` would cut them, and whole again afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Recovery
from lowrank.recover import blocks
from lowrank.recover.nesting import Nesting
from lowrank.recover.training import Training
from tests.zoo import llama, make, refused, tokens, unchanged

ROWS = tokens(12)


def compressed(model: nn.Module, **options: Any) -> Any:
    asked: dict[str, Any] = {"policy": "uniform", "data": [ROWS], "copy": True, "progress": False}
    return lowrank.compress(model, 0.8, **asked | options)[0]


def forms() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    convs = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    images = torch.randn(4, 8, 9, 9)
    tied = llama(tie_word_embeddings=True).eval()
    channels = lowrank.compress(convs, rank=10, data=None, copy=True, progress=False)[0]
    return {
        "plain": (compressed(make("llama")), ROWS),
        "shared": (compressed(make("llama"), method="basis-sharing"), ROWS),
        "table": (compressed(tied, target_modules="all"), ROWS),
        "conv": (channels, images),
    }


@pytest.mark.parametrize("form", ["plain", "shared", "table", "conv"])
def test_a_cut_layer_computes_what_the_smaller_one_does(form: str) -> None:
    model, x = forms()[form]
    nesting, seen = Nesting(model, 0.4), []

    def run() -> float:
        output = model(x)
        seen.append(getattr(output, "logits", output).detach())
        return 1.0

    with unchanged(model):
        nesting.mean_of(run)
    assert nesting.ratios[0] == 0.4
    for ratio, output in zip(nesting.ratios[:-1], seen[:-1], strict=True):
        cut = lowrank.at_rank(model, ratio, copy=True)[0](x)
        torch.testing.assert_close(output, getattr(cut, "logits", cut), rtol=1e-4, atol=1e-5)
    whole = model(x)
    torch.testing.assert_close(seen[-1], getattr(whole, "logits", whole))
    assert not torch.allclose(seen[0], seen[-1], atol=1e-3)


def test_a_step_is_of_one_ratio_that_is_drawn_and_a_state_is_judged_at_all() -> None:
    model = compressed(make("llama"))
    layer = model.model.layers[0].mlp.up_proj
    nesting, ranks = Nesting(model, 0.4), []

    def loss(batch: int) -> Tensor:
        layer.zero_grad()
        output = layer(torch.randn(3, 32)).square().sum()
        if torch.is_grad_enabled():
            output.backward()
            reached = layer.up.weight.grad.abs().sum(0) > 0
            ranks.append(int(reached.sum()))
            assert bool(reached[: ranks[-1]].all())  # the first ones
        return torch.tensor(2.0 + batch)

    with nesting.over(loss) as nested:
        steps = [float(nested(0)) for _ in range(40)]
        with torch.no_grad():
            assert float(nested(1)) == pytest.approx(3.0)
    assert steps == [pytest.approx(math.log(2))] * 40
    assert (min(ranks), max(ranks)) == (7, 14) or len(set(ranks)) > 5
    assert max(ranks) <= layer.rank


@pytest.mark.parametrize("seed", range(4))
def test_few_steps_cover_the_range_of_ratios(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nesting, cuts = Nesting(compressed(make("llama")), 0.4, seed=seed), []
    monkeypatch.setattr(nesting, "_cut_to", cuts.append)
    with nesting.over(lambda batch: torch.ones(())) as nested:
        for step in range(10):
            nested(step)
    most = nesting.ratios[-1]
    shares = sorted((ratio - 0.4) / (most - 0.4) for ratio in cuts)
    drawn = [math.acos(1 - 2 * share) / math.pi for share in shares]  # evenly in [0, 1]
    gaps = [b - a for a, b in zip([0.0, *drawn], [*drawn, 1.0], strict=True)]
    assert max(gaps) < 0.2  # with ten draws at random 0.29 on the average


def test_steps_over_ratios_are_half_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make("llama")
    student, rates = compressed(teacher), []
    batches = [{"input_ids": rows} for rows in ROWS.split(6)]
    monkeypatch.setattr(blocks, "fit_within", lambda *given, **_: rates.append(given[4].rate))
    monkeypatch.setattr(blocks, "mean_of", lambda *_: 0.5)
    for nesting in (None, Nesting(student, 0.4)):
        blocks.distill(teacher, student, batches, [], Training(steps=4), nesting=nesting)
    assert rates[1] == pytest.approx(rates[0] / 2)


def test_the_mean_over_ratios_is_geometric() -> None:
    values = iter([1.0, 10.0, 100.0])
    assert Nesting(compressed(make("llama")), 0.4).mean_of(lambda: next(values)) == pytest.approx(
        10
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [({"nested": 1.5, "distill_steps": 4}, r"in \(0, 1\), got 1\.5"),
     ({"nested": 0.4}, "give distill_steps"),
     ({"nested": 0.4, "distill_steps": 4, "block_steps": 4}, "and no block_steps")],
)  # fmt: skip
def test_a_recovery_that_cannot_be(options: Any, said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        Recovery(**options)


def test_what_cannot_be_cut_is_refused_before_the_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.recover.run._refit", lambda *_: pytest.fail("it was refitted"))
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()).eval()
    asked: dict[str, Any] = {"data": [torch.randn(8, 8, 7, 7)], "target_modules": "all"}
    recovery = Recovery(distill_steps=4, nested=0.4)
    told = refused(net, 0.8, method="whitened", effort=recovery, **asked)
    assert "no layer can be cut to a smaller rank: a " in told


@pytest.mark.parametrize(
    ("options", "said"),
    [({"storage": "pivoted"}, "with storage='pivoted' does not keep apart"),
     ({"method": "blast"}, "method 'blast' with storage=None does not keep apart"),
     ({"ratio": 0.4}, "is the largest to be served")],
)  # fmt: skip
def test_requests_that_could_not_be_cut(options: Any, said: str) -> None:
    recovery = Recovery(distill_steps=4, nested=0.5)
    asked: dict[str, Any] = {"ratio": 0.8, "data": [ROWS], "effort": recovery}
    assert said in refused(make("llama"), **asked | options)
