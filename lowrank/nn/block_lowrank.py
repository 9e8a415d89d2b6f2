"""A sum of rank-one blocks: W = Σ_k u_k v_kᵀ, each zero off a cyclic run of rows and of columns.

The "generalized block low-rank" matrix of arXiv 2310.18882, as `train.GBLR` leaves it. The authors'
code multiplies masked dense factors and leaves fast products to other hardware; storage format and
forward pass are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LowrankError
from ..linalg import run_mask
from ..types import Cost, Size
from .form import LinearForm, check_traceable
from .lowrank_linear import own

GATHERED = 32  # tokens up to which the stored numbers alone are multiplied
PLACE = torch.int32  # of two bytes, DistributedDataParallel could not hand it on


class Taps(NamedTuple):
    """Where the numbers of `Runs` are read from: of `place` in the state that it had."""

    place: Tensor
    version: int
    columns: Tensor  # of every number
    rows: Tensor  # the first number of every row
    order: Tensor  # the numbers column by column
    terms: Tensor  # the row of each of these
    bags: Tensor  # the first of them in every column


class Runs(nn.Module):
    """A matrix (count, size) whose rows are zero off one cyclic run each.

    Tensors: `weight` (numbers,), the runs row by row, each from its least column on; `place`
    (count, 2), start and width of each run, int32.
    """

    place: Tensor
    _known: Taps | None = None

    def __init__(
        self,
        count: int,
        size: int,
        numbers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(numbers, device=device, dtype=dtype))
        every = torch.arange(count, device=device)  # runs of equal widths, spread evenly
        widths = numbers // count + (every < numbers % count).long()
        place = torch.stack([every * size // count, widths], 1)
        self.register_buffer("place", place.to(PLACE))

    def forward(self, x: Tensor, turned: bool = False) -> Tensor:
        """x (…, size) -> (…, count), or turned: (…, count) -> (…, size)."""
        tokens = x.numel() // x.shape[-1]
        if not (0 < tokens <= GATHERED and self._plain(x)):
            matrix = self.dense(x.dtype)
            return F.linear(x, matrix.T if turned else matrix)
        taps = self._taps()
        index, bags = (taps.terms, taps.bags) if turned else (taps.columns, taps.rows)
        weight = self.weight[taps.order] if turned else self.weight
        table = x.reshape(tokens, -1).T.contiguous()
        y = F.embedding_bag(index, table, bags, mode="sum", per_sample_weights=weight)
        return y.T.reshape(*x.shape[:-1], len(bags))

    def kept(self) -> Tensor:
        """Where the runs are, (count, size) bool."""
        place = self.place.long()
        return run_mask(place[:, 0], place[:, 1], self.size)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (count, size)."""
        mask = self.kept()
        weight = self.weight.to(dtype or self.weight.dtype)
        return weight.new_zeros(mask.shape).masked_scatter(mask, weight)

    def fault(self) -> str:
        """What is wrong with `place`; "" if nothing."""
        starts, widths = self.place.long().unbind(1)
        if bool(_inside(starts, widths, self.size).all()) and int(widths.sum()) == len(self.weight):
            return ""
        return (
            f"place must hold runs within {self.size} entries, of {len(self.weight)} in all, got "
            f"{int(widths.sum())}"
        )

    def _taps(self) -> Taps:
        known = self._known
        if known is None or known.place is not self.place or known.version != self.place._version:
            mask = self.kept()
            number = torch.zeros_like(mask, dtype=torch.int64)
            number[mask] = torch.arange(len(self.weight), device=mask.device)
            known = self._known = Taps(
                self.place, self.place._version, mask.nonzero()[:, 1],
                mask.sum(1).cumsum(0) - mask.sum(1), number.T[mask.T],
                mask.T.nonzero()[:, 1], mask.sum(0).cumsum(0) - mask.sum(0),
            )  # fmt: skip
        return known

    def _plain(self, x: Tensor) -> bool:
        """Whether numbers may be gathered: on a CPU, without autograd or tracing."""
        plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == self.weight.dtype
        graph = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        own = torch.is_autocast_enabled("cpu") or self.place.is_inference()
        return plain and not graph and not traced and not own


class BlockLowRankLinear(LinearForm):
    """y = Σ_k u_k (v_kᵀ x) + b, of `rank` terms that each read a run of inputs and write one.

    Tensors: `down` and `up`, the v and the u as `Runs`, of `inputs` and `outputs` numbers in all;
    `bias` (out,). For few tokens without a gradient just these are multiplied; for more, and in
    training, both are spread to (rank, in) and (out, rank) first, and zeros are multiplied too.
    """

    STORAGE = "block-lowrank"
    SIZE = ("rank", "inputs", "outputs")
    LONGER = frozenset({"down.place", "up.place"})

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, numbers, size in (
            ("inputs", inputs, in_features),
            ("outputs", outputs, out_features),
        ):
            if not 1 <= rank <= numbers <= rank * size:
                raise LowrankError(
                    f"expected rank >= 1 and {name} in [rank, rank · {size}] for a layer of shape "
                    f"({out_features}, {in_features}), got {rank} and {numbers}"
                )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = Runs(rank, in_features, inputs, **place)
        self.up = Runs(rank, out_features, outputs, **place)
        if not self.down.weight.is_meta:
            nn.init.normal_(self.down.weight, std=(rank / inputs) ** 0.5)
            nn.init.normal_(self.up.weight, std=min(out_features / outputs, 1) ** 0.5)
        shift = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.register_parameter("bias", shift)

    @classmethod
    def from_terms(
        cls, up: Tensor, down: Tensor, starts: Tensor, widths: Tensor, bias: Tensor | None
    ) -> Self:
        """The layer of what lies on the runs, which it copies; the rest is dropped.

        Args:
            up: (out, K); down: (K, in).
            starts, widths: (2, K) integers, of rows and of columns.

        Raises:
            LowrankError: shapes do not fit, there is no term, or a run is empty or out of range.
        """
        (out_features, rank), in_features = up.shape, down.shape[1]
        sizes = torch.tensor([[out_features], [in_features]], device=starts.device)
        fits = starts.shape == widths.shape == (2, rank) and len(down) == rank
        if not fits or not bool(_inside(starts, widths, sizes).all()):
            raise LowrankError(
                f"expected u (out, K), v (K, in), and starts and widths (2, K) of runs within "
                f"{out_features} rows and {in_features} columns, got {tuple(up.shape)}, "
                f"{tuple(down.shape)}, {starts.tolist()!r:.60} and {widths.tolist()!r:.60}"
            )
        inputs, outputs = int(widths[1].sum()), int(widths[0].sum())
        layer = cls.empty(
            in_features=in_features, out_features=out_features, rank=rank, inputs=inputs,
            outputs=outputs, bias=bias is not None,
        )  # fmt: skip
        for side, (runs, dense) in enumerate(((layer.up, up.T), (layer.down, down))):
            place = torch.stack([starts[side], widths[side]], 1)
            runs.place = place.to(PLACE, copy=True)
            runs.weight = own(dense[runs.kept()])
        if bias is not None:
            layer.bias = own(bias)
        return layer

    @classmethod
    def empty(
        cls,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        inputs: int,
        outputs: int,
        bias: bool,
    ) -> Self:
        return cls(in_features, out_features, rank, inputs, outputs, bias=bias, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return block_lowrank_cost(*shape, *size, itemsize=itemsize)

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        sides = [(m.out_features, m.in_features, m.rank) for m in layers]
        slow = sum(rank * (out + inner) >= out * inner for out, inner, rank in sides)
        if not slow:
            return ""
        return (
            f"with many tokens, zeros off the blocks are multiplied too: {slow} layers need as "
            "many MACs as dense ones or more, and are smaller but not faster"
        )

    @property
    def in_features(self) -> int:
        return self.down.size

    @property
    def out_features(self) -> int:
        return self.up.size

    @property
    def rank(self) -> int:
        """Number of terms."""
        return len(self.down.place)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        y: Tensor = self.up(self.down(input), turned=True)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        return self.up.dense(dtype).T @ self.down.dense(dtype)

    def fault(self) -> str:
        found = ((name, runs.fault()) for name, runs in (("down", self.down), ("up", self.up)))
        return next((f"{name}.{fault}" for name, fault in found if fault), "")

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "inputs": len(self.down.weight),
            "outputs": len(self.up.weight),
            "bias": self.bias is not None,
        }

    def cost(self) -> Cost:
        size = self.rank, len(self.down.weight), len(self.up.weight)
        itemsize = self.up.weight.dtype.itemsize
        return block_lowrank_cost(self.out_features, self.in_features, *size, itemsize=itemsize)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, numbers={self.cost().params}"


def block_lowrank_cost(
    out_features: int, in_features: int, rank: int, inputs: int, outputs: int, *, itemsize: int
) -> Cost:
    """inputs + outputs numbers and as many MACs, and two integers a run.

    Args:
        itemsize: bytes of one number.
    """
    params = inputs + outputs
    return Cost(params, params * itemsize + 4 * rank * PLACE.itemsize, params)


def _inside(starts: Tensor, widths: Tensor, size: Tensor | int) -> Tensor:
    return (starts >= 0) & (starts < size) & (widths > 0) & (widths <= size)
