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
from ..nn import OWN_FORMS
from ..types import Curve, Method, Option, Site, Statistics
from .blast import Blast
from .dense_sparse import DenseSparse
from .lowrank_masked import LowRankMasked
from .lowrank_sparse import LowRankSparse
from .sampled import pareto
from .storage import stored_as
from .whitened import Whitened

# "dense-sparse" stands for both sides of it.
KNOWN = ("factors", "pivoted", *(form for form in OWN_FORMS if form != "sparse-dense"))
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
    own_form = True

    def __post_init__(self) -> None:
        for form in self.forms or ("",):
            if form not in KNOWN:
                raise unknown("form", str(form), KNOWN)

    def curve(self, site: Site, stats: Statistics) -> Curve:
        return self.joined(site, [self._way(form).curve(site, stats) for form in self.forms])

    def joined(self, site: Site, curves: Sequence[Curve]) -> Curve:
        """What none of the options of several curves of a site beats."""
        options = [option for curve in curves for option in curve.options if not option.dense]
        total = curves[0].total
        return Curve(site.names, pareto(site, options), total, None, "output", exact=False)

    def apart(self) -> dict[str, Method]:
        """One method for each form. The least error of outputs need not be the least effect on the
        predictions: where held-out rows can tell, each form alone is compared with the best mix."""
        return {form: replace(self, forms=(form,)) for form in self.forms}

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        return self._way(option.storage).factor(module, option, stats)

    def _way(self, form: str) -> Method:
        own: dict[str, type[Method]] = {
            "dense-sparse": DenseSparse, "sparse-dense": DenseSparse, "blast": Blast,
            "lowrank-sparse": LowRankSparse, "lowrank-masked": LowRankMasked,
        }  # fmt: skip
        if form in own:
            return own[form](seed=self.seed)  # type: ignore[call-arg]
        return stored_as(Whitened(seed=self.seed), form)
