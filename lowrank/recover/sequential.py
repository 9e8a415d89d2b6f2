"""Sequential refit: every layer is refitted to the inputs it reads in the compressed model.

Streams run through the model block by block: the dense one, and one of each compressed model, so
that candidates share the dense one. Layers that read the same tensor are refitted together in
closed form (linalg/refit.py), in call order, so that each corrects the error of those before it.
Layers outside of all chains, and those of a chain that cannot be run block by block, are refitted
in forward passes of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain as chained
from typing import Any

from torch import Tensor, nn

from ..calibration.chain import Chain, NotInBlocks
from ..calibration.observation import inside
from ..calibration.processes import dealt, in_step
from ..calibration.rare import routed
from ..calibration.running import forward, quiet
from ..errors import listed
from ..linalg.mapped import give_back, kept, settled
from ..nn.expert_weights import ExpertWeights
from ..nn.few_shapes import even_ranks
from ..types import Site
from ..walk.surgery import module_at, put
from .additions import added_to
from .streams import MOST, Memo, Moments, Run, Streams
from .workbench import Workbench


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
        shrinkage: of its moments, see `Recovery`.
    """

    model: nn.Module
    sites: Sequence[Site]
    fit: Callable[[Site, Moments | None], nn.Module]
    after_block: Callable[[Chain, int, list[Tensor]], None] | None = None
    restored: Callable[[str], Sequence[str] | None] = lambda _: None
    finished: Callable[[str, Sequence[Site], Sequence[str]], None] = lambda *_: None
    shrinkage: float = 0.0

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
    _routed: set[str] = field(init=False)

    def __post_init__(self) -> None:
        calibration = self.bench.calibration
        counts = {name: stats.count for name, stats in calibration.statistics.items()}
        groups = routed(counts, calibration.observation.chains)
        self._routed = {name for names in groups for name in names}

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
            added = self._added(group, runs(self.bench.model))
            self._refit([group], runs(self.bench.model), lean, added)

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
        dense, *lean = lanes = self._lanes(names)
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
            levels = self._levels(mine)
            first = [] if done else dense.runs(index)[:1]
            added = self._added([site for group in mine for site in group], first, name)
            for level in () if done else levels:
                runs, *lean_runs = (lane.runs(index)[: self.fitted] for lane in lanes)
                last = level is levels[-1]
                after = self._refit(level, runs, lean_runs, added, to_the_end=last)
                for group in level:
                    waiting.remove(group)
                    for lane in lanes:
                        lane.finished += [site.name for site in group]
            dense.advance(index, after)
            for student, lane in zip(self.students, lean, strict=True):
                lane.chain.refresh(student.model)
                if student.after_block is not None and not done:
                    student.after_block(lane.chain, index, dense.chain.hidden)
                    lane.forget()
                if not done:
                    sites = student.among([site for group in mine for site in group])
                    student.finished(name, sites, [t for t in self._unpaired if t not in before])
                lane.advance(index)
            give_back()

    def _lanes(self, names: Sequence[str]) -> list[_Lane]:
        """These blocks in the dense model, and in each student."""
        lanes: list[_Lane] = []
        most = MOST // (1 + len(self.students))

        def record() -> None:
            lanes.append(_Lane(self.bench.model, self.bench.dense_chain(names, self.numbers), most))
            for student in self.students:
                chain = self.bench.chain(student.model, names, self.numbers)
                lanes.append(_Lane(student.model, chain, most))

        in_step(record)
        return lanes

    def _refit(
        self,
        level: Sequence[Sequence[Site]],
        dense: Sequence[Run],
        lean: Sequence[Sequence[Run]],
        added: Mapping[str, str],
        *,
        to_the_end: bool = False,
    ) -> list[Any]:
        """Replace groups of sites that read one tensor each in all students; see `Streams` for
        the rest.

        Args:
            added: see `added_to`.
        """
        every = [site for group in level for site in group]
        concerned = [i for i, student in enumerate(self.students) if student.among(every)]
        models, firsts = [self.students[i].model for i in concerned], [group[0] for group in level]
        observed = self.bench.calibration.observation
        streams = Streams(
            firsts, self.bench.model, models,
            added=[added.get(group[0].name) if len(group) == 1 else None for group in level],
            calls=observed.calls.get(firsts[0].name, 0) if len(firsts) == 1 else 0,
            routed=firsts[0].name in self._routed, to_the_end=to_the_end,
        )  # fmt: skip

        def run() -> list[tuple[int, bool, bool]]:
            numbers = self.numbers[: self.fitted]
            reals = [[self.bench.real(site.name, number) for site in firsts] for number in numbers]
            streams.run(dense, [lean[i] for i in concerned], reals)
            return [(s.count, s.paired, s.added) for each in streams.sums for s in each]

        found = in_step(run)
        if self.shared:
            for sums, *parts in zip(chained(*streams.sums), *found, strict=True):
                sums.add_up(parts)
        for group, each in zip(level, streams.sums, strict=True):
            self._replace(group, dict(zip(concerned, each, strict=True)))
        return streams.outputs

    def _added(self, sites: Sequence[Site], runs: Sequence[Run], block: str = "") -> dict[str, str]:
        """`added_to` of linear layers, as the first process with a batch sees it.

        Args:
            runs: of the dense model or its block; the first one is made.
        """
        names = {site.name for site in sites if site.kind == "linear"}
        if not names:
            return {}

        def run() -> dict[str, str] | None:
            return added_to(self.bench.model, names, runs[0], block) if runs else None

        return next((each for each in in_step(run) if each is not None), {})

    def _levels(self, groups: Sequence[list[Site]]) -> list[list[list[Site]]]:
        """The groups that one run can read, in order: the experts of one weight, or a single
        one."""
        levels: dict[str, list[list[Site]]] = {}
        for group in groups:
            name = group[0].name
            weight = name.rpartition(".")[0]
            is_expert = isinstance(module_at(self.bench.model, weight), ExpertWeights)
            levels.setdefault(weight if is_expert else name, []).append(group)
        return list(levels.values())

    def _replace(self, group: Sequence[Site], streams: Mapping[int, Any]) -> None:
        """Replace sites that read one tensor.

        Args:
            streams: by student, the sums of its inputs.
        """
        if not all(sums.paired for sums in streams.values()):
            self._unpaired[group[0].title] = None
        moments = {i: sums.moments(self.students[i].shrinkage) for i, sums in streams.items()}
        # All students' layers of a site in turn: they share its metric of the outputs.
        pairs = [(i, s) for s in group for i in streams if s in self.students[i].sites]
        fits = (partial(self.students[i].fit, site, moments[i]) for i, site in pairs)
        for (i, site), new in zip(pairs, dealt(fits), strict=True):
            put(self.students[i].model, site, settled(new))


class _Lane:
    """A chain in one of the models.

    Attributes:
        finished: layers of the current block that will not change any more.
    """

    def __init__(self, model: nn.Module, chain: Chain, most: int) -> None:
        """
        Args:
            most: bytes of outputs of finished layers to keep.
        """
        self.model, self.chain, self._most = model, chain, most
        self.forget()

    def forget(self) -> None:
        """Begin a block, or count none of its layers as finished."""
        self.finished: list[str] = []
        self._memo = Memo(self._most)

    def runs(self, index: int) -> list[Run]:
        """Runs of a block, one per batch."""
        return [partial(self._run, index, batch) for batch in range(len(self.chain.hidden))]

    def _run(self, index: int, batch: int) -> Tensor:
        block = self.chain.block(index)
        with even_ranks(block), self._memo.used(self.model, batch, self.finished):
            return self.chain.run(index, batch, self.chain.hidden[batch])

    def advance(self, index: int, known: Sequence[Any] = ()) -> None:
        """Carry the hidden states through a block; `known` are its first outputs."""

        def run() -> None:
            with quiet(self.chain.block(index)):
                rest = range(len(known), len(self.chain.hidden))
                outputs = [kept(self._run(index, batch)) for batch in rest]
            self.chain.hidden = [*known, *outputs]

        in_step(run)
        self.forget()


def _within(name: str, blocks: Collection[str] | Mapping[str, object]) -> bool:
    return any(inside(name, block) for block in blocks)
