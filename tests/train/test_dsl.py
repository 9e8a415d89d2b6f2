"""Dynamic sparse learning: the budget, what moves and when, and what is stored at the end."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.nn import LowRankMaskedLinear
from lowrank.train import DSL
from lowrank.train.dsl import KEPT, entries_of, moving
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, batches, data, run, sgd
from tests.train.test_nm import Overflow


def made(**options: Any) -> tuple[Any, Any, DSL]:
    model = Net()
    live = sgd(model)
    return model, live, DSL(model, live, **{"ratio": 0.5, "steps": 40, "every": 5, **options})


def test_the_share_that_moves_falls_by_a_cosine() -> None:
    shares = [moving(step, 100, 10, 0.3) for step in range(1, 131)]
    assert [step for step, share in enumerate(shares, 1) if share] == [*range(10, 100, 10)]
    assert moving(50, 100, 10, 0.3) == pytest.approx(0.15)
    assert moving(10, 100, 10, 0.3) == pytest.approx(0.15 * (1 + math.cos(math.pi / 10)))


def test_the_least_go_and_the_steepest_come() -> None:
    """By hand, in numpy's terms: after the step, by the gradient that the step was made with."""
    model, live, controller = made(share=0.4, every=1, steps=2)
    weights = {n: getattr(model, n).weight for n in ("first", "second")}
    before = {n: getattr(model, n).get_buffer(KEPT).clone() for n in weights}
    counts = controller.counts
    x, y = next(batches(1))
    live.zero_grad()
    model(x, y)["loss"].backward()
    slopes = {n: w.grad.abs().clone() for n, w in weights.items()}
    controller.before_step()
    assert all(bool((w.grad[~before[n]] == 0).all()) for n, w in weights.items())
    live.step()
    stepped = {n: w.detach() * before[n] for n, w in weights.items()}
    controller.after_step()
    left, freed = {}, 0
    for name, weight in stepped.items():
        gone = round(moving(1, 2, 1, 0.4) * counts[name])
        least = weight[before[name]].abs().sort().values[gone]
        left[name] = before[name] & (weight.abs() >= least)
        freed += gone
    free = torch.cat([slopes[n][~left[n]] for n in weights])
    steepest = free.sort(descending=True).values[freed - 1]
    for name, weight in weights.items():
        want = left[name] | (slopes[name] >= steepest)
        assert torch.equal(getattr(model, name).get_buffer(KEPT), want)
        assert torch.equal(weight.detach(), stepped[name] * want)
    assert sum(controller.counts.values()) == sum(counts.values())
    assert controller.counts != counts  # density has moved between the layers


def test_what_does_not_count_stays_zero_under_momentum_and_decay() -> None:
    model = Net()
    live = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    controller = DSL(model, live, ratio=0.5, steps=30, every=4)
    total = sum(controller.counts.values())

    def zeros(_: int) -> None:
        for layer in (model.first, model.second):
            assert bool((layer.weight[~layer.get_buffer(KEPT)] == 0).all())
        assert sum(controller.counts.values()) == total

    losses = run(model, live, controller, 50, each=zeros)
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])


def test_after_the_last_step_nothing_moves() -> None:
    model, live, controller = made(steps=20)
    run(model, live, controller, 20)
    masks = [getattr(model, n).get_buffer(KEPT).clone() for n in ("first", "second")]
    events = len(controller.history)
    run(model, live, controller, 40, start=20)
    after = [getattr(model, n).get_buffer(KEPT) for n in ("first", "second")]
    assert all(torch.equal(a, b) for a, b in zip(masks, after, strict=True))
    assert len(controller.history) == events
    moved = [h["step"] for h in controller.history if h["event"] == "move"]
    assert moved == [5, 5, 10, 10, 15, 15]


@pytest.mark.parametrize("steps", [0, 3, 40])
def test_finished_it_is_stored_as_entries_and_a_mask(steps: int, tmp_path: Path) -> None:
    """The same outputs, numbers within the ratio, one file, and the optimizer goes on."""
    model, live, controller = made(ratio=0.6, target_modules="all")
    run(model, live, controller, steps)
    x, _ = data()
    with torch.no_grad():
        before = model(x)
    counts, bias = controller.counts, model.first.bias
    assert controller.finish() is model
    check_same_parameters(live, model)
    torch.testing.assert_close(model(x).detach(), before)
    layers = [model.first, model.second]
    assert [type(layer) for layer in layers] == [LowRankMaskedLinear] * 2
    assert [layer.count for layer in layers] == list(counts.values())
    assert model.first.bias is bias
    assert sum(layer.cost().params for layer in layers) <= 0.6 * (12 * 16 + 16 * 10)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=3))
    torch.testing.assert_close(again(x), model(x))
    model(x).sum().backward()
    live.step()
    assert not torch.equal(model(x).detach(), before)


def test_a_layer_that_keeps_nearly_all_stays_dense() -> None:
    """The other pays for it: density is one budget."""
    model, _, controller = made(ratio=0.6)
    kept = model.first.get_buffer(KEPT)
    kept.fill_(True)
    matrix = model.first.weight.detach().clone()
    controller.finish()
    assert type(model.first) is nn.Linear
    assert torch.equal(model.first.weight, matrix)
    assert type(model.second) is LowRankMaskedLinear
    assert set(model.first.state_dict()) == {"weight", "bias"}
    stored = {h["site"]: h["storage"] for h in controller.history if h["event"] == "finish"}
    assert stored == {"first": "dense", "second": "lowrank-masked"}


def test_conv1d_of_transformers_is_turned() -> None:
    from tests.zoo import make

    gpt = make("gpt2")
    layer = gpt.transformer.h[0].mlp.c_fc  # (in, out)
    controller = DSL(gpt, sgd(gpt), ratio=0.5, steps=1, target_modules=["c_fc"])
    weight = layer.weight.detach().clone()
    assert 0.3 < float((weight != 0).float().mean()) < 0.5
    controller.finish()
    new = gpt.transformer.h[0].mlp.c_fc
    assert type(new) is LowRankMaskedLinear
    assert torch.equal(new.dense_weight(), weight.T)
    assert type(lowrank.to_dense(gpt).transformer.h[0].mlp.c_fc) is type(layer)


def test_a_step_skipped_for_another_layers_sake_moves_nothing() -> None:
    def trained(skipped: bool) -> dict[str, Tensor]:
        model = Net()
        optimizer = Overflow(sgd(model))
        controller = DSL(model, optimizer, ratio=0.5, steps=10, every=2)
        for step, (x, y) in enumerate(batches(9)):
            for skip in (True, False) if skipped and step in (1, 4) else (False,):
                before = copy.deepcopy(model.state_dict())
                optimizer.skip = skip
                optimizer.zero_grad()
                model(x, y)["loss"].backward()
                controller.before_step()
                optimizer.step()
                controller.after_step()
                after = model.state_dict()
                assert all(torch.equal(before[n], after[n]) for n in before) == skip
        return model.state_dict()

    a, b = trained(True), trained(False)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_detached_it_leaves_plain_layers_with_zeros() -> None:
    model, live, controller = made()
    run(model, live, controller, 12)  # new entries have moved away from zero
    counts = controller.counts
    controller.detach()
    assert set(model.state_dict()) == set(Net().state_dict())
    zeros = [int((getattr(model, n).weight == 0).sum()) for n in counts]
    assert [192 - counts["first"], 160 - counts["second"]] == zeros


def test_the_ratio_counts_the_factors_of_zeros() -> None:
    model, _, controller = made(ratio=0.5)
    assert entries_of(controller.attachment.sites, 0.5) == 176 - 28 - 26
    assert 176 - 28 - 26 - 2 <= sum(controller.counts.values()) <= 176 - 28 - 26
    size = model.first.weight.detach().abs()
    least = Net().first.weight.detach().abs().flatten().sort(descending=True).values
    assert float(size[size > 0].min()) == float(least[controller.counts["first"] - 1])
