"""Nothing hangs on what a method or policy is called; what judges does so on rows of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.api.deciding import decide
from lowrank.api.request import Request
from lowrank.methods import Auto, TwoSided
from lowrank.policies import LossAware, Uniform
from lowrank.types import Allocation, Budget, Curve, Method, Probe, Site, Statistics
from lowrank.walk.sites import find_sites
from tests import zoo


@dataclass(frozen=True)
class Mine(TwoSided):
    """The registry's method as somebody else would ship it."""

    @property
    def name(self) -> str:
        return "mine"

    def curve(self, site: Site, stats: Statistics) -> Curve:
        curve = super().curve(site, stats)
        named = (o if o.dense else replace(o, method="mine") for o in curve.options)
        return replace(curve, options=tuple(named))

    def for_kind(self, kind: str) -> Method:
        return self if kind == "linear" else super().for_kind(kind)


def rows(count: int = 48) -> Tensor:
    return torch.randint(2, 60, (count, 12), generator=torch.Generator().manual_seed(0))


def state(model: nn.Module) -> dict[str, bytes]:
    return {k: v.contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("effort", [None, "fast"])
def test_a_method_under_another_name_gives_the_same_bytes(effort: str | None) -> None:
    """By its name the refit once knew that outputs are weighed."""
    results = []
    for method in ("two-sided", Mine()):
        small, report = lowrank.compress(
            zoo.make("llama"), 0.5, method=method, data=rows(), effort=effort, progress=False
        )
        results.append((state(small), [(s.measured, s.predicted) for s in report.sites]))
        assert report.plan.method == ("two-sided" if isinstance(method, str) else "mine")
    assert results[0] == results[1]


def test_a_policy_is_what_it_does_not_what_it_is_called() -> None:
    models = []
    for policy in ("lossaware", LossAware()):
        request = Request(0.5, policy=policy, data=rows(), method="whitened", progress=False)
        model = zoo.make("llama")
        decision = decide(model, request, find_sites(model))
        assert decision.calibration is not None
        held = torch.cat(list(decision.calibration.held_out))  # type: ignore[misc]
        assert torch.equal(held, rows()[-6:])  # an eighth
        models.append(decision.plan.entries)
    assert models[0] == models[1]


class Seen:
    """Notes the rows that statistics are taken from, and those that judge."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lowrank.recover import workbench

        plain = workbench.Workbench.__init__
        self.fitted: list[Tensor] = []
        self.judged: list[Tensor] = []

        def init(bench: Any, model: Any, calibration: Any, *args: Any) -> None:
            plain(bench, model, calibration, *args)
            self.fitted += list(calibration.batches)
            self.judged += list(bench.judge.batches)

        monkeypatch.setattr(workbench.Workbench, "__init__", init)


ONE = {"target_modules": ["layers.1.self_attn.k_proj"]}  # comparing all forms takes its time


class Asks:
    """A plain callable: it does not say that it never judges."""

    def __call__(self, curves: Sequence[Curve], budget: Budget, probe: Probe | None) -> Allocation:
        chosen = Uniform()(curves, budget)
        assert probe is not None
        probe(chosen)
        return chosen


@pytest.mark.parametrize(
    "asked",
    [{"method": "auto", **ONE}, {"method": Auto(), **ONE}, {"policy": "lossaware"},
     {"policy": Asks()}, {"effort": "fast"}],
    ids=["auto", "Auto()", "lossaware", "callable", "effort"],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["plan", "compress", "sweep"])
def test_what_is_compared_is_judged_on_rows_that_no_statistic_saw(
    asked: dict[str, Any], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    size: Any = [0.6] if verb == "sweep" else 0.6
    getattr(lowrank, verb)(zoo.make("llama"), size, data=rows(), progress=False, **asked)
    fitted, judged = torch.cat(seen.fitted).tolist(), torch.cat(seen.judged).tolist()
    assert len(judged) == 6
    assert not {tuple(row) for row in fitted} & {tuple(row) for row in judged}


def test_what_compares_nothing_sees_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama")
    for asked in ({}, {"policy": "uniform"}, {"policy": Uniform()}, {"method": "whitened"}):
        lean = copy.deepcopy(model)
        request = Request(0.6, data=rows(), progress=False, **asked)
        decision = decide(lean, request, find_sites(lean))
        assert decision.calibration is not None
        assert decision.calibration.held_out == ()
