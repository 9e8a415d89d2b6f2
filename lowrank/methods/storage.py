"""The pivoted storage of plain factors: equal errors in fewer numbers, for every method.

What a method decides, which matrix of rank r stands for W, is as it was. Its r(m + n) numbers
become r(m + n − r) (PIFA, arXiv 2501.19090), so that every rank below min(m, n) is smaller than
the dense weight: at equal cost the rank is higher, by 13 to 38 % for square matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from ..errors import LowrankError
from ..nn import LowRankLinear, PivotedLinear, pivot_layer, pivoted_cost
from ..types import Curve, Method, Option, Site, Statistics
from ..walk import layouts
from .common import Wrapped, options_of


@dataclass(frozen=True)
class Pivoted(Wrapped):
    """A method as it is, with its linear layers stored in the pivoted form."""

    def curve(self, site: Site, stats: Statistics) -> Curve:
        return pivoted_curve(self.way.curve(site, stats), site)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        """As the option's storage says, also where the method itself gives plain factors."""
        new = self.way.factor(module, option, stats)
        if option.storage != "pivoted" or isinstance(new, PivotedLinear):
            return new
        if not isinstance(new, LowRankLinear):
            raise LowrankError(
                f"storage 'pivoted' is another form of a LowRankLinear, {option.method} gives "
                f"{type(new).__name__}: leave storage out"
            )
        return pivot_layer(new)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float | None:
        """By the method, where its curve has a norm of its own."""
        own = getattr(self.way, "error", None)
        return float(own(module, weight, stats)) if callable(own) else None


def stored_as(way: Method, storage: str) -> Method:
    """The method, its layers stored as "factors" or "pivoted"."""
    return Pivoted(way) if storage == "pivoted" else way


def pivoted_curve(curve: Curve, site: Site) -> Curve:
    """The same errors by rank at the cost of the pivoted form; linear layers only.

    Ranks above the break-even of plain factors take their errors from `curve.tails`; without them
    the ranks of the curve alone are priced anew. A curve of an embedding is returned as it is.

    Raises:
        LowrankError: the options are no plain factors.
    """
    factored = [option for option in curve.options if not option.dense]
    if site.kind != "linear" or not factored:
        return curve
    other = [o for o in factored if o.storage != "factors" or o.size is None or len(o.size) != 1]
    if other:
        raise LowrankError(
            f"{site.title}: storage 'pivoted' is another form of plain factors, {other[0].method} "
            f"stores {other[0].storage!r} of size {other[0].size}: leave storage out"
        )
    errors = [(option.size[0], option.error) for option in factored if option.size]
    if curve.tails is not None:  # of the full rank too, which is not smaller: it ends there
        errors = list(enumerate(curve.tails.tolist()))[1:]
    itemsize = layouts.matrix(site.module).dtype.itemsize
    cost = partial(pivoted_cost, *site.shape, itemsize=itemsize)
    return replace(curve, options=options_of(site, factored[0].method, "pivoted", errors, cost))
