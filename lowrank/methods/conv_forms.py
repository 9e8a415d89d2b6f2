"""The stored forms of a convolution, other than fewer channels with the kernel first.

Each says where it applies, what it costs, its error at every size, and how to build it: by the
weight, ‖W − Ŵ‖, or by outputs and predictions, ‖S(W − Ŵ)H^½‖. The numerics are in linalg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..linalg import tucker as numerics
from ..nn import (
    ChannelConv,
    CPConv,
    Geometry,
    SpatialConv,
    TubalConv,
    TuckerConv,
    channel_cost,
    cp_cost,
    spatial_cost,
    tubal_cost,
    tucker_cost,
)
from ..types import Cost, Factored, Option, Size

STEPS = 16  # input ranks of a Tucker curve
SPATIAL_STEPS = 32  # ranks of spatial and kernel-last curves in the metric of patches
CP_STEPS, CP_SWEEPS, CP_STARTS = 6, 60, 1  # few, since every rank takes an iteration
SWEEPS = 3  # of alternation in the metric of patches
Errors = list[tuple[Size, float]]


@dataclass(frozen=True)
class Metric:
    """The metric of a weight's error, ‖S(W − Ŵ)H^½‖²; None for the identity.

    Attributes:
        gram: H (I·K, I·K), of patches.
        root: S (O, O) from `output_root`.
    """

    gram: Tensor | None = None
    root: Tensor | None = None

    def steadied(self) -> tuple[Metric, float]:
        """The metric that forms are fitted in at first, and the unit of its errors: a power of two
        that keeps those of tiny inputs and gradients from underflowing."""
        gram, root, unit = self.gram, self.root, 1.0
        if gram is not None:
            unit = linalg.unit_of(gram.diagonal().mean())
            gram = linalg.steady(gram / unit)
        if root is not None:
            scale = linalg.unit_of(root)
            root, unit = root / scale, unit * scale**2
        return Metric(gram, root), unit

    def turned(self, weight: Tensor) -> Tensor:
        """S W of a weight (O, …)."""
        if self.root is None:
            return weight
        return (self.root.to(weight) @ weight.flatten(1)).view_as(weight)

    def back(self, outputs: Tensor) -> Tensor:
        """S⁻¹ times the output side of a form (O, r)."""
        return outputs if self.root is None else linalg.unrooted(self.root, outputs)


class ConvFit(Protocol):
    """One stored form of a convolution; weights are (O, I, *kernel), float64."""

    def fits(self, geometry: Geometry) -> bool:
        """Whether the form differs from fewer channels for this geometry."""

    def most(self, geometry: Geometry) -> Size:
        """The largest size."""

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost: ...

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        """Errors at many sizes; upper bounds for what `build` gives."""

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        """The form closest to `weight` in the metric, with the geometry and bias of `module`."""


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
        first, errors = numerics.first_of(whole, metric.gram), Errors()
        inputs = steps(len(first), STEPS)
        fits = numerics.nested_fits(whole, first, metric.gram, inputs)
        for r_in, (moment, lost) in zip(inputs, fits, strict=True):
            most = min(len(whole), r_in * whole.shape[2])
            tails = (numerics.outer_errors(moment, most) + lost).tolist()
            errors += [((r_out, r_in), error) for r_out, error in enumerate(tails) if r_out]
        return errors

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        whole, (r_out, r_in) = metric.turned(weight).flatten(2), size
        if metric.gram is None:
            parts = numerics.tucker_factors(whole, (r_out, r_in))
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
        first = numerics.first_of(whole, metric.gram)
        ranks = steps(len(first), SPATIAL_STEPS)
        fits = numerics.nested_fits(whole, first, metric.gram, ranks)
        return [((rank,), lost) for rank, (_, lost) in zip(ranks, fits, strict=True)]

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
        outputs, inputs, height, width = whole.shape
        # Ranks from break-even on are no options, and the smaller ones need less of the metric.
        even = whole.numel() / (outputs * width + inputs * height)
        ranks = steps(min(outputs * width, inputs * height), SPATIAL_STEPS)
        ranks = [rank for rank in ranks if rank < even] or ranks[:1]
        bounds = linalg.spatial_bounds(whole, metric.gram, ranks)
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
        errors = Errors()
        even = -(-weight.numel() // sum(weight.shape))
        for rank in steps(even, CP_STEPS):
            if rank * sum(weight.shape) >= weight.numel() and rank > 1:
                break  # no smaller than the weight, and the slowest
            try:
                parts = self._parts(weight, rank)
            except LowrankError:  # components that diverge: no option of that rank
                continue
            errors.append(((rank,), float((weight - linalg.rebuilt_cp(parts)).square().sum())))
        return errors

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        last, taps, first = self._parts(weight, size[0])
        return CPConv.from_factors(module, last, taps, first)

    def _parts(self, weight: Tensor, rank: int) -> tuple[Tensor, list[Tensor], Tensor]:
        return linalg.cp_factors(weight, rank, starts=CP_STARTS, sweeps=CP_SWEEPS)


class _Tubal:
    def fits(self, geometry: Geometry) -> bool:
        return geometry.kernel_numbers > 1

    def most(self, geometry: Geometry) -> Size:
        return (geometry.kernel_numbers * min(geometry.out_channels, geometry.in_channels),)

    def cost(self, geometry: Geometry, size: Size, itemsize: int) -> Cost:
        return tubal_cost(geometry, *size, itemsize=itemsize)

    def errors(self, weight: Tensor, metric: Metric) -> Errors:
        even = weight.numel() // sum(weight.shape[:2])  # more components are no options
        errors = linalg.tubal_errors(metric.turned(weight), metric.gram, max(even, 1))
        return [((count,), error) for count, error in enumerate(errors.tolist()) if count]

    def build(self, module: nn.Module, weight: Tensor, size: Size, metric: Metric) -> nn.Module:
        up, down, ranks = linalg.tubal_factors(metric.turned(weight), size[0], metric.gram)
        return TubalConv.from_factors(module, down, metric.back(up), ranks)


FORMS: dict[str, ConvFit] = {
    "tucker": _Tucker(), "spatial": _Spatial(), "kernel-last": _KernelLast(), "cp": _CP(),
    "tubal": _Tubal(),
}  # fmt: skip


def fitted(module: nn.Module, weight: Tensor, size: Size, form: str, metric: Metric) -> nn.Module:
    """The layer of a form and a size that is closest to a weight in the metric.

    Args:
        weight: (O, I, *kernel): the module's own, or one regressed for a refit.
    """
    root = None if metric.root is None else metric.root / linalg.unit_of(metric.root)

    def build(gram: Tensor | None) -> nn.Module:
        return FORMS[form].build(module, weight, size, Metric(gram, root))

    def dense(new: nn.Module) -> list[Tensor]:
        return [cast(Factored, new).dense_weight().detach()]

    return linalg.bounded_fit(weight, metric.gram, build, dense)


def _taps(weight: Tensor) -> Tensor:
    """(O, I, K) as (O · K, I)."""
    return weight.transpose(1, 2).flatten(0, 1)


def steps(most: int, count: int) -> Sequence[int]:
    """At most `count` numbers from 1 to `most`, evenly spaced."""
    if most <= count:
        return range(1, most + 1)
    return sorted({max(round(most * i / count), 1) for i in range(1, count + 1)})


def size_of(option: Option, module: nn.Module) -> Size:
    """The size of an option, checked against the layer.

    Raises:
        LowrankError: an invalid form or size for this kernel.
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
