"""Nested ranks: one compressed model cut to a smaller ratio, without decomposing anything again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from .. import io
from ..errors import listed
from ..io.declaration import noted
from ..measure.size import model_cost
from ..nn import Form, remember_layout
from ..plans.entry import Entry
from ..plans.plan import Plan, versions
from ..plans.report import Measured, Report
from ..recover.components import Components, Stack, dense_numbers
from ..types import Cost
from ..walk.checks import check_module, ordinary_tensors
from ..walk.surgery import adopt, copied, swap, unchanged_on_error
from .request import checked_ratio

METHOD = "nested ranks"
ROWS = {"linear": "out_features", "conv": "out_channels", "embedding": "num_embeddings"}
DISORDERED = (
    "the components of its factors are not in order of importance, by their method or by training "
    "at one rank: a model made for this ratio, or by an effort with nested=, is better"
)


@ordinary_tensors()
def at_rank(model: nn.Module, ratio: float, *, copy: bool = False) -> tuple[nn.Module, Report]:
    """Cut the components of every factored layer, so that `ratio` of the dense weights is kept.

    The first components of a layer are the most important ones where a method with nested factors
    made them (`svd`, `fwsvd`, `asvd`, `whitened`, `two-sided`, of a table `frequency` and
    `head-aware`), the sequential refit did, or distillation over sampled ranks
    (`Recovery(nested=…)`, which also makes all sizes good ones). Training at one rank disturbs the
    order; of a transformers model the report says so. Each layer keeps the same share of its own
    dense weight, as under the policy "uniform": of a model of that policy without an effort, what
    remains is what `compress` gives.

    Args:
        model: compressed, in memory or loaded; changed in place and returned; if it is itself a
            layer, a new one is returned.
        ratio: fraction kept, in (0, 1), of the dense weights of the factored layers; and of the
            targets that were left dense, where a transformers model declares them.
        copy: work on a deep copy.

    Returns:
        The model and a Report, whose `achieved` is the ratio reached. Layers in forms without
        components in order, such as pivoted ones, stay as they are; its notes name them.

    Raises:
        LowrankError: no layer can be cut, or the model holds less than `ratio`, or cannot be cut so
            far; the model is then unchanged.
    """
    started = time.perf_counter()
    check_module(model)
    ratio = checked_ratio(ratio)
    model = copied(model) if copy else model
    about = noted(model)
    left = about.get("dense_targets")
    parts = Components.of(model, left if isinstance(left, int) else 0)
    ranks, before = parts.ranks(ratio), model_cost(model, [])
    made = [_cut(stack, rank) for stack, rank in zip(parts.stacks, ranks, strict=True)]
    pairs = zip(parts.stacks, made, strict=True)
    new = {id(stack.layers[name]): cuts[name] for stack, cuts in pairs for name in cuts}
    asked = {"ratio": ratio, "of": "targets", "unit": "params"}
    with unchanged_on_error(model):
        root = swap(model, new)
        io.attach(root, {"asked": asked})
    seconds = time.perf_counter() - started
    report = _report(Plan((), before, asked), parts, made, before, model_cost(root, []), seconds)
    if about.get("ordered") is False:
        report = replace(report, notes=(DISORDERED, *report.notes))
    io.attach(root, report=report)
    return root, report


def _cut(stack: Stack, rank: int) -> dict[str, Form]:
    """The layers of the first components, by name; the same ones where that is all of them."""
    if rank == stack.rank:
        return dict(stack.layers)
    made: dict[str, Form] = {}
    for name, layer in stack.layers.items():
        made[name] = layer.leading(rank, next(iter(made.values()), None))
        remember_layout(adopt(made[name], layer), layer.layout)
    return made


def _report(
    plan: Plan,
    parts: Components,
    made: Sequence[Mapping[str, Form]],
    before: Cost,
    after: Cost,
    seconds: float,
) -> Report:
    entries = tuple(entry for layers in made for entry in _entries(layers))
    stored = parts.rest + sum(entry.cost.params for entry in entries)
    whole = after.params - stored + parts.dense
    settings = {"method": METHOD, "policy": "uniform", "versions": versions()}
    stuck: dict[str, list[str]] = {}
    for name, why in parts.stuck.items():
        stuck.setdefault(why, []).append(name or "(root)")
    notes = (f"not cut, since {why}: {listed(names, 3)}" for why, names in stuck.items())
    return Report(
        plan=replace(plan, entries=entries, model=replace(before, params=whole), settings=settings),
        sites=tuple(Measured(e.name, "", None, None, None, None, 0.0) for e in entries),
        achieved=stored / parts.dense,
        achieved_of_model=after.params / whole,
        params_before=before.params,
        params_after=after.params,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        seconds=seconds,
        tokens=0,
        seed=0,
        versions=versions(),
        notes=tuple(notes),
    )


def _entries(layers: Mapping[str, Form]) -> list[Entry]:
    """Those of layers that share their components: one of a table and what is tied to it, else one
    of each."""
    (first, owner), *readers = layers.items()
    if owner.KIND == "embedding":
        heads = sum(layer.KIND == "linear" for _, layer in readers)
        return [_entry(tuple(layers), owner, heads=heads)]
    group = first if readers else ""
    return [_entry((name,), layer, group=group) for name, layer in layers.items()]


def _entry(names: tuple[str, ...], layer: Form, *, group: str = "", heads: int = 0) -> Entry:
    spec, cost, numbers = layer.spec(), layer.cost(), dense_numbers(layer)
    rows = int(spec[ROWS[layer.KIND]])
    return Entry(
        sites=names,
        shape=(rows, numbers // rows),
        dense=Cost(numbers, numbers * (cost.bytes // cost.params), numbers),
        method=METHOD,
        size=(int(spec["rank"]),),
        storage=layer.STORAGE,
        cost=replace(cost, macs=cost.macs + heads * cost.params),
        error=None,
        total=None,
        norm="",
        target=True,
        kind=layer.KIND,
        heads=heads,
        group=group,
    )
