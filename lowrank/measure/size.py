"""Parameters, bytes and MACs of a whole model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..types import Cost, Factored, Site


def model_cost(model: nn.Module, sites: Sequence[Site]) -> Cost:
    """Parameters and bytes of the whole model, each stored tensor once; MACs of its layers.

    Bytes count the parameters and the index tensors of factored modules. MACs are per position,
    of the factored modules and of `sites`.
    """
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    factored = {id(m): m for m in model.modules() if isinstance(m, Factored)}.values()
    orders = {id(t): t for m in factored for t in m.buffers()}.values()
    return Cost(
        params=sum(p.numel() for p in unique),
        bytes=sum(t.numel() * t.dtype.itemsize for t in (*unique, *orders)),
        macs=sum(cost.macs for cost in (*(m.cost() for m in factored), *(s.cost for s in sites))),
    )
