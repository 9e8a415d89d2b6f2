"""Sequential refit: every layer is refitted to the inputs it reads in the compressed model.

Two streams run through the model block by block, the dense one and the compressed one. Layers that
read the same tensor are refitted together in closed form (linalg/refit.py), in call order, so that
each corrects the error of those before it. Layers outside of all chains, and those of a chain that
cannot be run block by block, are refitted in forward passes of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..calibration.chain import Chain, NotInBlocks
from ..calibration.observation import inside
from ..calibration.running import first_tensor, forward, quiet, without_cache
from ..calibration.statistics import counted_rows
from ..errors import LowrankError, listed
from ..linalg import cross_sum, gram_sum
from ..linalg.mapped import settled
from ..types import Site
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


@dataclass
class SequentialPass:
    """One pass over a compressed twin of the workbench's model.

    Attributes:
        student: the twin, in which layers are replaced.
        numbers: indices of the batches to run.
        fitted: number of those, from the first, that the moments are taken from.
        fit: returns the new layer of a site, given the moments of its input, None if it saw no
            token.
        after_block: called once all sites of a block are replaced, with the student's chain, the
            block's index and the dense outputs; may train the block.
        on_block: called with the name of each block before its turn; "" outside of blocks.
    """

    bench: Workbench
    student: nn.Module
    numbers: Sequence[int]
    fitted: int
    fit: Callable[[Site, Moments | None], nn.Module]
    after_block: Callable[[Chain, int, list[Tensor]], None] | None = None
    on_block: Callable[[str], None] = lambda _: None
    _whole_chains: dict[str, list[str]] = field(default_factory=dict)  # why -> names
    _unpaired: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Sentences about what could not be done as planned, for the report."""
        skipped = "" if self.after_block is None else "; block refit was skipped there"
        notes = [
            f"refitted in passes of the whole model, not block by block: {listed(names, 3)} "
            f"({why}){skipped}"
            for why, names in self._whole_chains.items()
        ]
        if self._unpaired:
            notes.append(
                f"refitted to the compressed model's inputs alone, since other tokens reach them "
                f"than in the dense model: {len(self._unpaired)} layers: "
                f"{listed(self._unpaired, 3)}"
            )
        return notes

    def run(self, sites: Sequence[Site]) -> None:
        """Replace the sites, block by block.

        Layers outside all chains are refitted in forward passes of the whole model: those called
        before the first chain come first, the others last.

        Args:
            sites: of the dense model; those that were never called are left to the caller.
        """
        observed = self.bench.calibration.observation
        wanted = {site.name: site for site in sites}
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
        for group in groups:
            self.on_block("")
            dense, lean = (
                [lambda b=batch, m=model: forward(m, b) for batch in batches]
                for model in (self.bench.model, self.student)
            )
            self._replace(group, self._moments(group[0], dense, lean))

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
        dense = self.bench.dense_chain(names, self.numbers)
        lean = self.bench.chain(self.student, names, self.numbers)
        for index, name in enumerate(names):
            self.on_block(name)
            for group in [each for each in waiting if _within(each[0].name, [name])]:
                runs = [_block_runs(chain, index)[: self.fitted] for chain in (dense, lean)]
                self._replace(group, self._moments(group[0], *runs))
                waiting.remove(group)
            lean.refresh(self.student)
            after = dense.outputs(index)
            if self.after_block is not None:
                self.after_block(lean, index, after)
            dense.hidden, lean.hidden = after, lean.outputs(index)

    def _replace(self, group: Sequence[Site], moments: Moments | None) -> None:
        for site in group:
            put(self.student, site, settled(self.fit(site, moments)))

    def _moments(self, site: Site, dense: Sequence[Run], lean: Sequence[Run]) -> Moments | None:
        """Moments of a site's input in both streams, batch by batch; None if it saw no token.

        Where other tokens reach it in the compressed model, as experts of a mixture, its rows have
        no partners: then both streams are the compressed one.
        """
        count, sums, paired = 0, [torch.zeros(()) for _ in range(4)], True
        model, student = self.bench.model, self.student
        dense_layer, lean_layer = module_at(model, site.name), module_at(student, site.name)
        reals = [self.bench.real(site.name, number) for number in self.numbers[: self.fitted]]
        with quiet(model), quiet(student), without_cache(model), without_cache(student):
            for run_dense, run_lean, real in zip(dense, lean, reals, strict=True):
                x, y = _inputs(dense_layer, run_dense), _inputs(lean_layer, run_lean)
                if [t.shape for t in x] != [t.shape for t in y]:
                    x, paired, real = y, False, []
                for dense_rows, rows in _pairs(site.module, x, y, real):
                    new = _sums(site, dense_rows, rows)
                    sums = [n if not count else s + n for s, n in zip(sums, new, strict=True)]
                    count += len(rows)
        if not paired:
            self._unpaired.append(site.title)
        if not count:
            return None
        gram, cross, mean, dense_mean = (total / count for total in sums)
        if not paired:
            cross, dense_mean = gram, mean
        return Moments(count, gram, cross, mean, dense_mean)


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


def _inputs(module: nn.Module, run: Run) -> list[Tensor]:
    """Every input tensor of the module in one run, cloned against later in-place changes."""
    read: list[Tensor] = []

    def hook(_module: nn.Module, args: object, kwargs: object) -> None:
        tensor = first_tensor((args, kwargs))
        if tensor is not None:
            read.append(tensor.clone())

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return read


def _within(name: str, blocks: Collection[str] | Mapping[str, object]) -> bool:
    return any(inside(name, block) for block in blocks)
