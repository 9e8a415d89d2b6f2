"""Shared by low-rank methods of one matrix: options, two storages, statistics, layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..nn import (
    ChannelConv,
    LowRankEmbedding,
    LowRankLinear,
    PivotedLinear,
    form_of,
    pivot_layer,
    pivoted_cost,
)
from ..types import Cost, Curve, Option, Site, Statistics
from ..walk import layouts


def low_rank_curve(
    site: Site,
    method: str,
    errors: Sequence[float],
    *,
    spectrum: Tensor | None,
    norm: str,
    exact: bool,
) -> Curve:
    """The curve of plain factors: every rank whose factors are smaller than the dense weight.

    Args:
        errors: of ranks 0…min(out, in); rank 0 is the zero matrix. All are kept in `tails`.
    """
    tails = torch.tensor(errors, dtype=torch.float64)
    ranks, total = list(enumerate(tails.tolist()))[1:], float(tails[0])
    options = options_of(site, method, "factors", ranks, partial(factored_cost, site))
    return Curve(site.names, options, total, spectrum, norm, exact, tails)


def options_of(
    site: Site,
    method: str,
    storage: str,
    errors: Iterable[tuple[int, float]],
    cost_of: Callable[[int], Cost],
) -> tuple[Option, ...]:
    """An option for every rank that is smaller than the dense weight, and the dense option.

    Args:
        errors: (rank, error), ranks rising.
        cost_of: the cost of a rank in this storage; it rises with the rank.
    """
    options, least = [], float("inf")
    for rank, error in errors:
        cost = cost_of(rank)
        if cost.params >= site.cost.params or cost.bytes >= site.cost.bytes:
            break
        if error < least:  # a tie adds nothing: the smaller rank is enough
            least = error
            options.append(Option(method, (rank,), storage, cost, least))
    return (*options, Option("dense", None, "dense", site.cost, 0.0))


def pivoted_curve(curve: Curve, site: Site) -> Curve:
    """The same errors by rank at the cost of the pivoted form; linear layers only.

    A matrix of rank r takes r(m + n − r) numbers there (PIFA, arXiv 2501.19090) instead of
    r(m + n), so that every rank below min(m, n) is smaller than the dense weight: at equal cost the
    rank is higher, by 13 to 38 % for square matrices. Ranks above the break-even of plain factors
    take their errors from `curve.tails`; without them only the ranks of the curve are repriced. A
    curve of another kind of site is returned as it is.

    Raises:
        LowrankError: the options are not plain factors.
    """
    factored = [option for option in curve.options if not option.dense]
    if site.kind != "linear" or not factored:
        return curve
    foreign = [o for o in factored if o.storage != "factors" or o.size is None or len(o.size) != 1]
    if foreign:
        raise LowrankError(
            f"{site.title}: storage 'pivoted' needs plain factors, but {foreign[0].method} "
            f"stores {foreign[0].storage!r} of size {foreign[0].size}: omit storage"
        )
    errors = [(option.size[0], option.error) for option in factored if option.size]
    if curve.tails is not None:  # up to full rank, which is not smaller and ends the options
        errors = list(enumerate(curve.tails.tolist()))[1:]
    itemsize = layouts.matrix(site.module).dtype.itemsize
    cost = partial(pivoted_cost, *site.shape, itemsize=itemsize)
    return replace(curve, options=options_of(site, factored[0].method, "pivoted", errors, cost))


def factored_cost(site: Site, rank: int) -> Cost:
    """Cost of plain factors, for all modules that hold the weight."""
    itemsize, form = layouts.matrix(site.module).dtype.itemsize, form_of("factors", site.kind)
    heads = layouts.head_count(site.modules)
    assert form is not None
    cost = form.size_cost(site.shape, (rank,), itemsize=itemsize, heads=heads)
    assert cost is not None
    return cost


def stacked(sites: Sequence[Site]) -> Site:
    """Several sites as one of shape (Σ out, in), with all their names and modules, in order.

    Its curve, ranks and break-even are those of the stacked matrix.
    """
    cost = Cost(0, 0, 0)
    for site in sites:
        cost = cost + site.cost
    return Site(
        name=sites[0].name,
        names=tuple(name for site in sites for name in site.names),
        kind=sites[0].kind,
        modules=tuple(module for site in sites for module in site.modules),
        shape=(sum(site.shape[0] for site in sites), sites[0].shape[1]),
        cost=cost,
    )


def gram_of(stats: Statistics, in_features: int) -> Tensor:
    """E[x xᵀ] (in, in).

    Raises:
        LowrankError: it was not gathered, or belongs to an input of another width.
    """
    shape = None if stats.gram is None else tuple(stats.gram.shape)
    if stats.gram is None or shape != (in_features, in_features):
        raise LowrankError(
            f"expected the gram of an input of width {in_features}, got {shape or 'none'}: "
            "calibrate this model first"
        )
    return stats.gram


def out_gram_of(stats: Statistics, out_features: int) -> Tensor:
    """E[g gᵀ] (out, out).

    Raises:
        LowrankError: it was not gathered, or belongs to a layer of another width.
    """
    shape = None if stats.out_gram is None else tuple(stats.out_gram.shape)
    if stats.out_gram is None or shape != (out_features, out_features):
        raise LowrankError(
            f"expected the gradients' gram of {out_features} outputs, got {shape or 'none'}: "
            "add it by lowrank.with_fisher(model, calibration)"
        )
    return stats.out_gram


def row_fisher_of(stats: Statistics, rows: int) -> Tensor:
    """Σ_j E[(∂L/∂W_ij)²] of every row, (out,).

    Raises:
        LowrankError: it was not gathered, or belongs to a layer of another width.
    """
    if stats.row_fisher is None or len(stats.row_fisher) != rows:
        got = "none" if stats.row_fisher is None else len(stats.row_fisher)
        raise LowrankError(
            f"expected the Fisher information of {rows} rows, got {got}: "
            "add it by lowrank.with_fisher(model, calibration)"
        )
    return stats.row_fisher


def freq_of(stats: Statistics, rows: int) -> Tensor:
    """How often every row was looked up, (V,).

    Raises:
        LowrankError: it was not counted, or belongs to a table of another size.
    """
    if stats.freq is None or len(stats.freq) != rows:
        got = "none" if stats.freq is None else len(stats.freq)
        raise LowrankError(
            f"expected the frequencies of {rows} rows, got {got}: calibrate this model first"
        )
    return stats.freq


def rank_of(option: Option, module: nn.Module) -> int:
    """The rank of an option, checked against the layer.

    Raises:
        LowrankError: the size is not a valid rank of this weight.
    """
    shape = tuple(layouts.matrix(module).shape)
    if option.size is None or len(option.size) != 1 or not 1 <= option.size[0] <= min(shape):
        raise LowrankError(
            f"rank must be in [1, {min(shape)}] for shape {shape}, got {option.size}"
        )
    return option.size[0]


def low_rank_layer(
    module: nn.Module, down: Tensor, up: Tensor, option: Option
) -> LowRankLinear | PivotedLinear | ChannelConv:
    """The layer of factors in the compute dtype, with the dtype, device and bias of `module`, in
    the option's storage; for a convolution, a ChannelConv."""
    weight, bias = layouts.matrix(module), layouts.bias(module)
    if layouts.kind(module) == "conv":
        return ChannelConv.from_factors(module, down.to(weight), up.to(weight))
    if option.storage == "pivoted":
        return PivotedLinear.from_factors(down, up, bias, dtype=weight.dtype)
    return LowRankLinear.from_factors(down.to(weight), up.to(weight), bias)


def pivoted_layer(new: nn.Module, method: str) -> PivotedLinear:
    """A factored layer in the pivoted storage, for methods that do not return it themselves.

    Raises:
        LowrankError: it is not a product of two plain factors; the method is named.
    """
    if isinstance(new, PivotedLinear):
        return new
    if not isinstance(new, LowRankLinear):
        raise LowrankError(
            f"storage 'pivoted' needs a LowRankLinear, but {method} gives "
            f"{type(new).__name__}: omit storage"
        )
    return pivot_layer(new)


def table_layer(module: nn.Module, rows: Tensor, down: Tensor) -> LowRankEmbedding:
    """The table of factors (V, rank), (rank, D) in the compute dtype, otherwise like `module`."""
    weight = layouts.matrix(module)
    return LowRankEmbedding.from_factors(rows.to(weight), down.T.to(weight), module)


def refuse_head(site: Site, form: str) -> None:
    """Raises LowrankError for a table that is an output head too."""
    if layouts.head_count(site.modules):
        raise LowrankError(
            f"{site.title} is tied to an output head, which cannot read {form}: "
            f"exclude it (exclude_modules=[{site.name!r}]), or use 'head-aware'"
        )


def check_padding(module: nn.Module, form: str) -> None:
    """Raises LowrankError for a padding row that is read and not zero: it would be lost."""
    padding = module.padding_idx
    if padding is None or isinstance(module, nn.EmbeddingBag):  # a bag leaves it out
        return
    if bool(layouts.matrix(module)[padding].detach().any()):  # type: ignore[index]
        raise LowrankError(
            f"row {padding} of the table is its padding_idx and not zero, which {form} cannot "
            "keep: set it to zero, or use another method"
        )
