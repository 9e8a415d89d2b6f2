"""For every layer whichever stored form serves its outputs best at the cost: the curves, joined.

Plain and pivoted factors of the whitened optimum, dense-sparse, low rank with channels, and blocks,
all in the norm of the outputs. A policy that sees one curve a layer then chooses form and size at
once; what it chose is carried out by the method of that name.
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

# By the form's name, which "dense-sparse" gives to both of its sides.
OWN: dict[str, type[Method]] = {
    "dense-sparse": DenseSparse,
    "lowrank-sparse": LowRankSparse,
    "blast": Blast,
    "lowrank-masked": LowRankMasked,
}
KNOWN = ("factors", "pivoted", *OWN)
FORMS = tuple(form for form in KNOWN if form != "lowrank-masked")  # which multiplies as dense does


@dataclass(frozen=True)
class Auto:
    """Options: `forms`, the storages to choose among; `seed` of what they draw. "lowrank-masked",
    which is never faster than the dense layer, is one of them only where it is named.

    Sizes are those of the form that an option names as its storage. The curve is not exact: errors
    of forms that iterate are those of little effort, which may leave a form out that would be best.
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
        """What none of the options of several curves of a site beats."""
        options = [option for curve in curves for option in curve.options if not option.dense]
        total = curves[0].total
        return Curve(site.names, pareto_front(site, options), total, None, "output", exact=False)

    def apart(self) -> dict[str, Method]:
        """One method for each form. The least error of outputs need not be the least effect on the
        predictions: where held-out rows can tell, each form alone is compared with the best mix."""
        return {form: replace(self, forms=(form,)) for form in self.forms}

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        # The one form that is stored in two ways goes by the name of one of them.
        form = "dense-sparse" if option.storage == "sparse-dense" else option.storage
        return self._method(form).factor(module, option, stats)

    def _curve(self, form: str, site: Site, stats: Statistics) -> Curve:
        curve = self._method(form).curve(site, stats)
        return pivoted_curve(curve, site) if form == "pivoted" else curve

    def _method(self, form: str) -> Method:
        method: type[Method] = OWN.get(form, Whitened)
        return method(seed=self.seed)  # type: ignore[call-arg]
