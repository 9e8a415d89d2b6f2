"""Layers that are factored before a controller sees them: which it takes, and at what rank.

A controller that takes plain factors goes on from them: it holds the same weight in its own form,
exactly, at the rank that the layer has. What it does not take stays as it is, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ...nn import BlockLowRankLinear, Form, LowRankLinear, PivotedLinear, is_factored
from ...nn.factored_conv import FactoredConv
from ...types import Site
from ...walk import layouts
from ...walk.surgery import modules_of

PLAIN = (LowRankLinear, PivotedLinear)  # W = up · down, whatever is stored
FIRST = "merge it first (lowrank.to_dense), or leave it as it is"


def with_factored(
    root: nn.Module,
    sites: Sequence[Site],
    who: str,
    takes: Collection[type[Form]],
    kinds: Collection[str],
) -> list[Site]:
    """The sites, and the factored layers that are not among them, in the model's order; a layer of
    these kinds that `who` does not take has the reason."""
    known = {id(module) for site in sites for module in site.modules}
    names: dict[int, list[str]] = {}
    forms: dict[int, Form] = {}
    places: dict[str, int] = {}
    for name, module in modules_of(root):
        places.setdefault(name, len(places))
        if isinstance(module, Form) and is_factored(module) and id(module) not in known:
            forms[id(module)] = module
            names.setdefault(id(module), []).append(name)
    if not forms:
        return list(sites)
    more = [_site(tuple(names[key]), form, who, takes, kinds) for key, form in forms.items()]
    return sorted([*sites, *more], key=lambda site: places.get(site.name, len(places)))


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer; float64 where it is a product."""
    if isinstance(layer, Form):
        return layer.dense_weight(torch.float64).detach()
    return layouts.matrix(layer).detach()


def stored_like(layer: nn.Module) -> Tensor:
    """A weight of the layer, for its dtype and device."""
    return next(p for name, p in layer.named_parameters() if not name.endswith("bias")).detach()


def held_rank(layer: nn.Module) -> int | None:
    """The rank at which a linear layer is factored; None if it is dense."""
    return layer.rank if isinstance(layer, PLAIN) else None


def _site(
    names: tuple[str, ...],
    form: Form,
    who: str,
    takes: Collection[type[Form]],
    kinds: Collection[str],
) -> Site:
    reason = ""
    if form.KIND in kinds and type(form) not in takes:
        reason = f"it is a {type(form).__name__}, which {who} does not take: {FIRST}"
    reason = reason or _obstacle(form)
    return Site(names[0], names, form.KIND, (form,), _shape(form), form.cost(), reason)


def _shape(form: Form) -> tuple[int, int]:
    """(out, in) of the weight, as of a site; zeros where no controller takes such a form."""
    if isinstance(form, FactoredConv):
        outputs, *rest = form.geometry.weight_shape
        return outputs, math.prod(rest)
    if isinstance(form, LowRankLinear | PivotedLinear | BlockLowRankLinear):
        return form.out_features, form.in_features
    return 0, 0


def _obstacle(form: Form) -> str:
    """Why a form that a controller takes cannot be replaced here; "" if it can."""
    if isinstance(form, LowRankLinear) and form._last is not None and form._last.readers:
        return f"other layers share its basis: {FIRST}"
    if isinstance(form, FactoredConv) and form.geometry.groups != 1:
        return f"it has {form.geometry.groups} groups"
    if isinstance(form, FactoredConv) and form.geometry.padding_mode != "zeros":
        return f"it pads by {form.geometry.padding_mode!r}"
    for part in (form, *form.children()):
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        if any((*hooks, part._backward_hooks)) or layouts.is_patched(part):
            return "it has hooks that a new layer would lose"
    return ""
