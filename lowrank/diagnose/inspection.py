"""`inspect`: for every layer, how low its rank is, as a matrix and on its inputs, and its time."""

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
from ..nn import Form
from ..plans.entry import break_even
from ..plans.plan import versions
from ..tables import aligned
from ..types import Option, Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns, check_model, find_sites, select_sites
from ..walk.surgery import factored
from .spectrum import EMPTY, LayerSpectrum


@dataclass(frozen=True, eq=False)
class Inspected:
    """One layer.

    Attributes:
        shape: (out, in).
        params: numbers stored.
        weight: spectrum of W; None where it was not decomposed, and `reason` says why.
        output: spectrum of W H^½, H = E[x xᵀ]: the energy of the outputs; None without data.
        reason: why the layer stays dense, or was not looked at; "" if it may be factored.
        rank: of a layer that is factored already, else None.
        input_shape: of the input at the first call; what was timed.
        dense_ms: median time of one call of the layer as it is, at that shape.
        factored_ms: the same of factors of the largest rank that saves parameters, taken in turn.
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
        """The least rank at which factors are no smaller than the matrix."""
        return break_even(self.shape)

    @property
    def chosen(self) -> LayerSpectrum | None:
        """What ranks should be chosen by: the outputs' spectrum where there is one."""
        return self.output or self.weight

    def row(self) -> dict[str, str]:
        """As text; the figures are of the outputs where data reached the layer, else of W."""
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
    """Every layer that was considered, in the model's order.

    Attributes:
        tokens: input vectors that the spectra of outputs rest on; 0: the model was never run.
        timed: under which conditions times were taken, "" if none were.
    """

    sites: tuple[Inspected, ...]
    tokens: int
    timed: str

    def rows(self) -> list[dict[str, str]]:
        """One row a layer, as text."""
        return [site.row() for site in self.sites]

    def to_json(self) -> str:
        """All figures, of W and of the outputs; not the spectra themselves."""
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
    """Effective and stable ranks, ranks at 90, 95 and 99 % energy, condition, break-even, time.

    Args:
        model: is not changed.
        data: as for `compress`; None never runs the model, and gives the spectra of W alone.
        target_modules, exclude_modules: as for `compress`. By default every linear layer that can
            be read is decomposed, the output head too; otherwise only those that are named.
        timing: take times, where data shows at which shape.

    Raises:
        LowrankError: a pattern matches nothing, or the data is of no use.
    """
    check_model(model)
    chosen = select_sites(find_sites(model), model, target_modules, exclude_modules)
    named = exclude_modules is not None or target_modules != ALL_LINEAR
    calibration = None
    if data is not None:
        calibration = calibrate(model, data, tokenizer=tokenizer, length=length, progress=progress)
    sites = {site.name: site for site in chosen}
    done = factored(model)
    order = [name for name, _ in model.named_modules() if name in sites or name in done]
    looked = [
        _inspected(sites[name], calibration, skip=named and bool(sites[name].reason), timing=timing)
        if name in sites
        else _already(name, done[name])
        for name in _progress(order, progress)
    ]
    timed = any(site.dense_ms is not None for site in looked)
    threads = torch.get_num_threads()
    conditions = f"{threads} thread{'s' * (threads != 1)}, one call at the data's shape"
    return Inspection(
        tuple(looked), 0 if calibration is None else calibration.tokens, conditions * timed
    )


def _inspected(
    site: Site, calibration: Calibration | None, *, skip: bool, timing: bool
) -> Inspected:
    def told(reason: str) -> Inspected:
        return Inspected(site.name, site.shape, site.cost.params, reason=reason)

    if skip or layouts.obstacle(site.module):
        return told(site.reason)
    if not layouts.is_finite(site.module):
        return told("the weight holds NaN or Inf")
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


def _already(name: str, module: Form) -> Inspected:
    out_features, in_features = module.dense_weight().shape
    rank = module.spec().get("rank")
    return Inspected(name, (out_features, in_features), module.cost().params, rank=rank)


def _times(site: Site, shape: tuple[int, ...]) -> tuple[float, float | None]:
    """ms of the layer, and of factors just below break-even where there is such a rank."""
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


def _progress(names: list[str], shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(names, "decompose", delay=2, disable=not shown, leave=False)
