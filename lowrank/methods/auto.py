"""For every layer the form with the least output error at its cost: the joint Pareto front.

Plain and pivoted factors of the whitened optimum, dense-sparse, low rank with channels, and blocks,
all in the norm of the outputs. A policy then chooses form and size at once from one curve per
layer; the method of the chosen form builds the layer. Where a ratio of bytes is asked for, the name
stands for `Quantized`, whose integers are nearer than all of these (benchmarks/rank_and_bits.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import unknown
from ..types import Curve, Method, Option, Site, Statistics
from .blast import Blast
from .common import pivoted_curve
from .dense_sparse import DenseSparse
from .lowrank_masked import LowRankMasked
from .lowrank_sparse import LowRankSparse
from .sampled import pareto_front
from .whitened import Whitened

# By the form's name; "dense-sparse" is that of both of its sides.
OWN: dict[str, type[Method]] = {
    "dense-sparse": DenseSparse,
    "lowrank-sparse": LowRankSparse,
    "blast": Blast,
    "lowrank-masked": LowRankMasked,
}
KNOWN = ("factors", "pivoted", *OWN)
FORMS = tuple(form for form in KNOWN if form != "lowrank-masked")  # which is no faster than dense


@dataclass(frozen=True)
class Auto:
    """Options: `forms`, the storages to choose among; `seed` of their random numbers.
    "lowrank-masked", which is never faster than the dense layer, has to be named.

    Sizes are those of the option's storage. The curve is not exact: errors of iterative forms are
    those of few iterations, which may exclude a form that would be best.
    """

    seed: int = 0
    forms: tuple[str, ...] = FORMS
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    own_form = "factors"

    def __post_init__(self) -> None:
        for form in self.forms or ("",):
            if form not in KNOWN:
                raise unknown("form", str(form), KNOWN)

    def curve(self, site: Site, stats: Statistics) -> Curve:
        return self.joined(site, [self._curve(form, site, stats) for form in self.forms])

    def joined(self, site: Site, curves: Sequence[Curve]) -> Curve:
        """The Pareto front of several curves of a site."""
        options = [option for curve in curves for option in curve.options if not option.dense]
        total = curves[0].total
        return Curve(site.names, pareto_front(site, options), total, None, "output", exact=False)

    def apart(self) -> dict[str, Method]:
        """One method per form. The least output error need not be the least effect on the
        predictions: with held-out rows, each form alone is compared with the best mix."""
        return {form: replace(self, forms=(form,)) for form in self.forms}

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        # The one form with two storages goes by the name of the first.
        form = "dense-sparse" if option.storage == "sparse-dense" else option.storage
        return self._method(form).factor(module, option, stats)

    def _curve(self, form: str, site: Site, stats: Statistics) -> Curve:
        curve = self._method(form).curve(site, stats)
        return pivoted_curve(curve, site) if form == "pivoted" else curve

    def _method(self, form: str) -> Method:
        method: type[Method] = OWN.get(form, Whitened)
        return method(seed=self.seed)  # type: ignore[call-arg]
