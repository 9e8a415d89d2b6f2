"""The sequential pass: every layer is refitted to the inputs that it will really read.

Two streams run through the model block by block, the dense one and that of the compressed copy.
Layers that read one tensor are refitted together in closed form (linalg/refit.py), in the order of
their calls, so that each corrects what those before it lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.observation import Observation
from ..calibration.running import first_tensor, forward, mask_of, quiet, without_cache
from ..calibration.statistics import counted_rows
from ..errors import LowrankError
from ..linalg import cross_sum, gram_sum
from ..types import Site
from ..walk.surgery import module_at, put
from .chain import Chain

Runs = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Moments:
    """What a refit needs of one distinct input, per token, float64.

    Attributes:
        count: tokens.
        gram: E[x'x'ᵀ] (in, in) of the compressed stream.
        cross: E[x x'ᵀ] (in, in), x of the dense stream.
        mean, dense_mean: E[x'] and E[x], (in,).
    """

    count: int
    gram: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor


Fit = Callable[[Site, Moments], nn.Module]
AfterBlock = Callable[[Chain, int, list[Tensor]], None]


def sequential(
    model: nn.Module,
    student: nn.Module,
    sites: Sequence[Site],
    seen: Observation,
    batches: Sequence[Batch],
    fit: Fit,
    *,
    counted: int | None = None,
    after_block: AfterBlock | None = None,
    on_block: Callable[[str], None] = lambda _: None,
) -> None:
    """Replace the sites in `student`, block by block; `model` is the dense one and is not changed.

    Args:
        student: a twin of the model. Layers outside every chain are refitted in passes of the whole
            model, those called before the first chain first.
        sites: of the model, to be replaced; one that was never called is left to the caller.
        fit: makes the new layer of a site from the moments of its input.
        counted: how many of the batches, the first ones, the moments are taken from; None: all. The
            others run along, for whoever judges by them.
        after_block: called with the student's chain, the block's index and the dense outputs when
            all sites of a block are replaced; it may train the block.
        on_block: told the name of each block before it is worked on.

    Raises:
        LowrankError: a chain cannot be run block by block.
    """
    wanted = {site.name: site for site in sites}
    groups = [[wanted[name] for name in group if name in wanted] for group in seen.groups]
    groups = [group for group in groups if group]
    inside = {name for chain in seen.chains for name in chain}
    first = _first_call(seen, inside)
    outer = [group for group in groups if not _within(group[0].name, inside)]
    early = [g for g in outer if seen.order.index(g[0].name) < first]
    masks = [mask_of(batch) for batch in batches[:counted]]

    def whole(some: Iterable[list[Site]]) -> None:
        for group in some:
            on_block("")
            runs = [_passes(part, batches[:counted]) for part in (model, student)]
            _replace(student, group, _moments(model, student, group[0], runs, masks), fit)

    whole(early)
    for names in seen.chains:
        mine = [group for group in groups if _within(group[0].name, set(names))]
        if mine:
            _chain(model, student, names, mine, batches, masks, fit, after_block, on_block)
    whole(group for group in outer if group not in early)


def _chain(
    model: nn.Module,
    student: nn.Module,
    names: Sequence[str],
    groups: Sequence[list[Site]],
    batches: Sequence[Batch],
    masks: Sequence[Tensor | None],
    fit: Fit,
    after_block: AfterBlock | None,
    on_block: Callable[[str], None],
) -> None:
    dense, lean = Chain(model, names, batches), Chain(student, names, batches)
    for index, name in enumerate(names):
        on_block(name)
        for group in groups:
            if _within(group[0].name, {name}):
                runs = [_block_runs(chain, index)[: len(masks)] for chain in (dense, lean)]
                _replace(student, group, _moments(model, student, group[0], runs, masks), fit)
        lean.refresh(student)
        after = dense.outputs(index)
        if after_block is not None:
            after_block(lean, index, after)
        dense.hidden, lean.hidden = after, lean.outputs(index)


def _block_runs(chain: Chain, index: int) -> list[Runs]:
    return [
        lambda b=batch, h=hidden: chain.run(index, b, h)  # type: ignore[misc]
        for batch, hidden in enumerate(chain.hidden)
    ]


def _passes(model: nn.Module, batches: Sequence[Batch]) -> list[Runs]:
    return [lambda b=batch: forward(model, b) for batch in batches]  # type: ignore[misc]


def _replace(student: nn.Module, group: Sequence[Site], moments: Moments | None, fit: Fit) -> None:
    if moments is None:
        return
    for site in group:
        put(student, site, fit(site, moments))


def _moments(
    model: nn.Module,
    student: nn.Module,
    site: Site,
    runs: Sequence[Sequence[Runs]],
    masks: Sequence[Tensor | None],
) -> Moments | None:
    """Both streams' inputs of one site, batch by batch; None where it saw no token."""
    count, sums = 0, [torch.zeros(()) for _ in range(4)]
    there = {"dense": module_at(model, site.name), "lean": module_at(student, site.name)}
    for run_dense, run_lean, mask in zip(*runs, masks, strict=True):
        with quiet(model), quiet(student), without_cache(model), without_cache(student):
            x = _inputs(there["dense"], run_dense)
            y = _inputs(there["lean"], run_lean)
        if [t.shape for t in x] != [t.shape for t in y]:
            raise LowrankError(f"{site.title}: the streams differ in shape")
        for dense_rows, rows in _pairs(site.module, x, y, mask):
            found = _sums(site, dense_rows, rows)
            sums = [new if not count else old + new for old, new in zip(sums, found, strict=True)]
            count += len(rows)
    return Moments(count, *(each / count for each in sums)) if count else None


def _pairs(
    module: nn.Module, dense: Sequence[Tensor], lean: Sequence[Tensor], mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The vectors (rows, in) that a layer reads in both streams, some at a time."""
    for x, y in zip(dense, lean, strict=True):
        yield from zip(counted_rows(module, x, mask), counted_rows(module, y, mask), strict=True)


def _sums(site: Site, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of rows (rows, in) of the dense and of the compressed stream."""
    found = (gram_sum(y), cross_sum(x, y), y.double().sum(0), x.double().sum(0))
    if not bool(torch.isfinite(found[0].diagonal()).all()):
        raise LowrankError(
            f"{site.title}: its input holds NaN or Inf in the compressed model, and not in the "
            "dense one: run it in float32 or bfloat16, or leave out the layers before it"
        )
    return found


def _inputs(module: nn.Module, run: Runs) -> list[Tensor]:
    """Every tensor that the module reads in one run, safe from later changes in place."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: object, kwargs: object) -> None:
        tensor = first_tensor((args, kwargs))
        if tensor is not None:
            found.append(tensor.clone())

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found


def _within(name: str, blocks: set[str] | Mapping[str, object]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _first_call(seen: Observation, inside: set[str]) -> int:
    """Position in the order of calls at which the first chain begins."""
    return next((i for i, name in enumerate(seen.order) if _within(name, inside)), 0)
