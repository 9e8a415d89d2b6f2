"""sweep: one pass and one decomposition for all ratios, the model as before, a cache that knows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Recovery
from lowrank.methods import whitened
from tests import zoo

RATIOS = [0.8, 0.6]


def rows(seed: int = 0) -> list[torch.Tensor]:
    return [torch.randint(2, 60, (8, 12), generator=torch.Generator().manual_seed(seed))] * 2


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.llama().eval()


class Counted:
    """How often a model is run and a whitened weight decomposed."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = self.curves = 0
        model.register_forward_pre_hook(self._run)
        plain = whitened.Whitened.curve

        def curve(*args):
            self.curves += 1
            return plain(*args)

        monkeypatch.setattr(whitened.Whitened, "curve", curve)

    def _run(self, *_args: object) -> None:
        self.runs += 1


WAYS: dict[str, dict[str, Any]] = {
    "closed": {},
    "judging policy": {"method": "two-sided", "policy": "lossaware"},
    "forms": {"method": "auto", "target_modules": ["1.self_attn.k_proj"]},
    "effort": {"effort": Recovery()},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_point_is_what_compress_gives_byte_for_byte(model: nn.Module, way: str) -> None:
    """From the same data, which nobody calibrated on before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swept = lowrank.sweep(model, RATIOS, data=rows(), progress=False, **WAYS[way])
    assert [point.ratio for point in swept.points] == [0.8, 0.6]
    held = swept.calibration.held_out
    assert bool(held) == (way != "closed") == (not swept.judged_on_seen)
    for point in swept.points:
        lean, report = lowrank.compress(
            model, point.ratio, data=rows(), copy=True, progress=False, **WAYS[way]
        )
        assert report.plan == point.plan
        judged_on = list(held) or list(swept.calibration.batches)
        assert point.kl == lowrank.kl(lean, model, judged_on)
        assert report.achieved == point.report.achieved
        same = lowrank.apply(model, point.plan, data=swept.calibration, copy=True, progress=False)
        assert all(torch.equal(v, same[0].state_dict()[k]) for k, v in lean.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(isinstance(m, lowrank.nn.LowRankLinear) for m in model.modules())


def test_the_model_is_decomposed_once_for_all_ratios(model, monkeypatch) -> None:
    count = Counted(model, monkeypatch)
    found = lowrank.sweep(model, [0.8], data=rows(), progress=False)
    once, runs = count.curves, count.runs
    assert once == 14  # two blocks of seven layers
    lowrank.sweep(model, [0.9, 0.7, 0.5], data=found.calibration, progress=False)
    assert count.curves == once
    # No statistics again: students are not this object, and the dense model predicts once.
    assert count.runs - runs == len(found.calibration.batches)
    count.curves = 0
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    lowrank.sweep(model, [0.7], data=found.calibration, progress=False)
    assert count.curves == 1  # other weights, other spectrum


def test_recovery_trains_copies_of_the_norms(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    effort = Recovery(block_steps=3, distill_steps=3)
    found = lowrank.sweep(model, [0.6], data=rows(), effort=effort, progress=False)
    assert any("distilled" in note for note in found.points[0].report.notes)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_cache_spares_the_second_day(model, monkeypatch, tmp_path: Path) -> None:
    count, cache = Counted(model, monkeypatch), tmp_path / "seen.safetensors"
    first = lowrank.sweep(model, RATIOS, data=rows(), cache=cache, progress=False)
    count.runs = count.curves = 0
    second = lowrank.sweep(model, RATIOS, data=rows(), cache=cache, progress=False)
    assert count.curves == 0
    assert count.runs == len(first.calibration.batches)  # judging alone
    for one, other in zip(first.points, second.points, strict=True):
        assert one.plan == other.plan
        assert one.kl == other.kl
    for data in (rows(seed=1), None):
        with pytest.raises(LowrankError, match="made from other data"):
            lowrank.sweep(model, RATIOS, data=data, cache=cache, progress=False)
    other = zoo.llama().eval()
    with pytest.raises(LowrankError, match="another model"):
        lowrank.sweep(other, RATIOS, data=rows(), cache=cache, progress=False)


def test_the_gradients_are_kept_too(model, tmp_path: Path) -> None:
    cache = tmp_path / "seen.safetensors"
    ways = {"method": "two-sided", "policy": "lossaware", "cache": cache, "progress": False}
    first = lowrank.sweep(model, RATIOS, data=rows(), **ways)
    second = lowrank.sweep(model, RATIOS, data=rows(), **ways)
    assert [p.plan for p in first.points] == [p.plan for p in second.points]
    seen = second.calibration
    q, k = (seen.statistics[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.gram is k.gram  # what was one tensor is one again
    assert q.out_gram is not None
    assert q.out_gram is not k.out_gram


def test_self_written_text_is_recognised(model, tmp_path: Path) -> None:
    cache = tmp_path / "seen.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank.calibration.self_written, "COUNT", 8)
        first = lowrank.sweep(model, [0.6], cache=cache, progress=False)
        again = lowrank.sweep(model, [0.6], cache=cache, progress=False)
        assert first.points[0].plan == again.points[0].plan
        assert (first.judged_rows, first.judged_on_seen) == (1, False)
        with pytest.raises(LowrankError, match="other data"):
            lowrank.sweep(model, [0.6], cache=cache, seed=1, progress=False)


def test_the_front_leaves_out_what_is_beaten(model: nn.Module) -> None:
    found = lowrank.sweep(model, [0.9, 0.6, 0.3], data=rows(), progress=False)
    losses = {p.ratio: p.kl for p in found.points}
    front = [p.ratio for p in found.front()]
    assert front[0] == 0.3  # the smallest is never beaten in size
    assert all(losses[a] > losses[b] for a, b in itertools.pairwise(front))
    said = str(found)
    assert said.count("\n") == 4
    assert said.count("*") == len(front)
    body = json.loads(found.to_json())
    assert [p["ratio"] for p in body["points"]] == [0.9, 0.6, 0.3]
    assert found.triples()[0][0] == "whitened"


def test_without_data_nothing_is_judged() -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    found = lowrank.sweep(net, RATIOS, progress=False)
    assert [p.kl for p in found.points] == [None, None]
    assert len(found.front()) == 2
    judged = lowrank.sweep(net, RATIOS, judge=[torch.randn(4, 24)], progress=False)
    assert all(p.kl is not None and p.kl > 0 for p in judged.points)
    assert judged.judged_rows == 4


@pytest.mark.parametrize("ratios", [[], [0.8, 0.8], 0.8, "0.8", [0.8, "0.6"], [1.5], [True]])
def test_bad_ratios_are_refused(model: nn.Module, ratios: object) -> None:
    with pytest.raises(LowrankError, match="ratio"):
        lowrank.sweep(model, ratios, data=rows(), progress=False)
