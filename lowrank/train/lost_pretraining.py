"""LOST: low rank and a few input channels, trained together from scratch (arXiv 2508.02668).

Each weight W of the untrained model is decomposed once, before any step: its leading singular
values make the factors B A, the channels J in which the other ones are largest are kept as columns,
and y = γ · B A x + (1 − γ) · V x_J is trained from there by any optimizer; J is fixed.

The details follow the authors' code of related work, not the paper's text. Against that code: the
SVD is of the true dense start, not of a product that has low rank already, whose tail is noise; it
is taken once; channels are chosen by the whole tail unless `tail_rank` is given (there by the next
256 values); γ is exact in 16 bits; no bias is added; memory peaks at one layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed, unknown
from ..io.declaration import attach, check_attachable, is_transformers
from ..linalg import svd
from ..linalg.gram import full_precision
from ..nn import LowRankSparseLinear, low_rank_sparse_cost
from ..nn.lowrank_sparse import Act
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns, find_sites, select_sites
from ..walk.surgery import copied, put

Channels = Literal["tail", "random", "norm"]
Values = Literal["weight", "residual"]


def lost(
    model: nn.Module,
    rank: int,
    sparsity: float = 0.05,
    gamma: float | None = 0.5,
    *,
    act: Act | None = None,
    channels: Channels = "tail",
    tail_rank: int | None = None,
    values: Values = "weight",
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    seed: int = 0,
    copy: bool = False,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Replace the linear layers of an untrained model by γ · low rank + (1 − γ) · columns.

    Build the optimizer afterwards. A layer (out, in) then has rank · (out + in) + c · out numbers,
    c = max(1, ⌊sparsity · in⌋).

    Args:
        model: changed in place and returned; for a root that is itself a layer, the new layer.
        rank: r ≥ 1; at most a layer's smaller side.
        sparsity: δ in (0, 1), the share of the inputs that are kept as channels.
        gamma: γ in [0, 1]; None for the plain sum of both parts, which with values="residual"
            starts as near to W as any c channels can bring it.
        act: "silu" between the factors; such layers cannot be merged to dense ones.
        channels: by the length of their columns in what the factors leave ("tail") or in W
            ("norm"), or at "random".
        tail_rank: q ≥ 1: choose by the q singular values that follow the r-th; None: by all.
        values: of the columns at the start: those of W ("weight", as in the authors' code) or what
            the factors leave of it ("residual").
        seed: of random channels.

    Returns:
        The model, and one dict per layer: "site", "event" ("lost", with "rank", "channels" and
        "share" of the numbers kept, or "left", with the "reason").

    Raises:
        LowrankError: an option is out of range, or no layer can be replaced; the model is
            unchanged then.
    """
    _check(rank, sparsity, gamma, act, channels, tail_rank, values)
    model = copied(model) if copy else model
    every = select_sites(find_sites(model), model, target_modules, exclude_modules, adapts=True)
    sizes = {site.name: _sizes(site, rank, sparsity) for site in every}
    reasons = _reasons(every, sizes)
    if is_transformers(model):
        check_attachable(model)
    lines: list[dict[str, Any]] = []
    for number, site in enumerate(every):
        if reasons[site.name]:
            lines.append({"site": site.name, "event": "left", "reason": reasons[site.name]})
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        weight, (lower, count) = layouts.matrix(site.module).detach(), sizes[site.name]
        parts = first_parts(weight, lower, count, channels, tail_rank, values, generator)
        down, up, columns = (part.to(weight) for part in parts[:3])
        new = LowRankSparseLinear.from_parts(
            down, up, columns, parts[3], layouts.bias(site.module), gamma=gamma, act=act
        )
        model = put(model, site, new)
        line = {"rank": lower, "channels": count, "share": new.cost().params / site.cost.params}
        lines.append({"site": site.name, "event": "lost", **line})
    attach(model)
    return model, lines


def first_parts(
    weight: Tensor,
    rank: int,
    count: int,
    channels: Channels = "tail",
    tail_rank: int | None = None,
    values: Values = "weight",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factors, columns and channels that training begins with.

    Args:
        weight: W (out, in).
        rank, count: r in [1, min(out, in)], c in [1, in].
        generator: on the CPU; needed for random channels.

    Returns:
        down (r, in), up (out, r), balanced, and columns (out, c), in the compute dtype; channels
        (c,) int64, ascending.
    """
    side = min(weight.shape)
    wide = side if tail_rank is None else min(rank + tail_rank, side)
    matrix = weight.detach().to(svd.compute_dtype(side))
    with full_precision(matrix):
        whole = channels == "tail" and tail_rank is None
        basis = svd.output_basis(matrix, rank if whole else wide)
        rows = basis.T @ matrix  # S Vᵀ
        up, down = svd.balance(basis[:, :rank], rows[:rank])
        rest = matrix - basis[:, :rank] @ rows[:rank]
        looked_at = {"tail": rest if whole else rows[rank:], "norm": matrix}
        if channels == "random":
            index = torch.randperm(matrix.shape[1], generator=generator)[:count]
            index = index.to(matrix.device)
        else:
            longest = looked_at[channels].square().sum(0)
            index = longest.argsort(descending=True, stable=True)[:count]
        index = index.sort().values
        return down, up, (matrix if values == "weight" else rest)[:, index], index


def _sizes(site: Site, rank: int, sparsity: float) -> tuple[int, int]:
    return min(rank, *site.shape), max(1, int(sparsity * site.shape[1]))


def _reasons(sites: Sequence[Site], sizes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Why a layer stays dense, "" where it does not. Raises LowrankError if all of them do."""
    reasons = {site.name: _reason(site, sizes[site.name]) for site in sites}
    if all(reasons.values()):
        left = [f"{site.title} ({reasons[site.name]})" for site in sites]
        raise LowrankError(f"lost has no layer to replace: {listed(left, 5) or 'no known layer'}")
    return reasons


def _reason(site: Site, sizes: tuple[int, int]) -> str:
    if site.reason:
        return site.reason
    if site.kind != "linear":
        return f"lost takes linear layers, this is {site.kind}"
    if layouts.matrix(site.module).is_meta:
        return "its weight is on the meta device: initialise it first"
    if not layouts.is_finite(site.module):
        return "its weight has numbers that are not finite"
    cost = low_rank_sparse_cost(*site.shape, *sizes, itemsize=site.cost.bytes // site.cost.params)
    return "" if cost.params < site.cost.params else f"{sizes} would not be smaller"


def _check(
    rank: int, sparsity: float, gamma: float | None, act: str | None, channels: str,
    tail_rank: int | None, values: str,
) -> None:  # fmt: skip
    for name, number in {"rank": rank, "tail_rank": 1 if tail_rank is None else tail_rank}.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise LowrankError(f"{name} must be an integer >= 1, got {number!r}")
    if not 0 < sparsity < 1:
        raise LowrankError(f"sparsity is the share of inputs kept, in (0, 1), got {sparsity!r}")
    if gamma is not None and not 0 <= gamma <= 1:
        raise LowrankError(f"gamma must be in [0, 1], or None for a plain sum, got {gamma!r}")
    known: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "channels": (channels, get_args(Channels)),
        "values": (values, get_args(Values)),
        "act": (act or "silu", get_args(Act)),
    }
    for name, (got, words) in known.items():
        if got not in words:
            raise unknown(name, str(got), words)
    if tail_rank is not None and channels != "tail":
        raise LowrankError(f"tail_rank chooses channels by the tail, not by {channels!r}")
