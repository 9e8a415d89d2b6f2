"""The rows of `lowrank inspect`: every linear layer, and which rank would keep its energy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .. import layouts, linalg
from .. import sites as walk
from ..io.surgery import factored
from ..types import Site
from .console import on_terminal

SHARES = (0.90, 0.95, 0.99)


def rows(model: Any, grams: dict[str, Tensor] | None) -> Iterator[dict[str, str]]:
    """One row a layer, dense or factored, in the model's own order.

    Args:
        grams: E[x xᵀ] (in, in) of the layers' inputs, by name; None: the energy of the weights.
    """
    from tqdm.auto import tqdm

    sites = {site.name: site for site in walk.select(walk.find(model), model)}
    done = factored(model)
    names = [name for name, _ in model.named_modules() if name in sites or name in done]
    for name in tqdm(names, "decompose", delay=2, disable=not on_terminal(), leave=False):
        yield _dense_row(sites[name], grams) if name in sites else _factored_row(name, done[name])


def _dense_row(site: Site, grams: dict[str, Tensor] | None) -> dict[str, str]:
    row = _row(site.name, site.shape, site.cost.params)
    row["note"] = site.reason
    gram = None if grams is None else grams.get(site.name)
    if layouts.obstacle(site.module):
        return row
    if not layouts.is_finite(site.module):
        return {**row, "note": "the weight holds NaN or Inf"}
    if grams is not None and gram is None:
        return {**row, "note": site.reason or "the text did not reach it"}
    tails = linalg.tails(linalg.energies(layouts.matrix(site.module), gram)).tolist()
    return {**row, **{_percent(share): str(_rank_for(share, tails)) for share in SHARES}}


def _factored_row(name: str, module: Any) -> dict[str, str]:
    shape, params = (module.out_features, module.in_features), module.cost().params
    kept = f"{params / (shape[0] * shape[1]):.3f}"
    return {**_row(name, shape, params), "rank": str(module.rank), "kept": kept}


def _row(name: str, shape: tuple[int, int], params: int) -> dict[str, str]:
    even = -(-shape[0] * shape[1] // (shape[0] + shape[1]))
    return {
        "site": name or "(root)",
        "shape": f"{shape[0]}x{shape[1]}",
        "params": f"{params:,}",
        "rank": "",
        "kept": "",
        "even": str(even),
        **{_percent(share): "" for share in SHARES},
        "note": "",
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _rank_for(share: float, tails: list[float]) -> int:
    """The smallest rank that keeps this share of the energy."""
    return next(rank for rank, lost in enumerate(tails) if lost <= (1 - share) * tails[0])
