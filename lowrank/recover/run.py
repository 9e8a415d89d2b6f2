"""What follows the choice of ranks: sequential refit, block refit, distillation.

All of it happens on a twin of the model, so that the model itself is dense and untouched until
everything has succeeded, and serves as teacher meanwhile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import linalg
from ..calibration import self_written as selfwritten
from ..calibration.batches import Batch, rebatched
from ..calibration.running import mask_of
from ..calibration.statistics import Calibration
from ..errors import LowrankError
from ..measure.eval import NotFinite, judged
from ..methods import refitted_form, refitted_layer
from ..nn import (
    OWN_FORMS,
    ChannelConv,
    LowRankLinear,
    PivotedLinear,
    SpatialConv,
    TuckerConv,
    pivot_layer,
)
from ..plans.entry import Entry
from ..types import Method, Site
from ..walk import layouts
from ..walk.surgery import module_at, put, twin
from .batchnorm import batch_norms, bn_recalibrate
from .blocks import distill, refit_block
from .chain import Chain
from .copies import Pairs, factors_in, own_buffers, own_vectors
from .recovery import Recovery
from .sequential import Moments, sequential
from .training import Trained, Training

HELD_OUT = 8  # one row in so many is kept for judging
ROUNDING = 1e-6  # a KL that logits of 32 bits cannot tell from none
REFITTED = LowRankLinear | PivotedLinear | ChannelConv | TuckerConv | SpatialConv  # closed form
NOISE = 1e-6  # of a mean square: what sums of fp32 products may be off by


@dataclass
class Recovered:
    """What came of it.

    Attributes:
        modules: the new layer of every site, by its name.
        vectors: norms and biases that were trained: the model's own, and the trained copy.
        notes: for the report.
        broken: whether predictions on held-out rows hold NaN or Inf, while the dense model's do
            not.
    """

    modules: dict[str, nn.Module]
    vectors: Pairs = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    broken: bool = False


def recover(
    model: nn.Module,
    work: Sequence[tuple[Site, Entry, nn.Module]],
    seen: Calibration | None,
    recovery: Recovery,
    method_of: Callable[[Entry], Method],
    *,
    damp: float = linalg.DAMP,
    seed: int = 0,
    progress: bool = True,
) -> Recovered:
    """Refit and train the new layers on a twin; `model` is not changed.

    Args:
        work: sites of the model, their entries and the layers made from dense statistics.
        method_of: makes a form of its own anew.

    Raises:
        LowrankError: there are no batches to run, or a chain cannot be run block by block.
    """
    if seen is None or callable(seen.batches):
        raise LowrankError("recovery runs the model on batches: pass data=… that holds them")
    if any(site.name == "" for site, _, _ in work):
        return Recovered({s.name: m for s, _, m in work}, notes=(ROOT,))
    batches = rebatched(seen.batches, recovery.rows)
    fitted = len(batches)  # what is held out runs along, and nothing is fitted to it
    batches += rebatched(seen.held_out, recovery.rows)
    job = _Job(model, seen, recovery, method_of, batches, fitted, damp, seed, progress)
    return job.run(work)


ROOT = "the model is one layer: there is nothing to refit it to"


@dataclass
class _Job:
    """One run: its twin, and what is noted on the way."""

    model: nn.Module
    seen: Calibration
    recovery: Recovery
    method_of: Callable[[Entry], Method]
    batches: Sequence[Batch]
    fitted: int
    damp: float
    seed: int
    progress: bool
    vectors: Pairs = field(default_factory=dict)
    refitted: list[Trained] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    broken: bool = False

    def run(self, work: Sequence[tuple[Site, Entry, nn.Module]]) -> Recovered:
        self.student = twin(self.model)
        self.entries = {site.name: entry for site, entry, _ in work}
        self.built = {site.name: new for site, _, new in work}
        self.masks = [mask_of(batch) for batch in self.batches]
        refits = [s for s, e, new in work if isinstance(new, REFITTED) or e.storage in OWN_FORMS]
        called = set(self.seen.seen.order)
        refits = [s for s in refits if s.name in called and self._stats(s) and len(s.modules) == 1]
        for site, _, new in work:
            if site not in refits:
                put(self.student, site, new)
        self._sequential(refits)
        self._batchnorm()
        self._distill()
        for site in refits:  # training happens on plain factors: they are better conditioned
            self._store(site)
        self._judge(work)
        found = {site.name: module_at(self.student, site.name) for site, _, _ in work}
        return Recovered(found, self.vectors, tuple(self.said), self.broken)

    def _stats(self, site: Site) -> bool:
        return self.seen.statistics[site.name].gram is not None

    def _sequential(self, sites: Sequence[Site]) -> None:
        blocks = {name for chain in self.seen.seen.chains for name in chain}
        steps = self.recovery.block_steps
        if steps and not blocks:
            self.said.append("the model has no chain of blocks: block refit was left out")
        bar = tqdm(total=len(blocks), desc="refit", delay=2, disable=not self.progress, leave=False)
        with bar:
            sequential(
                self.model,
                self.student,
                sites,
                self.seen.seen,
                self.batches,
                self._fit,
                counted=self.fitted,
                after_block=self._refit_block if steps else None,
                on_block=lambda name: _advance(bar, name),
            )
        if self.recovery.refit:
            self.said.append(f"refitted in closed form, layer by layer: {len(sites)}")
        if steps and blocks:
            kept = sum(each.kept for each in self.refitted)
            self.said.append(f"block refit: {kept} of {len(self.refitted)} blocks improved")

    def _fit(self, site: Site, moments: Moments) -> nn.Module:
        if not self.recovery.refit:
            return copy.deepcopy(self.built[site.name])
        weight, entry = layouts.matrix(site.module), self.entries[site.name]
        share = self.recovery.dense
        stats, bias = self.seen.statistics[site.name], layouts.bias(site.module)
        gram, cross = moments.gram, moments.cross
        least = NOISE * float(gram.diagonal().mean())
        mean = (1 - share) * moments.mean + share * moments.dense_mean
        if bias is not None:  # the bias takes the means, and the factors what varies
            gram = gram - torch.outer(moments.mean, moments.mean)
            cross = cross - torch.outer(moments.dense_mean, moments.mean)
        root = None
        if entry.method.startswith("two-sided") and stats.out_gram is not None:
            root = linalg.output_root(stats.out_gram, self.damp)
        mixed = (1 - share) * gram + share * cross
        if entry.storage in OWN_FORMS:
            way = self.method_of(entry)
            new = refitted_form(way, site.module, entry.option(), gram, mixed, least=least)
        else:
            new = refitted_layer(
                site.module, entry.size or (1,), entry.storage, gram, mixed, root=root,
                least=least, seed=self.seed,
            )  # fmt: skip
        if bias is not None:
            with torch.no_grad():
                exact = weight.detach().double() @ mean.to(weight.device)
                dense = new.dense_weight(torch.float64)
                new.bias.copy_(bias.double() + exact - dense @ moments.mean.to(dense.device))
        return cast(nn.Module, new)

    def _refit_block(self, lean: Chain, index: int, targets: list[Tensor]) -> None:
        block = module_at(self.student, lean.names[index])
        trained = [*factors_in(block), *own_vectors(block, self.vectors)]
        if not factors_in(block):
            return
        how = Training(self.recovery.block_steps, self.recovery.block_rate, seed=self.seed)
        try:
            came = refit_block(lean, index, targets, trained, self.masks, how, self.fitted)
        except LowrankError as error:
            raise LowrankError(f"{lean.names[index]}: {error}") from None
        self.refitted.append(came)

    def _store(self, site: Site) -> None:
        new = module_at(self.student, site.name)
        if self.entries[site.name].storage == "pivoted" and isinstance(new, LowRankLinear):
            put(self.student, site, pivot_layer(new))

    def _batchnorm(self) -> None:
        norms = batch_norms(self.student)
        if not self.recovery.batchnorm or not norms or callable(self.seen.batches):
            return
        own_buffers(norms.values(), ("running_mean", "running_var"), self.vectors)
        data, held = self.seen.batches, self._held()
        try:
            kept = bn_recalibrate(self.student, data, reference=self.model, held_out=held)
        except NotFinite:
            raise
        except LowrankError as error:  # no predictions to judge by
            self.said.append(f"batch norms were left as they are: {error}")
            return
        self.said.append(f"batch norms re-estimated: {'kept' if kept else 'no gain, taken back'}")

    def _distill(self) -> None:
        if not self.recovery.distill_steps:
            return
        trained = [*factors_in(self.student), *own_vectors(self.student, self.vectors)]
        how = Training(self.recovery.distill_steps, self.recovery.distill_rate, seed=self.seed)
        written = self._written()
        batches = [*self.batches[: self.fitted], *written, *self.batches[self.fitted :]]
        fitted = self.fitted + len(written) if self.fitted < len(self.batches) else None
        came = distill(self.model, self.student, batches, trained, how, fitted)
        self.said.append(
            f"distilled: held-out KL {came.before:.4g} -> {came.after:.4g} "
            f"(step {came.best_step} of {how.steps})"
        )

    def _written(self) -> list[Batch]:
        """More to distil on, where the model can write it: what is fitted to few rows stays close
        to the dense model on those alone."""
        rows, length = self.recovery.written, self._length()
        if not rows or not length or not selfwritten.writes(self.model):
            return []
        seed = self.seed + 1  # not the rows that calibrated, where those were written too
        text = selfwritten.write(self.model, rows=rows, length=length, seed=seed)
        self.said.append(f"distilled on {rows} rows more that the model wrote itself")
        return list(text.split(self.recovery.rows))

    def _length(self) -> int:
        """Tokens of the longest row of the data; 0 where it holds no token ids."""
        ids = [b if isinstance(b, Tensor) else b.get("input_ids") for b in self.batches]
        known = [t for t in ids if isinstance(t, Tensor) and not t.is_floating_point()]
        return max((t.shape[-1] for t in known if t.ndim == 2), default=0)

    def _held(self) -> Sequence[Batch]:
        return self.seen.held_out or self.batches[-max(len(self.batches) // HELD_OUT, 1) :]

    def _judge(self, work: Sequence[tuple[Site, Entry, nn.Module]]) -> None:
        """What recovery gave, and back to the plain layers where that was nothing."""
        held = self._held()
        plain = twin(self.model)
        for site, _, new in work:
            put(plain, site, new)
        try:
            before, after = (judged(part, self.model, held) for part in (plain, self.student))
        except NotFinite:
            raise
        except LowrankError as error:
            self.said.append(f"what recovery gave was not judged: {error}")
            return
        self.broken = before == after == math.inf
        self.said.append(f"KL on held-out rows: {before:.4g} -> {after:.4g}")
        if before <= ROUNDING:
            said = "nothing is left to recover on held-out rows: the layers are those before it"
        elif not after <= before:
            said = "recovery made it worse: the layers are those before it"
        else:
            return
        self.student, self.vectors = plain, {}
        self.said.append(said)


def _advance(bar: tqdm[None], name: str) -> None:
    if name:
        bar.update()
