"""Sequential refit: every layer is refitted to the inputs it reads in the compressed model.

Streams run through the model block by block: the dense one, and one of each compressed model, so
that candidates share the dense one. Layers that read the same tensor are refitted together in
closed form (linalg/refit.py), in call order, so that each corrects the error of those before it. A
run ends with the layer whose inputs are asked for: nothing behind it is computed. Layers outside of
all chains, and those of a chain that cannot be run block by block, are refitted in forward passes
of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.chain import Chain, NotInBlocks
from ..calibration.observation import inside
from ..calibration.processes import dealt, in_step, summed
from ..calibration.running import first_tensor, forward, quiet, without_cache
from ..calibration.statistics import counted_rows
from ..errors import LowrankError, listed
from ..linalg import cross_sum, gram_sum
from ..linalg.mapped import settled
from ..types import Site
from ..walk import layouts
from ..walk.surgery import module_at, put
from .workbench import Workbench

Run = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one distinct input in both streams, per token, float64.

    Attributes:
        count: number of tokens.
        gram: E[x'x'ᵀ] (in, in) of the compressed stream.
        cross: E[x x'ᵀ] (in, in), x of the dense stream.
        mean, dense_mean: E[x'] and E[x], (in,).
    """

    count: int
    gram: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor


@dataclass(frozen=True, eq=False)
class Student:
    """A compressed twin of the workbench's model, in which layers are replaced.

    Attributes:
        model: the twin.
        sites: of the dense model, those to refit.
        fit: returns the new layer of a site, given the moments of its input, None if it saw no
            token.
        after_block: called once all sites of a block are replaced, with the twin's chain, the
            block's index and the dense outputs; may train the block.
        restored: called with a block's name before its turn. If an earlier call, which was killed,
            had finished it, its layers are now in place; returns the titles of those refitted
            without partners, None if it is still to be done.
        finished: called with the name of a block that is done, its sites and those titles.
    """

    model: nn.Module
    sites: Sequence[Site]
    fit: Callable[[Site, Moments | None], nn.Module]
    after_block: Callable[[Chain, int, list[Tensor]], None] | None = None
    restored: Callable[[str], Sequence[str] | None] = lambda _: None
    finished: Callable[[str, Sequence[Site], Sequence[str]], None] = lambda *_: None

    def among(self, group: Sequence[Site]) -> list[Site]:
        return [site for site in group if site in self.sites]


@dataclass
class SequentialPass:
    """One pass over compressed twins of the workbench's model, which share the dense stream.

    Attributes:
        numbers: indices of the batches to run.
        fitted: number of those, from the first, that the moments are taken from.
        shared: the other processes run other batches, and the moments are of all.
        on_block: called with the name of each block before its turn; "" outside of blocks.
    """

    bench: Workbench
    students: Sequence[Student]
    numbers: Sequence[int]
    fitted: int
    on_block: Callable[[str], None] = lambda _: None
    shared: bool = False
    _whole_chains: dict[str, list[str]] = field(default_factory=dict)  # why -> names
    _unpaired: dict[str, None] = field(default_factory=dict)  # titles

    def notes(self) -> list[str]:
        """Sentences about what could not be done as planned, for the report."""
        trains = any(student.after_block is not None for student in self.students)
        skipped = "; block refit was skipped there" if trains else ""
        notes = [
            f"refitted in passes of the whole model, not block by block: {listed(names, 3)} "
            f"({why}){skipped}"
            for why, names in self._whole_chains.items()
        ]
        if self._unpaired:
            notes.append(
                f"refitted to the compressed model's inputs alone, since other tokens reach them "
                f"than in the dense model: {len(self._unpaired)} layers: "
                f"{listed(list(self._unpaired), 3)}"
            )
        return notes

    def run(self) -> None:
        """Replace the students' sites, block by block; those that were never called are left.

        Layers outside all chains are refitted in forward passes of the whole model: those called
        before the first chain come first, the others last.
        """
        observed = self.bench.calibration.observation
        wanted = {site.name: site for student in self.students for site in student.sites}
        groups = [[wanted[name] for name in group if name in wanted] for group in observed.groups]
        groups = [group for group in groups if group]
        inside = {name for chain in observed.chains for name in chain}
        first = next((i for i, name in enumerate(observed.order) if _within(name, inside)), 0)
        outer = [group for group in groups if not _within(group[0].name, inside)]
        early = [group for group in outer if observed.order.index(group[0].name) < first]
        self._whole(early)
        for names in observed.chains:
            mine = [group for group in groups if _within(group[0].name, names)]
            if mine:
                self._chain(names, mine)
        self._whole(group for group in outer if group not in early)

    def _whole(self, groups: Iterable[list[Site]]) -> None:
        batches = [self.bench.batches[number] for number in self.numbers[: self.fitted]]

        def runs(model: nn.Module) -> list[Run]:
            return [lambda b=batch: forward(model, b) for batch in batches]  # type: ignore[misc]

        for group in groups:
            self.on_block("")
            lean = [runs(student.model) for student in self.students]
            self._refit(group, runs(self.bench.model), lean)

    def _chain(self, names: Sequence[str], groups: Sequence[list[Site]]) -> None:
        """Refit the layers of a chain block by block, or those left in whole passes if it cannot
        be run so."""
        waiting = list(groups)
        try:
            self._blockwise(names, waiting)
        except NotInBlocks as error:
            ends = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
            self._whole_chains.setdefault(str(error), []).append(ends)
            self._whole(waiting)

    def _blockwise(self, names: Sequence[str], waiting: list[list[Site]]) -> None:
        """Refit block by block; groups that are done are taken out of `waiting`.

        Raises:
            NotInBlocks: the chain cannot be run so.
        """
        dense, *lean = self._chains(names)
        for index, name in enumerate(names):
            self.on_block(name)
            after: list[Any] = []
            mine = [group for group in waiting if _within(group[0].name, [name])]
            before = set(self._unpaired)
            known = [student.restored(name) for student in self.students]
            done = None not in known
            if done:
                self._unpaired |= dict.fromkeys(title for each in known for title in each or ())
                waiting[:] = [group for group in waiting if group not in mine]
            for group in () if done else mine:
                runs = _block_runs(dense, index)[: self.fitted]
                lean_runs = [_block_runs(chain, index)[: self.fitted] for chain in lean]
                after = self._refit(group, runs, lean_runs, to_the_end=group is mine[-1])
                waiting.remove(group)
            _advance(dense, index, after)
            for student, chain in zip(self.students, lean, strict=True):
                chain.refresh(student.model)
                if student.after_block is not None and not done:
                    student.after_block(chain, index, dense.hidden)
                if not done:
                    sites = student.among([site for group in mine for site in group])
                    student.finished(name, sites, [t for t in self._unpaired if t not in before])
                _advance(chain, index)

    def _chains(self, names: Sequence[str]) -> list[Chain]:
        """These blocks in the dense model, and in each student."""
        chains: list[Chain] = []

        def record() -> None:
            chains.append(self.bench.dense_chain(names, self.numbers))
            for student in self.students:
                chains.append(self.bench.chain(student.model, names, self.numbers))

        in_step(record)
        return chains

    def _refit(
        self,
        group: Sequence[Site],
        dense: Sequence[Run],
        lean: Sequence[Sequence[Run]],
        *,
        to_the_end: bool = False,
    ) -> list[Any]:
        """Replace sites that read one tensor in all students; see `_Streams` for the rest."""
        concerned = [i for i, student in enumerate(self.students) if student.among(group)]
        models = [self.students[i].model for i in concerned]
        streams = _Streams(group[0], self.bench.model, models, to_the_end)

        def run() -> list[tuple[int, bool]]:
            name, numbers = group[0].name, self.numbers[: self.fitted]
            reals = [self.bench.real(name, number) for number in numbers]
            streams.run(dense, [lean[i] for i in concerned], reals)
            return [(sums.count, sums.paired) for sums in streams.sums]

        every = in_step(run)
        if self.shared:
            for sums, *parts in zip(streams.sums, *every, strict=True):
                sums.add_up(parts)
        if not all(sums.paired for sums in streams.sums):
            self._unpaired[group[0].title] = None
        students = [self.students[i] for i in concerned]
        replaced = [(each.model, site) for each in students for site in each.among(group)]

        def fits() -> Iterator[Callable[[], nn.Module]]:
            for student, sums in zip(students, streams.sums, strict=True):
                moments = sums.moments()
                yield from (partial(student.fit, site, moments) for site in student.among(group))

        for (model, site), new in zip(replaced, dealt(fits()), strict=True):
            put(model, site, settled(new))
        return streams.outputs


class _Sums:
    """Running sums of a layer's inputs in the dense and one compressed stream.

    Where other tokens reach it in the compressed model, as experts of a mixture, its rows have no
    partners: then both streams are the compressed one.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.count, self.paired = site, 0, True
        self.sums = [torch.zeros(())] * 4

    def add(
        self, dense: Sequence[Tensor], lean: Sequence[Tensor], real: Sequence[Tensor | None]
    ) -> None:
        """Add what the layer read in one batch, call by call."""
        if [t.shape for t in dense] != [t.shape for t in lean]:
            dense, self.paired, real = lean, False, []
        for x, y in _pairs(self.site.module, dense, lean, real):
            new = _sums(self.site, x, y)
            self.sums = [
                n if not self.count else s + n for s, n in zip(self.sums, new, strict=True)
            ]
            self.count += len(y)

    def add_up(self, parts: Sequence[tuple[int, bool]]) -> None:
        """Add the sums of the other processes.

        Args:
            parts: count and `paired` of each.
        """
        total = sum(count for count, _ in parts)
        if total and not self.count:
            matrix = layouts.matrix(self.site.module)
            mean = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
            gram = torch.zeros(*[len(mean)] * 2, dtype=mean.dtype, device=mean.device)
            self.sums = [gram, gram.clone(), mean, mean.clone()]
        if total:
            summed(*self.sums)
        self.count, self.paired = total, all(paired for _, paired in parts)

    def moments(self) -> Moments | None:
        """None if it saw no token."""
        if not self.count:
            return None
        gram, cross, mean, dense_mean = (total / self.count for total in self.sums)
        if not self.paired:
            cross, dense_mean = gram, mean
        return Moments(self.count, gram, cross, mean, dense_mean)


class _Streams:
    """The inputs of one layer in the dense model and its students, batch by batch.

    Attributes:
        sums: of each student.
        outputs: what the dense runs returned, if they were to go on `to_the_end`.
    """

    def __init__(
        self, site: Site, dense: nn.Module, students: Sequence[nn.Module], to_the_end: bool
    ) -> None:
        self.models = [dense, *students]
        self.sums = [_Sums(site) for _ in students]
        layers = [module_at(model, site.name) for model in self.models]
        self._readers = [
            _Reader(layer, _can_be_left(m)) for m, layer in zip(self.models, layers, strict=True)
        ]
        self._readers[0].ends = self._readers[0].ends and not to_the_end
        self._keeps = to_the_end
        self.outputs: list[Any] = []

    def run(
        self,
        dense: Sequence[Run],
        lean: Sequence[Sequence[Run]],
        reals: Sequence[Sequence[Tensor | None]],
    ) -> None:
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(quiet(model))
                stack.enter_context(without_cache(model))
            for run, real, *runs in zip(dense, reals, *lean, strict=True):
                x, output = self._readers[0].read(run)
                if self._keeps:
                    self.outputs.append(output)
                for sums, reader, lean_run in zip(self.sums, self._readers[1:], runs, strict=True):
                    sums.add(x, reader.read(lean_run)[0], real)


class _Reached(Exception):
    """Ends a run with the layer whose inputs are asked for."""


class _Reader:
    """Reads a layer's inputs from runs; all but the first one end with its last call."""

    def __init__(self, layer: nn.Module, ends: bool) -> None:
        self.layer, self.ends, self._calls = layer, ends, 0

    def read(self, run: Run) -> tuple[list[Tensor], Any]:
        """Every input tensor, cloned against later in-place changes, and the run's output."""
        tensors: list[Tensor] = []
        last = self._calls if self.ends else 0

        def hook(_module: nn.Module, args: object, kwargs: object) -> None:
            tensor = first_tensor((args, kwargs))
            if tensor is not None:
                tensors.append(tensor.clone())
            if last and len(tensors) == last:
                raise _Reached

        handle, output = self.layer.register_forward_pre_hook(hook, with_kwargs=True), None
        try:
            with suppress(_Reached):
                output = run()
        finally:
            handle.remove()
        self._calls = self._calls or len(tensors)
        return tensors, output


def _can_be_left(model: nn.Module) -> bool:
    """Whether a forward pass may be ended early: accelerate's hooks put weights back behind it."""
    return not any(hasattr(module, "_hf_hook") for module in model.modules())


def _advance(chain: Chain, index: int, known: Sequence[Any] = ()) -> None:
    """Carry the hidden states through a block; `known` are its first outputs."""

    def run() -> None:
        chain.hidden = [*known, *chain.outputs(index, first=len(known))]

    in_step(run)


def _block_runs(chain: Chain, index: int) -> list[Run]:
    return [
        lambda b=batch, h=hidden: chain.run(index, b, h)  # type: ignore[misc]
        for batch, hidden in enumerate(chain.hidden)
    ]


def _pairs(
    module: nn.Module,
    dense: Sequence[Tensor],
    lean: Sequence[Tensor],
    real: Sequence[Tensor | None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Input vectors (rows, in) of a layer in both streams, in chunks, without padding."""
    masks = real if len(real) == len(dense) else [None] * len(dense)
    for x, y, mask in zip(dense, lean, masks, strict=True):
        yield from zip(counted_rows(module, x, mask), counted_rows(module, y, mask), strict=True)


def _sums(site: Site, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Sums over the rows (rows, in) of the dense stream x and the compressed stream y."""
    sums = (gram_sum(y), cross_sum(x, y), y.double().sum(0), x.double().sum(0))
    if not bool(torch.isfinite(sums[0].diagonal()).all()):
        raise LowrankError(
            f"{site.title}: its input holds NaN or Inf in the compressed model, but not in the "
            "dense one: run it in float32 or bfloat16, or exclude the layers before it"
        )
    return sums


def _within(name: str, blocks: Collection[str] | Mapping[str, object]) -> bool:
    return any(inside(name, block) for block in blocks)
