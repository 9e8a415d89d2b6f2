"""One recovery run: the twin that it works on, its stages in order, and what it reports."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calibration.chain import Chain, NotInBlocks
from ..calibration.observation import inside
from ..calibration.processes import dealt, from_first
from ..calibration.statistics import statistics_of
from ..errors import LowrankError
from ..linalg.mapped import settled
from ..measure.eval import NotFinite
from ..methods.resolved import Resolved
from ..nn import Form, LowRankLinear, pivot_layer
from ..plans.entry import Entry
from ..plans.gains import Course, Gain
from ..plans.stages import stage
from ..types import Site
from ..walk.layouts import keeps_moments
from ..walk.surgery import module_at, put, twin
from .batchnorm import recalibrated
from .blocks import distill, refit_block
from .budget import Budget, now
from .closed_form import refit_layer
from .copies import Pairs, factors_in, own_buffers, own_vectors
from .images import are_images
from .journal import Journal
from .nesting import Nesting
from .recovery import Recovery
from .sequential import Moments, Student
from .temperature import temper
from .training import Trained, Training
from .workbench import Workbench
from .written import further

ROUNDING = 1e-6  # a KL that fp32 logits cannot tell from zero
OF_BLOCKS = "error of the blocks' outputs"
Open = Sequence[tuple[Site, Entry, nn.Module | None]]  # None: made by the refit


@dataclass
class Recovered:
    """The result of recovery.

    Attributes:
        modules: the new layer of every site, by site name.
        vectors: pairs of a trained norm parameter or bias: (the model's own, the trained copy).
        notes: sentences for the report.
        broken: the compressed model's predictions on held-out rows hold NaN or Inf, and the dense
            model's do not.
        gains: of every stage, if its predictions can be judged.
    """

    modules: dict[str, nn.Module]
    vectors: Pairs = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    broken: bool = False
    gains: tuple[Gain, ...] = ()


@dataclass
class Job:
    """One recovery run: its twin, and the notes for the report."""

    bench: Workbench
    recovery: Recovery
    resolved: Resolved
    work: Open
    most: int | None
    seed: int
    spent: float = 0.0
    left: int = 0
    journal: Journal | None = None
    vectors: Pairs = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)  # by block refit, by block
    course: Course = field(default_factory=Course)
    notes: list[str] = field(default_factory=list)
    gains: tuple[Gain, ...] = ()
    broken: bool = False

    def __post_init__(self) -> None:
        self.student = twin(self.bench.model)
        self.entries = {site.name: entry for site, entry, _ in self.work}
        self.built = {site.name: new for site, _, new in self.work}
        self.numbers, self.fitted = self.bench.numbers(self.most)
        self.refits = [site for site, _, new in self.work if self._can_refit(site, new)]
        order = self.bench.calibration.observation.order
        self.places = {name: i / max(len(order) - 1, 1) for i, name in enumerate(order)}

    def prepared(self, blocks: Collection[str]) -> Student:
        """The twin with the layers that are not refitted, ready for the pass.

        Args:
            blocks: names of all blocks of chains.
        """
        own = {b for b in blocks if any(inside(site.name, b) for site, _, _ in self.work)}
        self.budget = Budget(self.recovery, len(own), self.spent)
        for site, _, _ in self.work:
            if site not in self.refits:
                put(self.student, site, self._made(site))
        steps = self.recovery.block_steps
        if steps and not blocks:
            self.notes.append("the model has no chain of blocks: block refit was skipped")
        train = self._refit_block if steps else None
        student = Student(
            self.student, self.refits, self._fit, train, shrinkage=self.recovery.shrinkage
        )
        if self.journal is None:
            return student
        return replace(student, restored=self._restored, finished=self._finished)

    def note(self, sentences: Sequence[str]) -> None:
        """What the pass did and says."""
        if self.recovery.refit:
            self.notes.append(f"refitted in closed form, layer by layer: {len(self.refits)}")
        self.notes += sentences
        if self.trained:
            kept = sum(trained.kept for trained in self.trained.values())
            self.notes.append(f"block refit: {kept} of {len(self.trained)} blocks improved")

    def finish(self) -> Recovered:
        """The stages after the pass."""
        self.batchnorm()
        if self.recovery.distill_steps:
            self._distill()
        self.notes += self.budget.notes()
        # Only now: plain factors are better conditioned to train.
        stored = dealt(partial(self._stored, site) for site in self.refits)
        for site, new in zip(self.refits, stored, strict=True):
            if new is not None:
                put(self.student, site, settled(new))
        with stage("judging"):
            self._temper()
            self._judge()
        modules = {site.name: module_at(self.student, site.name) for site, _, _ in self.work}
        return Recovered(modules, self.vectors, tuple(self.notes), self.broken, self.gains)

    def _can_refit(self, site: Site, new: nn.Module | None) -> bool:
        calibration = self.bench.calibration
        called = site.name in calibration.observation.order and len(site.modules) == 1
        observed = called and calibration.statistics[site.name].gram is not None
        return observed and (new is None or (isinstance(new, Form) and new.REFITTED))

    def _made(self, site: Site) -> nn.Module:
        """The layer as it was factored from the dense model's statistics."""
        new = self.built[site.name]
        if new is None:
            stats = statistics_of(site, self.bench.calibration)
            new = self.resolved.factor([site], self.entries[site.name].option(), stats)[0]
        return new

    def _fit(self, site: Site, moments: Moments | None) -> nn.Module:
        if not self.recovery.refit or moments is None:
            return copy.deepcopy(self._made(site))
        return refit_layer(
            self.resolved,
            site,
            self.entries[site.name],
            self.bench.calibration.statistics[site.name],
            moments,
            self.recovery.share(self.places[site.name]),
            sums=self.recovery.sums,
            seed=self.seed,
        )

    def _refit_block(self, lean: Chain, index: int, targets: list[Tensor]) -> None:
        block = module_at(self.student, lean.names[index])
        trained = [*factors_in(block), *own_vectors(block, self.vectors)]
        if not factors_in(block):
            return
        seconds = self.budget.of_block()
        if seconds == 0:
            return
        options = self._training(self.recovery.block_steps, self.recovery.block_rate)
        name, started = lean.names[index], now()
        reals = [self.bench.real(name, number) for number in self.numbers]
        masks = [real[0] if real else None for real in reals]
        try:
            result = refit_block(
                lean, index, targets, trained, masks, options, self.fitted, seconds
            )
        except NotInBlocks:
            raise
        except LowrankError as error:
            raise LowrankError(f"{name}: {error}") from None
        from_first(trained)
        self.budget.trained(now() - started)
        self.trained[name] = result

    def _training(self, steps: int, rate: float | None) -> Training:
        return Training(steps, rate, seed=self.seed, optimizer=self.recovery.optimizer)

    def _finished(self, name: str, sites: Sequence[Site], unpaired: Sequence[str]) -> None:
        """Keep a block in the journal."""
        assert self.journal is not None
        copies = {id(copy) for _, copy in self.vectors.values()}
        block = module_at(self.student, name)
        vectors = {f"{name}.{n}": p for n, p in block.named_parameters() if id(p) in copies}
        layers = {site.name: module_at(self.student, site.name) for site in sites}
        result = self.trained.get(name)
        about: dict[str, Any] = {"unpaired": list(unpaired), "budget": self.budget.state()}
        about["trained"] = None if result is None else asdict(result)
        self.journal.keep_layers(name, layers, vectors, about)

    def _restored(self, name: str) -> Sequence[str] | None:
        """Put the layers of a block that the journal holds in place; see `Student`."""
        assert self.journal is not None
        kept = self.journal.layers(name)
        if kept is None:
            return None
        layers, vectors, about = kept
        sites = {site.name: site for site in self.refits}
        for site_name, new in layers.items():
            put(self.student, sites[site_name], new)
        if vectors:
            own_vectors(module_at(self.student, name), self.vectors)
        tensors = dict(self.student.named_parameters())
        with torch.no_grad():
            for vector, value in vectors.items():
                tensors[vector].copy_(value)
        if about["trained"] is not None:
            self.trained[name] = Trained(**about["trained"])
        self.budget.restored(about["budget"])
        return [str(title) for title in about["unpaired"]]

    def _block_gain(self) -> list[Gain]:
        """Of block refit: part of the first stage, in a measure of its own; [] without it."""
        every = self.trained.values()
        if not every:
            return []
        before, after = (
            sum(e) / len(every) for e in ([t.before for t in every], [t.after for t in every])
        )
        steps = sum(t.steps for t in every)
        return [Gain("block refit", OF_BLOCKS, before, after, self.budget.training, steps)]

    def _stored(self, site: Site) -> nn.Module | None:
        """The refitted layer in the storage of its entry; None if it is in that already."""
        new = module_at(self.student, site.name)
        if self.entries[site.name].storage == "pivoted" and isinstance(new, LowRankLinear):
            return pivot_layer(new)
        return None

    def batchnorm(self) -> None:
        norms: list[Any] = [part for part in self.student.modules() if keeps_moments(part)]
        if not norms or not self.recovery.batchnorm:
            return
        own_buffers(norms, ("running_mean", "running_var"), self.vectors)
        data = list(cast(Any, self.bench.calibration.batches))
        if self.most is not None:
            data = [self.bench.batches[number] for number in self.numbers[: self.fitted]]
        started = now()
        try:
            with stage("batch norms"):
                before, after = recalibrated(self.student, data, self.bench.judge)
        except NotFinite:
            raise
        except LowrankError as error:  # no predictions to judge by
            self.notes.append(f"batch norms were not re-estimated: {error}")
            return
        from_first(t for norm in norms for t in (norm.running_mean, norm.running_var))
        self.course.judged(before)
        self.course.passed("batch norms", now() - started)
        self.course.judged(after)
        kept = after < before
        self.notes.append(f"batch norms re-estimated: {'kept' if kept else 'reverted: no gain'}")

    def _distill(self) -> None:
        seconds = self.budget.of_distillation()
        if seconds == 0:
            return
        started = now()
        with stage("distillation"):
            if self.course.unjudged and self.bench.judged_on_seen:
                with suppress(LowrankError):  # which is said at the end
                    (level,) = dealt([partial(self._judged, self.student)])
                    self.course.judged(level)
            result = self._distilled(None if seconds is None else started + seconds)
        if self.course.unjudged:  # on the same rows
            self.course.judged(result.before)
        self.course.passed("distillation", now() - started, result.steps)

    def _distilled(self, end: float | None) -> Trained:
        """Distil until `end`, by `now`."""
        trained = [*factors_in(self.student), *own_vectors(self.student, self.vectors)]
        batches = [self.bench.batches[number] for number in self.numbers]
        options = self._training(self.recovery.distill_steps, self.recovery.distill_rate)
        written = further(self.bench.model, batches, self.recovery, self.seed + 1, end)
        if written:
            count = sum(map(len, written))
            self.notes.append(f"distilled on {count} more rows, written by the model itself")
        held = batches[self.fitted :]
        fitted = self.fitted + len(written) if held else None
        batches = [*batches[: self.fitted], *written, *held]
        seconds = None if end is None else end - now()
        vary = self.recovery.augment and are_images(batches)
        if self.recovery.augment and not vary:
            self.notes.append("distilled on the data as it is: it is not of images alone")
        options, nesting = replace(options, vary=vary), self.nesting(self.student)
        result = distill(
            self.bench.model, self.student, batches, trained, options, fitted, seconds, nesting
        )
        from_first(trained)
        self.notes.append(
            f"distilled: held-out {self.bench.judge.measure} {result.before:.4g} -> "
            f"{result.after:.4g} (step {result.best_step} of {result.steps})"
            f"{'' if nesting is None else f', {nesting}'}"
            f"{', on images mirrored and shifted' if vary else ''}"
        )
        return result

    def _temper(self) -> None:
        if not self.recovery.temperature or not self.refits or self.recovery.nested is not None:
            return  # one factor would suit one ratio
        started = now()
        factor, before = temper(self.student, self.bench.judge, self.vectors)
        if factor != 1.0:
            self.course.judged(before)
            self.course.passed("temperature", now() - started)
            self.notes.append(f"logits scaled by {factor:.3g}, in the last norm")

    def _judge(self) -> None:
        """Revert to the layers before recovery if it did not lower held-out KL."""
        plain = self.plain()
        try:
            before, after = dealt(partial(self._judged, model) for model in (plain, self.student))
        except NotFinite:
            raise
        except LowrankError as error:
            self.notes.append(f"recovery could not be judged: {error}")
            return
        self.broken = before == after == math.inf
        self.course.measure = measure = self.bench.judge.measure
        self.gains = self.course.gains(before, after, *self._block_gain())
        self.notes.append(f"{measure} on held-out rows: {before:.4g} -> {after:.4g}")
        if before <= ROUNDING:
            why = f"the {measure} was already below {ROUNDING:g}"
        elif not after <= before:
            why = f"it raised the {measure}"
        else:
            return
        self.student, self.vectors = plain, {}
        self.notes.append(f"recovery was reverted: {why}")

    def plain(self) -> nn.Module:
        """A twin with the layers before recovery."""
        model = twin(self.bench.model)
        for site, _, _ in self.work:
            put(model, site, self._made(site))
        return model

    def nesting(self, model: nn.Module) -> Nesting | None:
        """The ratios that a compressed model is trained and judged at; None for its own alone."""
        least = self.recovery.nested
        return None if least is None else Nesting(model, least, left=self.left, seed=self.seed)

    def _judged(self, model: nn.Module) -> float:
        """How far a model is from the dense one on the rows to judge by, over all of its ratios."""
        nesting, judged = self.nesting(model), partial(self.bench.judge.judged, model)
        return judged() if nesting is None else nesting.mean_of(judged)
