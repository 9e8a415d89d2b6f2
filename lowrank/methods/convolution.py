"""Convolutions beside fewer channels: Tucker-2, rows and columns apart, CP; rank by rank the best.

By the weight, `channel` (the kernel first or last), `tucker` (HOSVD, then HOOI; Kim et al., arXiv
1511.06530), `spatial` (Tai et al., arXiv 1511.06067) and `cp` (ALS; Lebedev et al., arXiv
1412.6553) minimise ‖W − Ŵ‖. By the outputs, `whitened-channel`, `whitened-tucker` and
`whitened-spatial` minimise ‖(W − Ŵ)H^½‖ with the Gram matrix H of the patches; `two-sided-…` weighs
the outputs too, by the gradients of the model's own loss. What `whitened` and `two-sided` hand
their convolutions to joins channels, Tucker, and rows and columns.

A curve holds the options that no other beats: storage "factors" of size (r,) is ChannelConv,
"kernel-last" (r,) its mirror image, "tucker" (r_out, r_in) TuckerConv, "spatial" (r,) SpatialConv,
"cp" (R,) CPConv. 1×1 convolutions and linear layers are matrices, and have the first form alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from .. import layouts, linalg
from ..errors import LowrankError
from ..linalg import tucker as numerics
from ..nn import (
    ChannelConv,
    CPConv,
    Geometry,
    SpatialConv,
    TuckerConv,
    channel_cost,
    cp_cost,
    spatial_cost,
    tucker_cost,
)
from ..types import Cost, Curve, Method, Option, Site, Size, Statistics
from .common import gram_of, out_gram_of
from .sampled import pareto
from .svd import SVD
from .two_sided import TwoSided
from .whitened import Whitened

STEPS = 16  # numbers of input channels that a Tucker curve is computed for
SPATIAL_STEPS = 32  # ranks of rows and columns in the metric of patches
CP_STEPS, CP_SWEEPS, CP_STARTS = 6, 60, 1  # every rank of it is an iteration
SWEEPS = 3  # of alternation in the metric of patches
Errors = list[tuple[Size, float]]


@dataclass(frozen=True)
class Metric:
    """What a weight has to be near in: ‖S(W − Ŵ)H^½‖², None for the identity.

    Attributes:
        gram: H (I·K, I·K), of patches.
        root: S (O, O) as `output_root` gives it.
    """

    gram: Tensor | None = None
    root: Tensor | None = None

    def turned(self, weight: Tensor) -> Tensor:
        """S W of a weight (O, …)."""
        if self.root is None:
            return weight
        return (self.root.to(weight) @ weight.flatten(1)).view_as(weight)

    def back(self, outputs: Tensor) -> Tensor:
        """S⁻¹ of the output side of a form (O, r)."""
        return outputs if self.root is None else linalg.unrooted(self.root, outputs)


class Form(Protocol):
    """One way to store a convolution; weights are (O, I, *kernel), float64."""

    def fits(self, geometry: Geometry) -> bool:
        """Whether it is another form than fewer channels there."""

    def most(self, geometry: Geometry) -> Size:
        """The largest sizes."""

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost: ...

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        """Of many sizes: what `build` gives is no worse."""

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        """The form nearest to `weight` in the metric, with the geometry and bias of `module`."""


class _Tucker:
    def fits(self, geometry: Geometry) -> bool:
        return geometry.kernel_numbers > 1

    def most(self, geometry: Geometry) -> Size:
        return geometry.out_channels, geometry.in_channels

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost:
        return tucker_cost(geometry, *size, itemsize=itemsize)

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        whole = metric.turned(weight).flatten(2)
        if metric.gram is None:
            table = numerics.hosvd_errors(whole)
            inputs = steps(table.shape[1] - 1, STEPS)
            return [
                ((r_out, r_in), float(table[r_out, r_in]))
                for r_in in inputs
                for r_out in range(1, table.shape[0])
            ]
        first, found = numerics.first_of(whole, metric.gram), Errors()
        for r_in in steps(len(first), STEPS):
            kernel, inner, lost = numerics.conditioned(whole, first[:r_in], metric.gram)
            tails = (numerics.outer_errors(kernel, inner) + lost).tolist()
            found += [((r_out, r_in), error) for r_out, error in enumerate(tails) if r_out]
        return found

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        whole, (r_out, r_in) = metric.turned(weight).flatten(2), size
        if metric.gram is None:
            parts = numerics.tucker(whole, (r_out, r_in))
        else:
            first = numerics.first_of(whole, metric.gram)[:r_in]
            kernel, inner, _ = numerics.conditioned(whole, first, metric.gram)
            start = (*numerics.outer(kernel, inner, r_out, r_in), first)
            parts, _ = numerics.alternated(whole, start, metric.gram, sweeps=SWEEPS)
        last, core, first = parts
        return TuckerConv.from_parts(module, metric.back(last), core, first)


class _KernelLast:
    """Fewer channels first, then the kernel to all outputs: Tucker without its last part."""

    def fits(self, geometry: Geometry) -> bool:
        return geometry.kernel_numbers > 1

    def most(self, geometry: Geometry) -> Size:
        return (geometry.in_channels,)

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost:
        return channel_cost(geometry, *size, itemsize=itemsize, wide="last")

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        whole = metric.turned(weight).flatten(2)
        if metric.gram is None:
            tails = linalg.tails(linalg.energies(_taps(whole))).tolist()
            return [((rank,), error) for rank, error in enumerate(tails) if rank]
        first, found = numerics.first_of(whole, metric.gram), Errors()
        for rank in steps(len(first), SPATIAL_STEPS):
            lost = numerics.conditioned(whole, first[:rank], metric.gram)[2]
            found.append(((rank,), lost))
        return found

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        whole, rank = metric.turned(weight).flatten(2), size[0]
        outputs, _, taps = whole.shape
        if metric.gram is None:
            up, down = linalg.factor(_taps(whole), rank)
            kernel = up.view(outputs, taps, rank).transpose(1, 2)
        else:
            first = numerics.first_of(whole, metric.gram)[:rank]
            flat, inner, _ = numerics.conditioned(whole, first, metric.gram)
            full = min(outputs, rank * taps)
            start = (*numerics.outer(flat, inner, full, rank), first)
            (last, core, first), _ = numerics.alternated(whole, start, metric.gram, sweeps=SWEEPS)
            up = torch.einsum("op,pjk->okj", last, core).reshape(outputs * taps, rank)
            up, down = linalg.balance(up, first)
            kernel = up.view(outputs, taps, rank).transpose(1, 2)
        kernel = metric.back(kernel.flatten(1)).view(outputs, rank, taps)
        return ChannelConv.from_factors(module, down, kernel.flatten(1), wide="last")


class _Spatial:
    def fits(self, geometry: Geometry) -> bool:
        return len(geometry.kernel_size) == 2 and min(geometry.kernel_size) > 1

    def most(self, geometry: Geometry) -> Size:
        height, width = geometry.kernel_size
        return (min(geometry.out_channels * width, geometry.in_channels * height),)

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost:
        return spatial_cost(geometry, *size, itemsize=itemsize)

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        whole = metric.turned(weight)
        if metric.gram is None:
            tails = linalg.tails(linalg.spatial_energies(whole)).tolist()
            return [((rank,), error) for rank, error in enumerate(tails) if rank]
        bounds = linalg.spatial_bounds(whole, metric.gram, SPATIAL_STEPS)
        return [((rank,), error) for rank, error in bounds]

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        up, down = linalg.spatial_factors(
            metric.turned(weight), size[0], metric.gram, sweeps=SWEEPS
        )
        return SpatialConv.from_factors(module, down, metric.back(up.flatten(1)).view_as(up))


class _CP:
    def fits(self, geometry: Geometry) -> bool:
        return geometry.kernel_numbers > 1

    def most(self, geometry: Geometry) -> Size:
        every = (geometry.out_channels, geometry.in_channels, *geometry.kernel_size)
        return (torch.Size(every).numel() // max(every),)

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost:
        return cp_cost(geometry, *size, itemsize=itemsize)

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        found = Errors()
        even = -(-weight.numel() // sum(weight.shape))
        for rank in steps(even, CP_STEPS):
            try:
                parts = self._parts(weight, rank)
            except LowrankError:  # components that cancel: no option of that rank
                continue
            found.append(((rank,), float((weight - linalg.rebuilt_cp(parts)).square().sum())))
        return found

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        last, taps, first = self._parts(weight, size[0])
        return CPConv.from_factors(module, last, taps, first)

    def _parts(self, weight: Tensor, rank: int) -> tuple[Tensor, list[Tensor], Tensor]:
        return linalg.cp_factors(weight, rank, starts=CP_STARTS, sweeps=CP_SWEEPS)


FORMS: dict[str, Form] = {
    "tucker": _Tucker(), "spatial": _Spatial(), "kernel-last": _KernelLast(), "cp": _CP(),
}  # fmt: skip
JOINED = ("tucker", "spatial")  # with the kernel last too, outputs are nearer, predictions are not


@dataclass(frozen=True)
class Tucker:
    """By the weight alone. The curve of (r_out, r_in) is the HOSVD's, a bound for what HOOI gives.

    Options: `seed` as for `SVD`.
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
    """By the weight alone, the kernel first or last, whichever is nearer at its cost.

    Options: `seed` as for `SVD`.
    """

    forms = ("kernel-last",)
    name = "channel"


@dataclass(frozen=True)
class Spatial(Tucker):
    """By the weight alone: the best there is. Options: `seed` as for `SVD`."""

    forms = ("spatial",)
    name = "spatial"


@dataclass(frozen=True)
class CP(Tucker):
    """By the weight alone, for a few ranks; one whose components cancel is left out.

    Options: `seed` as for `SVD`; the start of the iteration is always the same.
    """

    forms = ("cp",)
    name = "cp"


@dataclass(frozen=True)
class WhitenedTucker(Tucker):
    """By the outputs. Options: `seed` as for `Whitened`."""

    name = "whitened-tucker"
    needs = frozenset({"gram"})

    def _channels(self) -> Method:
        return Whitened(self.seed)

    def _metric(self, module: nn.Module, stats: Statistics) -> Metric:
        return Metric(gram_of(stats, layouts.matrix(module).shape[1]))


@dataclass(frozen=True)
class WhitenedChannel(WhitenedTucker):
    """By the outputs, the kernel first or last. Options: `seed` as for `Whitened`."""

    forms = ("kernel-last",)
    name = "whitened-channel"


@dataclass(frozen=True)
class WhitenedSpatial(WhitenedTucker):
    """By the outputs. Options: `seed` as for `Whitened`."""

    forms = ("spatial",)
    name = "whitened-spatial"


@dataclass(frozen=True)
class WhitenedConv(WhitenedTucker):
    """By the outputs, the best of all forms. Options: `seed` as for `Whitened`."""

    forms = JOINED
    name = "whitened-conv"


@dataclass(frozen=True)
class TwoSidedTucker(Tucker):
    """By the predictions. Options: `damp` as for `TwoSided`, `seed`."""

    damp: float = linalg.DAMP
    name = "two-sided-tucker"
    needs = frozenset({"gram", "out_gram"})

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        return TwoSided(self.damp, self.seed).error(module, weight, stats)

    def _channels(self) -> Method:
        return TwoSided(self.damp, self.seed)

    def _metric(self, module: nn.Module, stats: Statistics) -> Metric:
        outputs, inputs = layouts.matrix(module).shape
        root = linalg.output_root(out_gram_of(stats, outputs), self.damp)
        return Metric(gram_of(stats, inputs), root)


@dataclass(frozen=True)
class TwoSidedConv(TwoSidedTucker):
    """By the predictions, the best of all forms. Options: `damp` as for `TwoSided`, `seed`."""

    forms = JOINED
    name = "two-sided-conv"


@dataclass(frozen=True)
class Channels:
    """A method as it is, where its convolutions are to have a rank: no other form beside it."""

    way: Method

    @property
    def kinds(self) -> frozenset[str]:
        return self.way.kinds

    @property
    def needs(self) -> frozenset[str]:
        return self.way.needs

    def curve(self, site: Site, stats: Statistics) -> Curve:
        return self.way.curve(site, stats)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        return self.way.factor(module, option, stats)


def fitted(module: nn.Module, weight: Tensor, size: Size, form: str, metric: Metric) -> nn.Module:
    """The layer of a form and a size nearest to a weight in the metric of patches and of outputs.

    Args:
        weight: (O, I, *kernel): the module's own, or what it should be for the stream it reads.
    """
    return FORMS[form].build(module, weight, size, metric)


def joined(plain: Curve, site: Site, method: str, forms: Sequence[str], metric: Metric) -> Curve:
    """The options of all forms, those that none beats: cost rising, error falling."""
    if not forms:
        return plain
    geometry, itemsize = Geometry.of(site.module), layouts.matrix(site.module).dtype.itemsize
    options = [o for o in plain.options if not o.dense]
    for form in forms:
        for size, error in FORMS[form].errors(whole(site.module), metric):
            cost = FORMS[form].cost(geometry, size, itemsize)
            options.append(Option(method, size, form, cost, min(error, plain.total)))
    return replace(plain, options=pareto(site, options), tails=None, exact=False)


def fitting(module: nn.Module, forms: Sequence[str]) -> tuple[str, ...]:
    """Those of the forms that are more than a matrix for this layer."""
    if layouts.kind(module) != "conv":
        return ()
    return tuple(form for form in forms if FORMS[form].fits(Geometry.of(module)))


def whole(module: nn.Module) -> Tensor:
    """The weight (O, I, *kernel), float64."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().double()


def _taps(weight: Tensor) -> Tensor:
    """(O, I, K) as (O · K, I)."""
    return weight.transpose(1, 2).flatten(0, 1)


def steps(most: int, count: int) -> Sequence[int]:
    """So many numbers from 1 to `most`, evenly spread, all where they are few."""
    if most <= count:
        return range(1, most + 1)
    return sorted({max(round(most * i / count), 1) for i in range(1, count + 1)})


def size_of(option: Option, module: nn.Module) -> Size:
    """The size that an option asks for, checked against the layer.

    Raises:
        LowrankError: the kernel has no such form, or no such ranks.
    """
    form, geometry = FORMS[option.storage], Geometry.of(module)
    if not form.fits(geometry):
        raise LowrankError(
            f"a kernel of {geometry.kernel_size} has no {option.storage} form: it is a matrix"
        )
    most, size = form.most(geometry), option.size or ()
    if len(size) != len(most) or not all(1 <= n <= m for n, m in zip(size, most, strict=True)):
        what = "(r_out, r_in)" if len(most) == 2 else "(rank,)"
        raise LowrankError(
            f"{option.storage} ranks must be {what} from 1 up to {most}, got {option.size}"
        )
    return size
