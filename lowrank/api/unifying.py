"""One hashed table in the place of many embeddings, before training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from ..errors import LowrankError, listed
from ..measure.size import model_cost
from ..nn.table_form import table_options
from ..nn.unified_table import UnifiedEmbedding, UnifiedReader
from ..plans.entry import Entry
from ..plans.plan import Plan, versions
from ..plans.report import Measured, Report
from ..types import Cost, Option, Site
from ..walk import layouts
from ..walk.checks import check_model
from ..walk.sites import ALL, Patterns, find_sites, select_sites
from ..walk.surgery import adopt, copied, swap


def unify_tables(
    model: nn.Module,
    ratio: float,
    *,
    target_modules: Patterns = ALL,
    exclude_modules: Patterns | None = None,
    lookups: int = 2,
    seed: int = 0,
    copy: bool = False,
) -> tuple[nn.Module, Report]:
    """Let all embeddings of an untrained model read one hashed table (arXiv 2305.12102).

    Every id reads `lookups` rows of it, at places of its own, one after the other. The table is
    drawn with the scale of the embeddings', which are given up: nothing of a trained model would
    be left. Wider embeddings read more rows than the narrowest.

    Args:
        model: changed in place and returned; it holds the embeddings and is not one itself.
        ratio: numbers of the shared table for one of the embeddings'; in (0, 1).
        target_modules, exclude_modules: as for `compress`; layers that are no nn.Embedding or
            nn.EmbeddingBag are left alone.
        lookups: rows that an id of the narrowest embedding reads; its width is a multiple of it.
        seed: of the hashes and of the table.
        copy: work on a deep copy.

    Returns:
        The model and a Report.

    Raises:
        LowrankError: an argument or an embedding is invalid; the model is then unchanged.
    """
    started = time.perf_counter()
    check_model(model)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise LowrankError(f"ratio is the fraction kept, in (0, 1), got {ratio!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (lookups, seed)) or seed < 0:
        raise LowrankError(f"lookups and seed are integers, seed >= 0, got {lookups!r}, {seed!r}")
    model = copied(model) if copy else model
    every = select_sites(find_sites(model), model, target_modules, exclude_modules)
    sites = [site for site in every if site.kind == "embedding" and not site.reason]
    width = _checked(sites, every, lookups)
    numbers = sum(site.cost.params for site in sites)
    rows = math.floor(ratio * numbers / width)
    if rows < 1:
        raise LowrankError(f"ratio={ratio} of {numbers:,} numbers leaves no row of {width}")
    before = model_cost(model, every)
    entries = _entries(every, sites, rows, width)
    made = _made(sites, rows, width, seed)
    for site, new in zip(sites, made, strict=True):
        adopt(new, site.module)
    swap(model, {id(m): new for s, new in zip(sites, made, strict=True) for m in s.modules})
    asked = {"ratio": ratio, "of": "targets", "unit": "params"}
    settings = {"method": "unified", "policy": "one table", "storage": "unified", "seed": seed,
                "versions": versions()}  # fmt: skip
    after = model_cost(model, [site for site in every if site not in sites])
    return model, Report(
        plan=Plan(tuple(entries), before, asked, settings),
        sites=tuple(Measured(s.name, "", None, None, None, None, 0.0) for s in sites),
        achieved=rows * width / numbers, achieved_of_model=after.params / max(before.params, 1),
        params_before=before.params, params_after=after.params,
        bytes_before=before.bytes, bytes_after=after.bytes,
        seconds=time.perf_counter() - started, tokens=0, seed=seed, versions=versions(),
    )  # fmt: skip


def _checked(sites: Sequence[Site], every: Sequence[Site], lookups: int) -> int:
    """The width of the shared table, that of the narrowest embedding over `lookups`.

    Raises:
        LowrankError: there are no embeddings, or they cannot share a table; the site is named.
    """
    if not sites:
        reasons = listed(f"{site.title}: {site.reason or 'no embedding'}" for site in every)
        raise LowrankError(f"no embedding can share a table: {reasons or 'the model has none'}")
    narrow = min(site.shape[1] for site in sites)
    if lookups < 1 or narrow % lookups:
        raise LowrankError(
            f"lookups must divide the width of the narrowest embedding, {narrow}, got {lookups}"
        )
    width = narrow // lookups
    for site in sites:
        if not site.name:
            raise LowrankError("the model is one embedding: put it into a module, or use another "
                               "method")  # fmt: skip
        if layouts.head_count(site.modules):
            raise LowrankError(
                f"{site.title} is tied to an output head, which cannot read a hashed table: "
                f"exclude it (exclude_modules=[{site.name!r}])"
            )
        if site.shape[1] % width:
            raise LowrankError(
                f"{site.title} is {site.shape[1]} wide, no multiple of the {width} numbers of a "
                "row: give other lookups, or exclude it"
            )
    for one, other in pairwise(sites):
        if _kept(one) != _kept(other):
            raise LowrankError(
                f"{one.title} and {other.title} cannot share a table: sparse, scale_grad_by_freq, "
                f"dtype and device are {_kept(one)} and {_kept(other)}: exclude one of them"
            )
    return width


def _kept(site: Site) -> tuple[object, ...]:
    """What the shared table has from each of its features."""
    options, weight = table_options(site.module), layouts.matrix(site.module)
    how = (options.get("sparse", False), options.get("scale_grad_by_freq", False))
    return *how, weight.dtype, weight.device, weight.requires_grad


def _made(
    sites: Sequence[Site], rows: int, width: int, seed: int
) -> list[UnifiedEmbedding | UnifiedReader]:
    """The modules in the order of the sites; the first has the table."""
    made: list[UnifiedEmbedding | UnifiedReader] = []
    for feature, site in enumerate(sites):
        kind = UnifiedReader if feature else UnifiedEmbedding
        new = kind.like(site.module, rows, site.shape[1] // width, feature=feature, seed=seed)
        made.append(new)
    first = made[0]
    assert isinstance(first, UnifiedEmbedding)
    weights = [layouts.matrix(site.module).detach() for site in sites]
    energy = sum(float(weight.double().square().sum()) for weight in weights)
    scale = (energy / sum(weight.numel() for weight in weights)) ** 0.5
    rng = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=rng, dtype=torch.float64) * scale
    first.set_table(table.to(weights[0]))
    for new in made[1:]:
        new.bind(first)
    return made


def _entries(every: Sequence[Site], sites: Sequence[Site], rows: int, width: int) -> list[Entry]:
    """An entry for every site; the whole table counts for the first embedding."""
    found = []
    for site in every:
        if site not in sites:
            found.append(replace(Entry.of(site), target=False))
            continue
        numbers = rows * width if site is sites[0] else 0
        cost = Cost(numbers, numbers * layouts.matrix(site.module).dtype.itemsize, 0)
        option = Option("unified", (rows, site.shape[1] // width), "unified", cost, 0.0)
        found.append(replace(Entry.of(site, option), error=None))
    return found
