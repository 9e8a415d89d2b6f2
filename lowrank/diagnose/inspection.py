"""`inspect`: effective rank of every layer, by its weight and by its outputs, and its latency."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import linalg
from ..calibration.batches import LENGTH, Data
from ..calibration.statistics import Calibration, calibrate, statistics_of
from ..measure.timing import paired_ms
from ..methods.common import low_rank_layer
from ..nn import Form, RoutedMLP
from ..plans.entry import break_even
from ..plans.plan import versions
from ..plans.progress import steps
from ..tables import aligned
from ..types import Option, Site
from ..walk import layouts
from ..walk.checks import check_model
from ..walk.parts import parts_apart
from ..walk.sites import ALL_LINEAR, Patterns, find_sites, select_sites
from ..walk.surgery import factored
from .spectrum import EMPTY, LayerSpectrum


@dataclass(frozen=True, eq=False)
class Inspected:
    """The figures of one layer.

    Attributes:
        shape: (out, in).
        params: parameters stored.
        weight: spectrum of W; None if it was not decomposed, for which `reason` says why.
        output: spectrum of W H^½, H = E[x xᵀ], whose energy is that of the outputs; None without
            data.
        reason: why the layer stays dense or was skipped; "" if it may be factored.
        rank: rank of an already factored layer, else None.
        input_shape: input shape at the first call, at which times were taken.
        dense_ms: median time of one call of the layer.
        factored_ms: the same for factors of the largest rank below break-even, timed alternately.
    """

    name: str
    shape: tuple[int, int]
    params: int
    weight: LayerSpectrum | None = None
    output: LayerSpectrum | None = None
    reason: str = ""
    rank: int | None = None
    input_shape: tuple[int, ...] | None = None
    dense_ms: float | None = None
    factored_ms: float | None = None

    @property
    def title(self) -> str:
        return self.name or "(root)"

    @property
    def break_even(self) -> int:
        """The smallest rank at which factors are no smaller than the weight."""
        return break_even(self.shape)

    @property
    def chosen(self) -> LayerSpectrum | None:
        """The spectrum to choose ranks by: of the outputs if known, else of the weight."""
        return self.output or self.weight

    def row(self) -> dict[str, str]:
        """A table row, as text: of the outputs where data reached the layer, else of W."""
        kept = self.params / (self.shape[0] * self.shape[1])
        return {
            "site": self.title,
            "shape": f"{self.shape[0]}x{self.shape[1]}",
            "rank": "" if self.rank is None else str(self.rank),
            "kept": "" if self.rank is None else f"{kept:.3f}",
            "even": "dense" if self.reason else str(self.break_even),
            **(EMPTY if self.chosen is None else self.chosen.row()),
            "eff W": "" if not (self.output and self.weight) else self.weight.row()["eff"],
            "ms": "" if self.dense_ms is None else f"{self.dense_ms:.3g}",
            "ms even": "" if self.factored_ms is None else f"{self.factored_ms:.3g}",
            "reason": self.reason,
        }


@dataclass(frozen=True, eq=False)
class Inspection:
    """The inspected layers, in the model's order.

    Attributes:
        tokens: number of input vectors behind the output spectra; 0 if the model was not run.
        timed: the timing conditions; "" without times.
    """

    sites: tuple[Inspected, ...]
    tokens: int
    timed: str

    def rows(self) -> list[dict[str, str]]:
        """One row per layer, as text."""
        return [site.row() for site in self.sites]

    def to_json(self) -> str:
        """All figures of W and of the outputs, without the spectra themselves."""
        body = {
            "format": "lowrank-inspection", "version": 1, "tokens": self.tokens,
            "timed": self.timed, "versions": versions(), "sites": [*map(_figures, self.sites)],
        }  # fmt: skip
        return json.dumps(body, indent=1, allow_nan=False)

    def __getitem__(self, name: str) -> Inspected:
        return next(site for site in self.sites if site.name == name)

    def __str__(self) -> str:
        of = f"outputs, {self.tokens:,} tokens" if self.tokens else "weights"
        return "\n".join([f"inspection of the {of}", *aligned(self.rows())])


@parts_apart
def inspect(
    model: nn.Module,
    data: Data | Calibration | None = None,
    *,
    tokenizer: Any = None,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    length: int = LENGTH,
    timing: bool = True,
    progress: bool = True,
) -> Inspection:
    """Effective and stable ranks, ranks at 90, 95 and 99 % energy, condition, break-even, times.

    Args:
        model: unchanged.
        data: as for `compress`; None does not run the model, and inspects W only.
        target_modules, exclude_modules: as for `compress`. By default every linear layer whose
            weight is accessible is decomposed, the output head too; otherwise only those named.
        timing: time the layers, at the input shapes that data shows.

    Raises:
        LowrankError: a pattern matches nothing, or the data is invalid.
    """
    check_model(model)
    chosen = select_sites(find_sites(model), model, target_modules, exclude_modules)
    named = exclude_modules is not None or target_modules != ALL_LINEAR
    calibration = None
    if data is not None:
        calibration = calibrate(model, data, tokenizer=tokenizer, length=length, progress=progress)
    sites = {site.name: site for site in chosen}
    already = factored(model)
    order = [name for name, _ in model.named_modules() if name in sites or name in already]
    inspected = [
        _inspected(sites[name], calibration, skip=named and bool(sites[name].reason), timing=timing)
        if name in sites
        else _factored(name, already[name])
        for name in steps(order, "layer", progress)
    ]
    timed = any(site.dense_ms is not None for site in inspected)
    threads = torch.get_num_threads()
    conditions = f"{threads} thread{'s' * (threads != 1)}, one call at the data's shape"
    return Inspection(
        tuple(inspected), 0 if calibration is None else calibration.tokens, conditions * timed
    )


def _inspected(
    site: Site, calibration: Calibration | None, *, skip: bool, timing: bool
) -> Inspected:
    def skipped(reason: str) -> Inspected:
        return Inspected(site.name, site.shape, site.cost.params, reason=reason)

    if skip or layouts.obstacle(site.module):
        return skipped(site.reason)
    if not layouts.is_finite(site.module):
        return skipped("the weight holds NaN or Inf")
    matrix = layouts.matrix(site.module)
    weight, output, reason = LayerSpectrum(linalg.energies(matrix).cpu()), None, site.reason
    gram = statistics_of(site, calibration).gram
    if gram is not None:
        output = LayerSpectrum(linalg.energies(matrix, gram).cpu())
    elif calibration is not None:
        reason = reason or "the data did not reach it"
    shape = None if calibration is None else calibration.observation.shapes.get(site.name)
    times = _times(site, shape) if timing and shape is not None else (None, None)
    return Inspected(
        site.name, site.shape, site.cost.params, weight, output, reason, None, shape, *times
    )


def _factored(name: str, module: Form) -> Inspected:
    if isinstance(module, RoutedMLP):
        sides = (module.neurons, module.in_features)
        return Inspected(name, sides, module.cost().params, reason="an MLP in experts")
    out_features, in_features = module.dense_weight().shape
    rank = module.spec().get("rank")
    return Inspected(name, (out_features, in_features), module.cost().params, rank=rank)


def _times(site: Site, shape: tuple[int, ...]) -> tuple[float, float | None]:
    """ms of the layer, and of factors just below break-even (None if that is rank 0)."""
    weight = layouts.matrix(site.module)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(shape, generator=generator).to(weight)
    rank = break_even(site.shape) - 1
    dense = site.module
    if rank < 1:
        return paired_ms(lambda: dense(example), lambda: None)[0], None
    out_features, in_features = site.shape
    up, down = (torch.randn(s, generator=generator).to(weight)
                for s in ((out_features, rank), (rank, in_features)))  # fmt: skip
    option = Option("random", (rank,), "factors", site.cost, 0.0)
    factors = low_rank_layer(dense, down, up, option)
    return paired_ms(lambda: dense(example), lambda: factors(example))


def _figures(site: Inspected) -> dict[str, Any]:
    return {
        "site": site.name,
        "shape": list(site.shape),
        "params": site.params,
        "break_even": site.break_even,
        "rank": site.rank,
        "weight": None if site.weight is None else site.weight.figures(),
        "output": None if site.output is None else site.output.figures(),
        "input_shape": None if site.input_shape is None else list(site.input_shape),
        "dense_ms": site.dense_ms,
        "factored_ms": site.factored_ms,
        "reason": site.reason,
    }
