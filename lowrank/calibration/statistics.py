"""Calibration: statistics of a model on some data, one Gram matrix per distinct input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..types import Curve, Site, Statistics
from ..walk.checks import check_model, ordinary_tensors
from ..walk.parts import parts_apart
from ..walk.sites import find_sites, tied_heads
from . import self_written
from .batches import (
    LENGTH,
    ROWS,
    Batch,
    Data,
    Forward,
    Reading,
    as_dense,
    check_rows,
    first_rows,
    is_padded,
    parted,
    read_rows,
    rebatched,
    rows_in,
)
from .digests import data_print
from .gathering import gather_statistics, run_all
from .independence import rows_depend
from .observation import Frequencies, Observation, observe
from .padding import Padding, unsquared
from .processes import (
    agreed,
    check_same,
    check_unwrapped,
    in_step,
    is_main,
    rank,
    world,
)
from .rare import routed, shrink
from .running import Unpadded, few_rows, reads_ids

Fed = tuple[Reading, str, bool]
SELF = "self"  # as `data`: the model writes it


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a model on some data; accepted as `data=` everywhere.

    Attributes:
        statistics: per site name; sites that read one tensor share one object.
        observation: order of calls, groups of sites that read one tensor, chains of blocks.
        batches: the data, ready to be run again, or the caller's own callable.
        tokens: the most input vectors that any linear layer saw; without one, the most lookups.
        min_tokens: a site that saw fewer follows `on_missing`.
        source: where the data came from if the model wrote it itself, else "".
        held_out: batches kept out of the statistics, for evaluation.
        padded: sites some of whose positions may be padding: no mask fits what they read.
        whole: a part of a batch gives other outputs than in the whole, as the nodes of a graph do:
            no batch is cut.
        rows_read: how many rows were read, where the data may go on after them; 0: all of it.
        spectra: curves from these statistics, cached for the next ratio: by method, storage and
            weight, with the statistics that each was made from.
    """

    statistics: dict[str, Statistics]
    observation: Observation
    batches: list[Batch] | Forward
    tokens: int
    min_tokens: int = 1
    source: str = ""
    held_out: tuple[Batch, ...] = ()
    padded: tuple[str, ...] = ()
    whole: bool = False
    rows_read: int = 0
    spectra: dict[str, tuple[Statistics, Curve]] = field(default_factory=dict)


@ordinary_tensors()
@parts_apart
def calibrate(
    model: nn.Module,
    data: Data | Calibration,
    *,
    tokenizer: Any = None,
    length: int = LENGTH,
    rows: int | None = None,
    min_tokens: int = 1,
    seed: int = 0,
    hold_out: float = 0.0,
    progress: bool = True,
    sites: Sequence[Site] | None = None,
) -> Calibration:
    """Gather E[x xᵀ] and E[x] of every linear layer's input, and the lookup counts of embeddings.

    An embedding tied to the output head has both, under the embedding's name.

    Padded positions are left out wherever it is known which they are (`padding`); elsewhere all
    positions count, and `padded` names the layers.

    With several processes of torch.distributed all of them call this with the same data; each runs
    its share of the rows, and the sums over all are the same on each.

    Args:
        data: see `materialise`; or "self": text that a causal language model writes itself. A
            finished calibration is returned as it is.
        length: tokens per row of cut or written texts.
        rows: read the data to this number of rows and no further, or write as many. Default: a
            stream (a generator, loader or data set) is read to 256 rows, or of texts to 256 × 256
            tokens; texts, lists and tensors are taken whole; 192 are written.
        min_tokens: a site that saw fewer tokens counts as unseen.
        seed: of the text that the model writes.
        hold_out: share of the rows, the last ones, held out for evaluation; none of a callable.
        sites: all of the model, if already known.

    Raises:
        LowrankError: no layer was reached, an activation is NaN or Inf, or an id is out of range
            (its site is named); `rows` are asked of a callable or a finished calibration; the
            processes were given different data.
    """
    check_model(model)
    check_unwrapped(model)
    if isinstance(data, Calibration):
        if rows is not None:
            raise LowrankError(f"rows={rows} would change nothing: the calibration is finished")
        return data
    progress = progress and is_main()
    fed = _alike(lambda: _fed(model, data, tokenizer, length, rows, seed, progress))
    try:
        return _gathered(model, fed, sites, hold_out, min_tokens, progress)
    except LowrankError:
        batches, whole = fed[0].batches, fed[2]
        if whole or callable(batches) or world() > 1 or not _depends(model, batches):
            raise
    return _gathered(model, (*fed[:2], True), sites, hold_out, min_tokens, progress)


def _gathered(
    model: nn.Module,
    fed: Fed,
    sites: Sequence[Site] | None,
    hold_out: float,
    min_tokens: int,
    progress: bool,
) -> Calibration:
    """The calibration on data that was read."""
    (batches, rows_read), source, whole = fed
    batches, held_out = parted(batches, hold_out, whole=whole)
    padding, batches, run = _to_run(model, batches, whole)
    free = [site for site in sites or find_sites(model) if not site.reason]
    tables = [site for site in free if site.kind == "embedding"]
    heads = tied_heads(model, tables)
    readers = [site for site in free if site.kind in ("linear", "conv")] + list(heads.values())
    first = run if callable(run) else run[:1]
    with Frequencies(tables, padding):  # for its error about bad ids, in the first pass too
        observation = observe(
            model, readers, lambda: run_all(model, first, padding, progress=False)
        )
    share = run if whole or callable(run) or world() == 1 else rebatched(run)
    statistics, groups, lookups = gather_statistics(
        model, share, observation, readers, tables, padding, progress
    )
    counts = {name: stats.count for name, stats in statistics.items()}
    shrink(statistics, routed(counts, observation.chains), "gram")
    tokens = _add_lookups(statistics, tables, heads, lookups)
    if tokens == 0:
        hint = (
            "it is called more than once, so it must not exhaust an iterator"
            if callable(batches)
            else "does it run this model?"
        )
        raise LowrankError(f"the calibration data reached none of {len(free)} layers: {hint}")
    observation = replace(observation, groups=groups)
    padded = tuple(padding.uncertain)
    return Calibration(
        statistics,
        observation,
        batches,
        tokens,
        min_tokens,
        source,
        held_out,
        padded,
        whole,
        rows_read,
    )


def _to_run(
    model: nn.Module, batches: list[Batch] | Forward, whole: bool
) -> tuple[Padding | Unpadded, list[Batch] | Forward, list[Batch] | Forward]:
    """What follows the padding, the batches in which it can be followed, and these as they fit."""
    if callable(batches):
        return Padding(model), batches, batches
    padding, batches = followed(model, batches, whole=whole)
    return padding, batches, fewer(model, batches, whole=whole)


def _add_lookups(
    statistics: dict[str, Statistics],
    tables: Sequence[Site],
    heads: Mapping[str, Site],
    lookups: Frequencies,
) -> int:
    """Put the tables among the statistics, their tied heads under their names; the tokens seen."""
    read = max((stats.count for stats in statistics.values()), default=0)
    for site in tables:
        head = heads.get(site.name)
        known = None if head is None else statistics.pop(head.name)
        statistics[site.name] = lookups.statistics(site.name, known)
    return read or max((stats.count for stats in statistics.values()), default=0)


def followed(
    model: nn.Module, batches: Sequence[Batch], *, whole: bool = False
) -> tuple[Padding | Unpadded, list[Batch]]:
    """What follows the padding through the model, and the batches, in which it can be followed.

    Args:
        whole: rows are not independent, and not cut.
    """
    if any(is_padded(batch) for batch in batches):
        return Padding(model), list(batches) if whole else unsquared(model, batches)
    return Unpadded(), list(batches)


def statistics_of(site: Site, calibration: Calibration | None) -> Statistics:
    """The statistics of a site's input; count 0 if the calibration has none.

    Raises:
        LowrankError: the calibration saw inputs of another width.
    """
    stats = Statistics()
    if calibration is not None:
        stats = calibration.statistics.get(site.name, stats)
    if stats.gram is not None and len(stats.gram) != site.shape[1]:
        raise LowrankError(
            f"{site.title}: the calibration saw inputs of width {len(stats.gram)}, the layer reads "
            f"{site.shape[1]}: it was made for another model"
        )
    if stats.freq is not None and len(stats.freq) != site.shape[0]:
        raise LowrankError(
            f"{site.title}: the calibration counted {len(stats.freq)} ids, the table has "
            f"{site.shape[0]}: it was made for another model"
        )
    return stats


def only_zeros(stats: Statistics) -> bool:
    """Whether all inputs were zero: any factors fit them, and they show none that are good."""
    return stats.gram is not None and float(stats.gram.diagonal().sum()) == 0


def doubts(sites: Sequence[Site], calibration: Calibration) -> list[str]:
    """Warnings about layers with too little data, and about padding in it.

    Of inputs that are always zero, and of fewer distinct inputs than features: a convolution then
    keeps no more than these need, however much was asked.
    """
    read = [
        (site, stats)
        for site, stats in ((site, statistics_of(site, calibration)) for site in sites)
        if site.kind in ("linear", "conv") and stats.count
    ]
    zero = [s.title for s, stats in read if only_zeros(stats)]
    share = _distinct(calibration)
    few = [s.title for s, stats in read if s.title not in zero and stats.count * share < s.shape[1]]
    padded = [s.title for s, _ in read if s.name in calibration.padded]
    warnings = []
    if calibration.whole:
        warnings.append(
            "a part of a batch gave other outputs than in the whole batch, as the nodes of a graph "
            "do: batches were kept whole, and held out whole"
        )
    if calibration.rows_read:
        warnings.append(
            f"the data was read to {calibration.rows_read:,} rows and may go on: rows=… reads more"
        )
    if padded:
        warnings.append(
            f"padding may be counted in the inputs of {len(padded)} layers: no mask fits what they "
            f"read: {listed(padded, 3)}"
        )
    if zero:
        warnings.append(
            f"all inputs of {len(zero)} layers are zero, so that their factors are arbitrary: "
            f"{listed(zero, 3)}"
        )
    if few:
        warnings.append(
            f"{len(few)} layers saw fewer distinct inputs than they have features, so that their "
            f"factors are poorly determined: {listed(few, 3)}"
        )
    return warnings


def _stays_whole(model: nn.Module, batches: list[Batch] | Forward) -> bool:
    """Whether batches must not be cut; measured once, on the first that could be.

    Rows of ids that a model of transformers reads are independent, and no pass is spent on them
    unless the model fails on some.
    """
    if callable(batches):
        return False
    return _depends(model, [batch for batch in batches if not reads_ids(model, batch)])


def _depends(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether the first batch with several rows is more than its rows."""
    batch = next((batch for batch in batches if rows_in(batch) > 1), None)
    return batch is not None and rows_depend(model, batch)


def _fed(
    model: nn.Module,
    data: Data,
    tokenizer: Any,
    length: int,
    rows: int | None,
    seed: int,
    progress: bool,
) -> Fed:
    """The data, its source if the model wrote it, and whether its batches stay whole."""
    check_rows(rows)
    if isinstance(data, str) and data == SELF:
        written = self_written.written_batches(
            model, length=length, seed=seed, rows=rows, progress=progress
        )
        about = self_written.described(model, length=length, seed=seed, rows=rows)
        return Reading(written), about, False
    if isinstance(data, Reading):
        reading = data
    else:
        reading = read_rows(data, tokenizer, length=length, rows=rows)
    batches, whole = reading.batches, _stays_whole(model, reading.batches)
    if rows is None or whole or callable(batches) or sum(map(rows_in, batches)) <= rows:
        return reading, "", whole
    return Reading(first_rows(batches, rows), rows), "", whole


def _alike(read: Callable[[], Fed]) -> Fed:
    """What is read, on every process the same.

    Raises:
        LowrankError: the processes read different data.
    """
    if world() == 1:
        return read()
    found: list[Fed] = []

    def printed() -> str:
        found.append(read())
        batches = found[0][0].batches
        return "a callable" if callable(batches) else data_print(batches)

    prints = in_step(printed)
    if found[0][1]:  # written by the model: another machine's rounding may change a token
        return agreed(found[0])
    check_same(data=prints[rank()])
    return found[0]


def fewer(model: nn.Module, batches: Sequence[Batch], *, whole: bool = False) -> list[Batch]:
    """The batches in smaller ones, where their logits would take much memory; not if they stay
    `whole`."""
    if whole:
        return list(batches)
    parts: list[Batch] = []
    for batch in batches:
        rows = few_rows(model, batch)
        parts += rebatched([batch], rows) if rows < ROWS else [batch]
    return parts


def _distinct(calibration: Calibration) -> float:
    """The number of distinct rows over that of all rows, or of batches that stay whole; 1 for a
    callable."""
    if callable(calibration.batches):
        return 1.0
    whole = calibration.whole
    rows = calibration.batches if whole else rebatched(calibration.batches, 1)
    return len({_key(row) for row in rows}) / max(len(rows), 1)


def _key(row: Batch) -> int:
    """Equal for equal rows."""
    parts = {"": row} if isinstance(row, Tensor) else row
    tensors = [
        as_dense(v).cpu().flatten() for _, v in sorted(parts.items()) if isinstance(v, Tensor)
    ]
    return hash(tuple(v.contiguous().view(torch.uint8).numpy().tobytes() for v in tensors))
