"""Ranks by their effect on the model's predictions, checked against uniform ranks.

Minimises Σ error under the budget, dense options included. Errors must be comparable across sites:
in the norms "fisher" and "kl" they are, as second-order estimates of the KL to the dense model
(IO-SVD, OBD-LLM, LEMS). Other norms are scaled by measured KL, one site at a time; without a probe
they are not comparable, and ranks stay uniform. Far from the dense model second-order estimates
fail. The probe therefore compares the result with uniform ranks, and with those of the least sum of
relative errors (relative to each site's own energy, which works on convolutional networks:
benchmarks/results); the best one is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LowrankError
from ..types import Allocation, Budget, Curve, Option, Probe
from . import knapsack
from .common import measured, spent
from .uniform import Uniform

COMPARABLE = frozenset({"fisher", "kl"})
MOST = 1e6  # nats; an infinite KL times an error of zero would be NaN


@dataclass(frozen=True)
class LossAware:
    """The allocation of least estimated KL under the budget; see above.

    Attributes:
        share: of its own cost, to which a site alone is compressed to measure its KL, in (0, 1).
        floor: the least share of its uniform cost that any site keeps, in [0, 1).
    """

    share: float = 0.7
    floor: float = 0.0
    judges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("floor", self.floor)):
            if not 0 <= value < 1 or (name == "share" and value == 0):
                raise LowrankError(f"{name} of lossaware must be in (0, 1), got {value}")

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        uniform = Uniform()(curves, budget)
        curves, fixed = _of_one_norm(curves, uniform)
        budget = replace(budget, limit=budget.limit - spent(fixed.values(), budget.unit))
        weights = None
        if curves[0].norm not in COMPARABLE:
            if probe is None:
                return uniform
            dense = {curve.sites: curve.dense for curve in curves} | fixed
            weights = {
                c.sites: _nats_per_error(c, dense, budget, probe, self.share) for c in curves
            }
        floors = {c.sites: int(self.floor * uniform[c.sites].cost.of(budget.unit)) for c in curves}
        best = knapsack.solve(curves, budget, weights=weights, floors=floors).choice | fixed
        if probe is None:
            return best
        shares = {curve.sites: 1 / max(curve.total, sys.float_info.min) for curve in curves}
        relative = knapsack.solve(curves, budget, weights=shares, floors=floors).choice | fixed
        candidates = [best, uniform, relative]
        distinct = [one for i, one in enumerate(candidates) if one not in candidates[:i]]
        if len(distinct) == 1:
            return distinct[0]
        values = measured(probe, distinct)
        return distinct[values.index(min(values))]


def _of_one_norm(
    curves: Sequence[Curve], uniform: Allocation
) -> tuple[list[Curve], dict[tuple[str, ...], Option]]:
    """The curves of the norm in which most of the weights are measured, and uniform options for
    the others, such as those of layers that no data reached: their errors cannot be added."""
    sizes: dict[str, int] = {}
    for curve in curves:
        sizes[curve.norm] = sizes.get(curve.norm, 0) + curve.dense.cost.params
    norm = max(sizes, key=sizes.__getitem__)
    fixed = {curve.sites: uniform[curve.sites] for curve in curves if curve.norm != norm}
    return [curve for curve in curves if curve.norm == norm], fixed


def _nats_per_error(
    curve: Curve, dense: Allocation, budget: Budget, probe: Probe, share: float
) -> float:
    """Nats of KL per unit of this curve's error, measured with all other sites dense."""
    limit = share * curve.dense.cost.of(budget.unit)
    fitting = [i for i, cost in enumerate(curve.costs(budget.unit)[:-1]) if cost <= limit]
    option = curve.options[fitting[-1] if fitting else 0]
    if option.dense or option.error <= 0:
        return 1.0
    return min(max(probe({**dense, curve.sites: option}), 0.0), MOST) / option.error
