"""Recovery after the choice of ranks: sequential refit, block refit, batch norms, distillation.

It runs on a twin of the model. The model itself stays dense and unchanged until everything has
succeeded, and serves as teacher meanwhile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration import self_written
from ..calibration.batches import Batch
from ..calibration.chain import Chain, NotInBlocks
from ..errors import LowrankError
from ..linalg.mapped import settled
from ..measure.eval import NotFinite
from ..methods.resolved import Resolved
from ..nn import Form, LowRankLinear, pivot_layer
from ..plans.entry import Entry
from ..plans.stages import stage
from ..types import Site
from ..walk import layouts
from ..walk.layouts import keeps_moments
from ..walk.surgery import module_at, put, twin
from .batchnorm import bn_recalibrate
from .blocks import distill, refit_block
from .copies import Pairs, factors_in, own_buffers, own_vectors
from .recovery import Recovery
from .sequential import Moments, SequentialPass
from .training import Trained, Training
from .workbench import Workbench

ROUNDING = 1e-6  # a KL that fp32 logits cannot tell from zero
NOISE = 1e-6  # rounding error of fp32 sums, relative to the mean square
ROOT = "the model is a single layer: there is nothing to refit"
Work = Sequence[tuple[Site, Entry, nn.Module]]


@dataclass
class Recovered:
    """The result of recovery.

    Attributes:
        modules: the new layer of every site, by site name.
        vectors: pairs of a trained norm parameter or bias: (the model's own, the trained copy).
        notes: sentences for the report.
        broken: the compressed model's predictions on held-out rows hold NaN or Inf, and the dense
            model's do not.
    """

    modules: dict[str, nn.Module]
    vectors: Pairs = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    broken: bool = False


def recover_layers(
    bench: Workbench,
    work: Work,
    recovery: Recovery,
    resolved: Resolved,
    *,
    most: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Recovered:
    """Refit and train the new layers in a twin of the bench's model, which is not changed.

    Args:
        work: sites, their entries, and the layers factored from the dense model's statistics.
        resolved: the method, which refits layers.
        most: number of batches to fit layers to; None for all.
    """
    if any(site.name == "" for site, _, _ in work):
        return Recovered({s.name: m for s, _, m in work}, notes=(ROOT,))
    return _Job(bench, recovery, resolved, work, most, seed, progress).run()


@dataclass
class _Job:
    """One recovery run: its twin, and the notes for the report."""

    bench: Workbench
    recovery: Recovery
    resolved: Resolved
    work: Work
    most: int | None
    seed: int
    progress: bool
    vectors: Pairs = field(default_factory=dict)
    refitted: list[Trained] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: bool = False

    def run(self) -> Recovered:
        self.student = twin(self.bench.model)
        self.entries = {site.name: entry for site, entry, _ in self.work}
        self.built = {site.name: new for site, _, new in self.work}
        self.numbers, self.fitted = self.bench.numbers(self.most)
        refits = [site for site, _, new in self.work if self._can_refit(site, new)]
        for site, _, new in self.work:
            if site not in refits:
                put(self.student, site, new)
        with stage("refit by block"):
            self._refit(refits)
        self._batchnorm()
        if self.recovery.distill_steps:
            with stage("distillation"):
                self._distill()
        for site in refits:  # only now: plain factors are better conditioned to train
            self._store(site)
        with stage("judging"):
            self._judge()
        modules = {site.name: module_at(self.student, site.name) for site, _, _ in self.work}
        return Recovered(modules, self.vectors, tuple(self.notes), self.broken)

    def _can_refit(self, site: Site, new: nn.Module) -> bool:
        calibration = self.bench.calibration
        called = site.name in calibration.observation.order and len(site.modules) == 1
        observed = called and calibration.statistics[site.name].gram is not None
        return observed and isinstance(new, Form) and new.REFITTED

    def _refit(self, sites: Sequence[Site]) -> None:
        chains = self.bench.calibration.observation.chains
        blocks = {name for chain in chains for name in chain}
        steps = self.recovery.block_steps
        if steps and not blocks:
            self.notes.append("the model has no chain of blocks: block refit was skipped")
        options = {"delay": 2, "disable": not self.progress, "leave": False}
        with tqdm(total=len(blocks), desc="refit", **options) as bar:
            sequential = SequentialPass(
                self.bench,
                self.student,
                self.numbers,
                self.fitted,
                self._fit,
                after_block=self._refit_block if steps else None,
                on_block=lambda name: bar.update(bool(name)),
            )
            sequential.run(sites)
        if self.recovery.refit:
            self.notes.append(f"refitted in closed form, layer by layer: {len(sites)}")
        self.notes += sequential.notes()
        if self.refitted:
            kept = sum(result.kept for result in self.refitted)
            self.notes.append(f"block refit: {kept} of {len(self.refitted)} blocks improved")

    def _fit(self, site: Site, moments: Moments | None) -> nn.Module:
        if not self.recovery.refit or moments is None:
            return copy.deepcopy(self.built[site.name])
        share, bias = self.recovery.dense, layouts.bias(site.module)
        gram, cross = moments.gram, moments.cross
        least = NOISE * float(gram.diagonal().mean())
        if bias is not None:  # the bias fits the mean, the factors the deviations from it
            gram = gram - torch.outer(moments.mean, moments.mean)
            cross = cross - torch.outer(moments.dense_mean, moments.mean)
        new = self.resolved.refitted(
            site,
            self.entries[site.name].option(),
            self.bench.calibration.statistics[site.name],
            gram=gram,
            target=(1 - share) * gram + share * cross,
            least=least,
            seed=self.seed,
        )
        if bias is not None:
            weight = layouts.matrix(site.module)
            mean = (1 - share) * moments.mean + share * moments.dense_mean
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
        options = Training(self.recovery.block_steps, self.recovery.block_rate, seed=self.seed)
        name = lean.names[index]
        reals = [self.bench.real(name, number) for number in self.numbers]
        masks = [real[0] if real else None for real in reals]
        try:
            result = refit_block(lean, index, targets, trained, masks, options, self.fitted)
        except NotInBlocks:
            raise
        except LowrankError as error:
            raise LowrankError(f"{lean.names[index]}: {error}") from None
        self.refitted.append(result)

    def _store(self, site: Site) -> None:
        new = module_at(self.student, site.name)
        if self.entries[site.name].storage == "pivoted" and isinstance(new, LowRankLinear):
            put(self.student, site, settled(pivot_layer(new)))

    def _batchnorm(self) -> None:
        norms = [part for part in self.student.modules() if keeps_moments(part)]
        if not norms or not self.recovery.batchnorm:
            return
        own_buffers(norms, ("running_mean", "running_var"), self.vectors)
        data = self.bench.calibration.batches
        if self.most is not None:
            data = [self.bench.batches[number] for number in self.numbers[: self.fitted]]
        model, held = self.bench.model, self.bench.judge.batches
        try:
            with stage("batch norms"):
                kept = bn_recalibrate(self.student, data, reference=model, held_out=held)
        except NotFinite:
            raise
        except LowrankError as error:  # no predictions to judge by
            self.notes.append(f"batch norms were not re-estimated: {error}")
            return
        self.notes.append(f"batch norms re-estimated: {'kept' if kept else 'reverted: no gain'}")

    def _distill(self) -> None:
        trained = [*factors_in(self.student), *own_vectors(self.student, self.vectors)]
        options = Training(self.recovery.distill_steps, self.recovery.distill_rate, seed=self.seed)
        batches = [self.bench.batches[number] for number in self.numbers]
        written, held = self._written(), batches[self.fitted :]
        fitted = self.fitted + len(written) if held else None
        batches = [*batches[: self.fitted], *written, *held]
        result = distill(self.bench.model, self.student, batches, trained, options, fitted)
        self.notes.append(
            f"distilled: held-out {self.bench.judge.measure} {result.before:.4g} -> "
            f"{result.after:.4g} (step {result.best_step} of {options.steps})"
        )

    def _written(self) -> list[Batch]:
        """Further batches to distil on, if the model can write text: distilled on few rows alone,
        it would match the dense model on those only."""
        rows, length = self.recovery.written, self._length()
        model = self.bench.model
        if not rows or not length or not self_written.writes(model):
            return []
        seed = self.seed + 1  # not the calibration rows, if those were self-written
        text = self_written.write(model, rows=rows, length=length, seed=seed)
        self.notes.append(f"distilled on {rows} more rows, written by the model itself")
        return list(text.split(self.recovery.rows))

    def _length(self) -> int:
        """Length of the longest row in the data, in tokens; 0 if it holds no token ids."""
        batches = self.bench.batches
        ids = [b if isinstance(b, Tensor) else b.get("input_ids") for b in batches]
        known = [t for t in ids if isinstance(t, Tensor) and not t.is_floating_point()]
        return max((t.shape[-1] for t in known if t.ndim == 2), default=0)

    def _judge(self) -> None:
        """Revert to the layers before recovery if it did not lower held-out KL."""
        plain = twin(self.bench.model)
        for site, _, new in self.work:
            put(plain, site, new)
        try:
            before, after = (self.bench.judge.judged(m) for m in (plain, self.student))
        except NotFinite:
            raise
        except LowrankError as error:
            self.notes.append(f"recovery could not be judged: {error}")
            return
        self.broken = before == after == math.inf
        measure = self.bench.judge.measure
        self.notes.append(f"{measure} on held-out rows: {before:.4g} -> {after:.4g}")
        if before <= ROUNDING:
            why = f"the {measure} was already below {ROUNDING:g}"
        elif not after <= before:
            why = f"it raised the {measure}"
        else:
            return
        self.student, self.vectors = plain, {}
        self.notes.append(f"recovery was reverted: {why}")
