"""Convolutions in all their forms: fewer channels, Tucker-2, separable kernels, CP, tubal.

By the weight, `channel` (the kernel first or last), `tucker` (HOSVD, then HOOI; Kim et al., arXiv
1511.06530), `spatial` (Tai et al., arXiv 1511.06067), `cp` (ALS; Lebedev et al., arXiv 1412.6553)
and `tubal` (t-SVD with cosines, linalg/tubal.py) minimise ‖W − Ŵ‖. whitened.py has the same forms
by the outputs, two_sided.py by the predictions: only the metric differs.

A curve is the Pareto front of its forms: storage "factors" of size (r,) is ChannelConv,
"kernel-last" (r,) its mirrored form, "tucker" (r_out, r_in) TuckerConv, "spatial" (r,) SpatialConv,
"cp" (R,) CPConv, "tubal" (R,) TubalConv. 1×1 convolutions and linear layers are matrices, and have
the first form only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..nn import Geometry
from ..types import Curve, Method, Option, Site, Statistics, Unit
from ..walk import layouts
from .conv_forms import FORMS, Metric, fitted, size_of
from .sampled import pareto_front
from .svd import SVD

JOINED = ("tucker", "spatial")  # "kernel-last" is left to the `channel` methods
STORING = (*JOINED, "tubal")  # where storage alone counts
STORED: frozenset[Unit] = frozenset({"params", "bytes"})  # units of what only storage measures


@dataclass(frozen=True)
class Tucker:
    """Convolutions: Tucker-2 (HOSVD, then HOOI) or channel factors, by weight error.

    The curve over (r_out, r_in) is the HOSVD's, an upper bound on the error of HOOI. Options:
    `seed` as for `SVD`.
    """

    seed: int = 0
    forms: ClassVar[tuple[str, ...]] = ("tucker",)
    name: ClassVar[str] = "tucker"
    kinds = frozenset({"conv"})
    needs = frozenset[str]()

    def curve(self, site: Site, stats: Statistics) -> Curve:
        plain = self._channels().curve(site, stats)
        forms = fitting(site.module, self.forms)
        metric = self._metric(site.module, stats) if forms else Metric()
        return joined(plain, site, self.name, forms, metric)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        if option.storage not in FORMS:
            return self._channels().factor(module, option, stats)
        size, metric = size_of(option, module), self._metric(module, stats)
        return fitted(module, whole(module), size, option.storage, metric)

    def _channels(self) -> Method:
        return SVD(self.seed)

    def _metric(self, module: nn.Module, stats: Statistics) -> Metric:
        return Metric()


@dataclass(frozen=True)
class Channel(Tucker):
    """Convolutions: channel factors, k×k then 1×1 or 1×1 then k×k, by weight error.

    Options: `seed` as for `SVD`.
    """

    forms = ("kernel-last",)
    name = "channel"


@dataclass(frozen=True)
class Spatial(Tucker):
    """Convolutions: k×1 then 1×k or channel factors, optimal in weight error.

    Options: `seed` as for `SVD`.
    """

    forms = ("spatial",)
    name = "spatial"


@dataclass(frozen=True)
class CP(Tucker):
    """Convolutions: CP decomposition (ALS) or channel factors, by weight error.

    The curve has a few ranks, without those whose components cancel. Options: `seed` as for `SVD`;
    ALS always starts from the same point.
    """

    forms = ("cp",)
    name = "cp"


@dataclass(frozen=True)
class Tubal(Tucker):
    """Convolutions: low rank at every frequency of the kernel, or channel factors, by weight error.

    Saves storage, not products: MACs are those of the dense kernel, and no unit of a budget.
    Options: `seed` as for `SVD`.
    """

    forms = ("tubal",)
    name = "tubal"
    own_form: ClassVar[str] = "tubal"
    units: ClassVar[frozenset[Unit]] = STORED


def joined(plain: Curve, site: Site, method: str, forms: Sequence[str], metric: Metric) -> Curve:
    """The Pareto front of the options of all forms."""
    if not forms:
        return plain
    geometry, itemsize = Geometry.of(site.module), layouts.matrix(site.module).dtype.itemsize
    options = [o for o in plain.options if not o.dense]
    metric, unit = metric.steadied()
    for form in forms:
        for size, error in FORMS[form].errors(whole(site.module), metric):
            cost = FORMS[form].cost(geometry, size, itemsize)
            options.append(Option(method, size, form, cost, min(error * unit, plain.total)))
    return replace(plain, options=pareto_front(site, options), tails=None, exact=False)


def fitting(module: nn.Module, forms: Sequence[str]) -> tuple[str, ...]:
    """Those of the forms that apply to this layer."""
    if layouts.kind(module) != "conv":
        return ()
    return tuple(form for form in forms if FORMS[form].fits(Geometry.of(module)))


def whole(module: nn.Module) -> Tensor:
    """The weight (O, I, *kernel), float64."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().double()
