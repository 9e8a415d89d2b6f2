"""A convolution stored as low rank at every frequency of its kernel, and run as a dense one.

W[:, :, k] = Σ_f M[k, f] · up_f down_f, with the cosines M of linalg/tubal.py (t-SVD: Kilmer and
Martin, LAA 435, 2011). The kernel is built in every forward pass, K products of (O, R_f)
by (R_f, I), whatever the number of positions. It saves storage, and no products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..types import Cost
from .factored_conv import FactoredConv
from .form import check_traceable
from .geometry import Geometry
from .lowrank_linear import own


class TubalConv(FactoredConv):
    """y = conv(x, W), with g groups and R components in each.

    Tensors: `down` (g·R, I/g), `up` (O, R), `bias` (O,). Components are ordered by frequency, of
    which each has `ranks[f]`, in every group the same. The module has the attributes of an nn.Conv;
    it holds no layers, so that tools that look for some find none.
    """

    STORAGE = "tubal"
    SIZE = ("components",)
    REFITTED = True

    bias: nn.Parameter | None

    def __init__(self, geometry: Geometry, ranks: Sequence[int], *, bias: bool) -> None:
        """Built on the meta device; see `from_factors`.

        Raises:
            LowrankError: not a rank for each of the K frequencies, or none above 0.
        """
        super().__init__()
        taps, components = geometry.kernel_numbers, sum(ranks)
        if len(ranks) != taps or components < 1:
            raise LowrankError(
                f"a kernel of {geometry.kernel_size} has {taps} frequencies, and one component at "
                f"least: got ranks {list(ranks)}"
            )
        self.geometry, self.ranks = geometry, tuple(ranks)
        geometry.label(self)
        outputs, inputs = geometry.weight_shape[:2]
        self.down = nn.Parameter(torch.empty(geometry.groups * components, inputs, device="meta"))
        self.up = nn.Parameter(torch.empty(outputs, components, device="meta"))
        shift = nn.Parameter(torch.empty(outputs, device="meta")) if bias else None
        self.register_parameter("bias", shift)

    @classmethod
    def from_factors(cls, conv: nn.Module, down: Tensor, up: Tensor, ranks: Sequence[int]) -> Self:
        """The factored form of `conv`, in its dtype and on its device; the bias is copied.

        Args:
            conv: nn.Conv1d, 2d or 3d.
            down: (g·R, I/g).
            up: (O, R).
            ranks: how many of the R components each of the K frequencies has.

        Raises:
            LowrankError: the factors do not fit the convolution or each other.
        """
        geometry, bias, weight = Geometry.of(conv), conv.bias, conv.weight
        layer = cls(geometry, ranks, bias=bias is not None)
        for name, factor in (("down", down), ("up", up)):
            shape = tuple(getattr(layer, name).shape)
            if tuple(factor.shape) != shape:
                raise LowrankError(
                    f"`{name}` must have shape {shape}, for {sum(ranks)} components in each of "
                    f"{geometry.groups} groups, got {tuple(factor.shape)}"
                )
            setattr(layer, name, own(factor.to(weight)))  # type: ignore[arg-type]
        if bias is not None:
            layer.bias = own(bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def empty(cls, *, ranks: Sequence[int], bias: bool, **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), ranks, bias=bias)

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        return (
            f"{len(layers)} convolutions are stored by frequency and multiply by the dense kernel: "
            "they are smaller but not faster"
        )

    @property
    def components(self) -> int:
        return sum(self.ranks)

    def forward(self, input: Tensor) -> Tensor:
        """input (B, I, *space) -> (B, O, *space')."""
        check_traceable(self, input)
        kernel = self.dense_weight().view(self.geometry.weight_shape)
        return self.geometry.convolve(input, kernel, self.bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (O, I/g · K), computed in `dtype` (None: that of the factors)."""
        dtype, groups = dtype or self.up.dtype, (self.geometry.groups, -1)
        up = self.up.to(dtype).unflatten(0, groups)  # (g, O/g, R)
        down = self.down.to(dtype).unflatten(0, groups)  # (g, R, I/g)
        dense = linalg.tubal_weight(up, down, self.ranks, self.geometry.kernel_size)
        return dense.flatten(2).flatten(0, 1)

    def spec(self) -> dict[str, Any]:
        ranks = {"ranks": list(self.ranks), "bias": self.bias is not None}
        return {**self.geometry.spec(), **ranks}

    def cost(self) -> Cost:
        return tubal_cost(self.geometry, self.components, itemsize=self.up.dtype.itemsize)

    def extra_repr(self) -> str:
        return f"components={self.components}, ranks={self.ranks}"


def tubal_cost(geometry: Geometry, components: int, *, itemsize: int) -> Cost:
    """components · (O + I) numbers, and the MACs of the dense convolution, per output position.

    Args:
        components: per group.
        itemsize: bytes of one number.
    """
    params = components * (geometry.out_channels + geometry.in_channels)
    return Cost(params, params * itemsize, torch.Size(geometry.weight_shape).numel())
