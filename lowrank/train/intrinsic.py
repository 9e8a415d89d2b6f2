"""Intrinsic dimension: in how few random directions a task can be learned (arXiv 1804.08838).

The network is trained in random subspaces (`Subspace`) of rising dimension; d₉₀ is the least one
whose score reaches 90 % of that of the full network, trained likewise. Scores are means over seeds
of the projection, and every dimension has the learning rate that serves it best. The curve says
more than d₉₀ alone, and is reported.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..plans.plan import versions
from ..plans.progress import Steps
from ..tables import aligned
from ..walk.checks import check_module
from .subspace import Kind, Subspace

Loss = Callable[[nn.Module, int], Tensor]
Score = Callable[[nn.Module], float]
RATES = (0.01, 0.1)
FULL_RATES = (1e-3, 1e-2)


@dataclass(frozen=True)
class Point:
    """One dimension.

    Attributes:
        scores: of each seed, at the learning rate with the best mean.
    """

    dimension: int
    scores: tuple[float, ...]
    rate: float

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class IntrinsicDimension:
    """The curve, by rising dimension.

    Attributes:
        full: of the network trained without a subspace; its dimension is the number of parameters.
        share: of the full score that has to be reached.
        projection: kind of the subspaces; " with scales" for SAID.
    """

    curve: tuple[Point, ...]
    full: Point
    share: float
    projection: str

    @property
    def reached(self) -> int | None:
        """d₉₀ for a share of 0.9: the least dimension that reaches it; None if none does."""
        return next((p.dimension for p in self.curve if self.reaches(p)), None)

    def reaches(self, point: Point) -> bool:
        return point.score >= self.share * self.full.score

    def rows(self) -> list[dict[str, str]]:
        """One row per dimension, as text."""
        return [
            {
                "dimension": f"{p.dimension:,}" + " (full)" * (p is self.full),
                "score": f"{p.score:.4f}",
                "least": f"{min(p.scores):.4f}", "most": f"{max(p.scores):.4f}",
                "rate": f"{p.rate:g}", "reached": "yes" if self.reaches(p) else "",
            }
            for p in (*self.curve, self.full)
        ]  # fmt: skip

    def to_json(self) -> str:
        """All figures."""
        body = {"format": "lowrank-intrinsic-dimension", "version": 1, **asdict(self),
                "reached": self.reached, "versions": versions()}  # fmt: skip
        return json.dumps(body, indent=1, allow_nan=False)

    def __str__(self) -> str:
        found = "none" if self.reached is None else f"{self.reached:,}"
        head = (
            f"intrinsic dimension at {self.share:g} of the full score: {found} of "
            f"{self.full.dimension:,} ({self.projection})"
        )
        return "\n".join([head, *aligned(self.rows())])


def intrinsic_dimension(
    model: nn.Module,
    loss: Loss,
    score: Score,
    dimensions: Sequence[int],
    *,
    share: float = 0.9,
    steps: int = 300,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = RATES,
    full_rates: Sequence[float] = FULL_RATES,
    projection: Kind = "dense",
    said: bool = False,
    bisections: int = 0,
    progress: bool = True,
) -> IntrinsicDimension:
    """Train copies of a model in random subspaces, by Adam, and score them.

    Args:
        model: at its initialisation, or trained before (for the dimension of fine-tuning);
            unchanged. All its trainable parameters are in the subspace.
        loss: the loss of a model at a step's number, which draws the batch: the same for the same
            number, so that runs differ by their subspace alone.
        score: of a trained model, higher is better, positive; the learning rate is chosen by it,
            so that it should not be of the test set where that matters.
        dimensions: to be tried, best at equal ratios; those of at least the model's size are
            refused.
        share: of the full score, in (0, 1].
        rates: learning rates of the coordinates; full_rates: of the full network.
        projection, said: as for `Subspace`.
        bisections: how often the interval in which the score is reached is halved, at its
            geometric mean.

    Raises:
        LowrankError: an option is out of range.
    """
    check_module(model)
    _check(dimensions, seeds, rates, full_rates, steps, share)

    def tried(dimension: int) -> Point:
        def run(seed: int, rate: float) -> float:
            return _trained(model, loss, score, steps, rate, dimension, projection, said, seed)

        return _best(dimension, seeds, rates, run, bar)

    runs = (len(dimensions) + bisections) * len(seeds) * len(rates) + len(full_rates)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with Steps(runs, "run", progress) as bar:
        full = _best(size, seeds[:1], full_rates,
                     lambda seed, rate: _trained(model, loss, score, steps, rate), bar)  # fmt: skip
        curve = {dimension: tried(dimension) for dimension in sorted(set(dimensions))}
        for _ in range(bisections):
            passed = [d for d, p in curve.items() if p.score >= share * full.score]
            above = min(passed, default=0)
            below = max((d for d in curve if d < above), default=0)
            middle = round(math.sqrt(below * above))
            if not below < middle < above:
                break
            curve[middle] = tried(middle)
    kind = projection + " with scales" * said
    return IntrinsicDimension(tuple(curve[d] for d in sorted(curve)), full, share, kind)


def _best(
    dimension: int,
    seeds: Sequence[int],
    rates: Sequence[float],
    run: Callable[[int, float], float],
    bar: Steps,
) -> Point:
    points = []
    for rate in rates:
        scores = []
        for seed in seeds:
            scores.append(run(seed, rate))
            bar.update()
        points.append(Point(dimension, tuple(scores), rate))
    return max(points, key=lambda point: point.score)


def _trained(
    model: nn.Module,
    loss: Loss,
    score: Score,
    steps: int,
    rate: float,
    dimension: int | None = None,
    projection: Kind = "dense",
    said: bool = False,
    seed: int = 0,
) -> float:
    """The score after training a copy, in a subspace or, without a dimension, whole."""
    one = copy.deepcopy(model)
    optimizer = torch.optim.Adam([p for p in one.parameters() if p.requires_grad], lr=rate)
    subspace = None
    if dimension is not None:
        subspace = Subspace(one, optimizer, dimension=dimension, projection=projection, said=said,
                            norms="projected", seed=seed)  # fmt: skip
    for step in range(steps):
        optimizer.zero_grad()
        loss(one, step).backward()
        if subspace is not None:
            subspace.before_step()
        optimizer.step()
        if subspace is not None:
            subspace.after_step()
    with torch.no_grad():
        return float(score(one))


def _check(
    dimensions: Sequence[int],
    seeds: Sequence[int],
    rates: Sequence[float],
    full_rates: Sequence[float],
    steps: int,
    share: float,
) -> None:
    given: dict[str, Sequence[Any]] = {
        "dimensions": dimensions, "seeds": seeds, "rates": rates, "full_rates": full_rates
    }  # fmt: skip
    for name, values in given.items():
        if not len(values):
            raise LowrankError(f"{name} must hold at least one number")
    if steps < 1:
        raise LowrankError(f"steps must be at least 1, got {steps}")
    if not 0 < share <= 1:
        raise LowrankError(f"share of the full score must be in (0, 1], got {share}")
