"""Tucker-2 of convolutions, beside fewer channels: what is nearer at equal cost, rank by rank.

`tucker` minimises ‖W − Ŵ‖ (HOSVD, then HOOI; Kim et al., arXiv 1511.06530); `whitened-tucker` the
error of the *outputs*, ‖(W − Ŵ)H^½‖ with the Gram matrix H of the patches; `two-sided-tucker`
weighs the outputs too, by the gradients of the model's own loss. On four layers of a trained
ResNet-20 it leaves less output error than whitened channels at equal parameters.

A curve holds the options of both forms that no other option beats: sizes (r,) are channels
(ChannelConv), sizes (r_out, r_in) the three convolutions of TuckerConv. 1×1 convolutions and linear
layers are matrices, and have the first form alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import layouts, linalg
from ..errors import LowrankError
from ..linalg import tucker as numerics
from ..nn import Geometry, TuckerConv, tucker_cost
from ..types import Curve, Method, Option, Site, Statistics
from .common import gram_of, out_gram_of
from .svd import SVD
from .two_sided import TwoSided
from .whitened import Whitened

STORAGE = "tucker"
STEPS = 16  # numbers of input channels that a curve is computed for
Errors = list[tuple[tuple[int, int], float]]  # by (r_out, r_in)


@dataclass(frozen=True)
class Tucker:
    """By the weight alone. The curve of (r_out, r_in) is the HOSVD's, a bound for what HOOI gives.

    Options: `seed` as for `SVD`.
    """

    seed: int = 0
    kinds = frozenset({"conv"})
    needs = frozenset[str]()

    def curve(self, site: Site, stats: Statistics) -> Curve:
        plain = SVD(self.seed).curve(site, stats)
        if not has_kernel(site.module):
            return plain
        table = numerics.hosvd_errors(cube(site.module))
        errors = [
            ((r_out, r_in), float(table[r_out, r_in]))
            for r_in in steps(table.shape[1] - 1)
            for r_out in range(1, table.shape[0])
        ]
        return replace(joined(plain, site, "tucker", errors), exact=False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        if option.storage != STORAGE:
            return SVD(self.seed).factor(module, option, stats)
        parts = numerics.tucker(cube(module), ranks_of(option, module))
        return TuckerConv.from_parts(module, *parts)


@dataclass(frozen=True)
class WhitenedTucker:
    """By the outputs. Options: `seed` as for `Whitened`."""

    seed: int = 0
    kinds = frozenset({"conv"})
    needs = frozenset({"gram"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        plain = Whitened(self.seed).curve(site, stats)
        if not has_kernel(site.module):
            return plain
        errors = _errors(cube(site.module), gram_of(stats, site.shape[1]))
        return joined(plain, site, "whitened-tucker", errors)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        if option.storage != STORAGE:
            return Whitened(self.seed).factor(module, option, stats)
        gram = gram_of(stats, layouts.matrix(module).shape[1])
        return fitted(module, cube(module), ranks_of(option, module), gram)


@dataclass(frozen=True)
class TwoSidedTucker:
    """By the predictions. Options: `damp` and `seed` as for `TwoSided`."""

    damp: float = linalg.DAMP
    seed: int = 0
    kinds = frozenset({"conv"})
    needs = frozenset({"gram", "out_gram"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        plain = TwoSided(self.damp, self.seed).curve(site, stats)
        if not has_kernel(site.module):
            return plain
        whole, gram = cube(site.module), gram_of(stats, site.shape[1])
        turned = torch.einsum("po,oik->pik", self._root(site.module, stats), whole)
        return joined(plain, site, "two-sided-tucker", _errors(turned, gram))

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        if option.storage != STORAGE:
            return TwoSided(self.damp, self.seed).factor(module, option, stats)
        gram = gram_of(stats, layouts.matrix(module).shape[1])
        ranks, root = ranks_of(option, module), self._root(module, stats)
        return fitted(module, cube(module), ranks, gram, root=root)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        return TwoSided(self.damp, self.seed).error(module, weight, stats)

    def _root(self, module: nn.Module, stats: Statistics) -> Tensor:
        return linalg.output_root(out_gram_of(stats, len(layouts.matrix(module))), self.damp)


@dataclass(frozen=True)
class Channels:
    """A method as it is, where its convolutions are to have a rank: no Tucker form beside it."""

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


def fitted(
    module: nn.Module,
    whole: Tensor,
    ranks: tuple[int, int],
    gram: Tensor,
    *,
    root: Tensor | None = None,
) -> TuckerConv:
    """The TuckerConv nearest to a weight (O, I, K) in the metric of patches and of outputs.

    Args:
        whole: the module's own weight, or what it should be for the stream that it reads.
        root: S (O, O) as `output_root` gives it; None stands for the identity.
    """
    r_out, r_in = ranks
    turned = whole if root is None else torch.einsum("po,oik->pik", root.to(whole), whole)
    first = numerics.first_of(turned, gram)[:r_in]
    kernel, metric, _ = numerics.conditioned(turned, first, gram)
    last, core = numerics.outer(kernel, metric, r_out, r_in)
    if root is not None:
        last = linalg.unrooted(root, last)
    return TuckerConv.from_parts(module, last, core, first)


def joined(plain: Curve, site: Site, method: str, errors: Errors) -> Curve:
    """The options of both forms, those that none beats: cost rising, error falling."""
    geometry, itemsize = Geometry.of(site.module), layouts.matrix(site.module).dtype.itemsize
    options = [o for o in plain.options if not o.dense]
    for (r_out, r_in), error in errors:
        cost = tucker_cost(geometry, r_out, r_in, itemsize=itemsize)
        if cost.params < site.cost.params and cost.bytes < site.cost.bytes:
            options.append(Option(method, (r_out, r_in), STORAGE, cost, error))
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost.params, o.error, o.storage)):
        if not best or option.error < best[-1].error:
            best.append(option)
    return replace(plain, options=(*best, plain.dense), tails=None)


def has_kernel(module: nn.Module) -> bool:
    """Whether more than one number stands under the kernel: else it is a matrix."""
    return layouts.kind(module) == "conv" and Geometry.of(module).kernel_numbers > 1


def cube(module: nn.Module) -> Tensor:
    """The weight as (O, I, K), float64."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.detach().double().flatten(2)


def steps(channels: int) -> Sequence[int]:
    """Numbers of input channels, evenly spread, all where they are few."""
    if channels <= STEPS:
        return range(1, channels + 1)
    return sorted({max(round(channels * i / STEPS), 1) for i in range(1, STEPS + 1)})


def ranks_of(option: Option, module: nn.Module) -> tuple[int, int]:
    """(r_out, r_in), checked against the layer.

    Raises:
        LowrankError: they are no ranks of this kernel.
    """
    outputs, inputs = cube(module).shape[:2]
    size = option.size or ()
    if len(size) != 2 or not (1 <= size[0] <= outputs and 1 <= size[1] <= inputs):
        raise LowrankError(
            f"Tucker ranks must be (r_out, r_in) up to ({outputs}, {inputs}), got {option.size}"
        )
    return (size[0], size[1])


def _errors(whole: Tensor, gram: Tensor) -> Errors:
    first, found = numerics.first_of(whole, gram), []
    for r_in in steps(len(first)):
        kernel, metric, lost = numerics.conditioned(whole, first[:r_in], gram)
        tails = (numerics.outer_errors(kernel, metric) + lost).tolist()
        found += [((r_out, r_in), error) for r_out, error in enumerate(tails) if r_out]
    return found
