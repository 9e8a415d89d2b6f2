"""A linear layer of rank r in r(out + in − r) numbers: r pivot outputs or inputs, and a mixing map.

PIFA (arXiv 2501.19090) computes r pivot outputs y_p = B x, and the others from them, y_o = C y_p.
Here also the mirrored form: the other inputs are mixed into r pivot inputs, y = U (x_p + C x_o).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError, unknown
from ..types import Cost, Size
from .children import linear_weight
from .form import LinearForm
from .lowrank_linear import LowRankLinear

Side = Literal["out", "in"]


class PivotedLinear(LinearForm):
    """Two `nn.Linear` children and the order of the features on one side.

    Tensors, side "out": `down.weight` (rank, in), `mix.weight` (out − rank, rank), `order` (out,)
    int32: the place of each output in [pivots, mixed]. Side "in": `up.weight` (out, rank),
    `mix.weight` (rank, in − rank), `order` (in,) int32: the pivot inputs, then the mixed ones.
    Either side: `bias` (out,).
    """

    STORAGE = "pivoted"
    WORDS = frozenset({"side"})
    REFITTED = True

    order: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        side: Side = "out",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if side not in get_args(Side):
            raise unknown("side", str(side), get_args(Side))
        ordered = out_features if side == "out" else in_features
        if not 1 <= rank < ordered:
            raise LowrankError(
                f"rank must be in [1, {ordered - 1}] to pivot the {ordered} {side}puts of a layer "
                f"of shape ({out_features}, {in_features}), got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.side: Side = side
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        if side == "out":
            self.down = nn.Linear(in_features, rank, bias=False, **place)
            self.mix = nn.Linear(rank, out_features - rank, bias=False, **place)
        else:
            self.mix = nn.Linear(in_features - rank, rank, bias=False, **place)
            self.up = nn.Linear(rank, out_features, bias=False, **place)
        self.register_buffer("order", torch.arange(ordered, dtype=torch.int32, device=device))
        shift = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.register_parameter("bias", shift)

    @classmethod
    def from_factors(
        cls,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        *,
        side: Side | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The layer of weight up · down, by pivots with |coefficients| of at most 2.

        Args:
            down: (rank, in), in the compute dtype.
            up: (out, rank).
            bias: (out,) or None; copied.
            side: None: that of `pivot_side`.
            dtype: of the layer; None: that of the factors.
        """
        (rank, in_features), out_features = down.shape, up.shape[0]
        side = pivot_side(out_features, in_features) if side is None else side
        dtype = down.dtype if dtype is None else dtype
        has_bias = bias is not None
        layer = cls.empty(
            in_features=in_features, out_features=out_features, rank=rank, side=side, bias=has_bias
        )
        if side == "out":
            kept, mix, order = linalg.pivoted(up.detach(), down.detach(), dtype)
            layer.down.weight = _own(kept, dtype)
            layer.mix.weight, layer.order = _own(mix, dtype), order.argsort().int()
        else:
            kept, mix, order = linalg.pivoted(down.detach().T, up.detach().T, dtype)
            layer.up.weight = _own(kept.T, dtype)
            layer.mix.weight, layer.order = _own(mix.T, dtype), order.int()
        if bias is not None:
            layer.bias = _own(bias, dtype)
        return layer

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, rank: int, side: Side, bias: bool
    ) -> Self:
        return cls(in_features, out_features, rank, side=side, bias=bias, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return pivoted_cost(*shape, *size, itemsize=itemsize)

    @property
    def _kept(self) -> Tensor:
        return linear_weight(self.down if self.side == "out" else self.up)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        if self.side == "out":
            kept = self.down(input)  # (..., rank)
            y = torch.cat((kept, self.mix(kept)), -1).index_select(-1, self.order)
        else:
            kept, mixed = (input.index_select(-1, part) for part in self._parts())
            y = self.up(kept + self.mix(mixed))
        return y if self.bias is None else y + self.bias.to(y.dtype)  # autocast: that of y

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        kept = self._kept.to(dtype or self._kept.dtype)
        mix = linear_weight(self.mix).to(kept.dtype)
        if self.side == "out":
            return torch.cat((kept, mix @ kept)).index_select(0, self.order)
        return torch.cat((kept, kept @ mix), 1).index_select(1, self.order.argsort())

    def fault(self) -> str:
        places = torch.arange(len(self.order), device=self.order.device)
        if torch.equal(self.order.long().sort().values, places):
            return ""
        return f"order must hold every number in [0, {len(places) - 1}] once"

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "side": self.side,
            "bias": self.bias is not None,
        }

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self._kept.dtype.itemsize
        return pivoted_cost(*shape, self.rank, itemsize=itemsize, side=self.side)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, side={self.side}"

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self.order[: self.rank], self.order[self.rank :]


def pivot_side(out_features: int, in_features: int) -> Side:
    """The shorter side, since its features are gathered for every token.

    On the longer side that costs a good part of what the factors save; benchmarks/speed.py times
    both.
    """
    return "in" if out_features > in_features else "out"


def pivoted_cost(
    out_features: int, in_features: int, rank: int, *, itemsize: int, side: Side | None = None
) -> Cost:
    """Cost of the pivoted form: rank · (out + in − rank) numbers, and `order` in four bytes each.

    Args:
        itemsize: bytes of one number.
        side: None: that of `pivot_side`.
    """
    params = rank * (out_features + in_features - rank)
    side = pivot_side(out_features, in_features) if side is None else side
    ordered = out_features if side == "out" else in_features
    return Cost(params, params * itemsize + torch.int32.itemsize * ordered, params)


def pivot_layer(layer: LowRankLinear) -> PivotedLinear:
    """The same map in the pivoted form; `layer` is left unchanged.

    Computed in float64. If the unrounded factors are available, pass them to
    `PivotedLinear.from_factors` instead: here rounded numbers are rounded a second time.

    Raises:
        LowrankError: the rank leaves nothing to mix.
    """
    down, up = layer.down.weight.double(), layer.up.weight.double()
    made = PivotedLinear.from_factors(down, up, layer.bias, dtype=layer.down.weight.dtype)
    return made.train(layer.training)


def _own(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter that holds a contiguous copy of the tensor in `dtype`."""
    copy = tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=dtype.is_floating_point)
