"""A linear layer W = q(W) + s·UV that trains one factor over a weight of one byte per number.

q(W) is symmetric int8 with one scale per row. Of U (out, r) and V (r, in) the one on the smaller
side of W is a fixed orthonormal basis, the other one is trained. Neither pass keeps the dense
weight: it is multiplied out where it is used, once forward and once backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ...linalg.gram import full_precision


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (out, in) int8 in [−127, 127] and scales (out, 1) of the rows, 0 of a zero row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    steps = (weight / torch.where(scale > 0, scale, 1)).round()
    return steps.clamp(-127, 127).to(torch.int8), scale


def from_int8(numbers: Tensor, scale: Tensor) -> Tensor:
    """The weight (out, in), in the dtype of the scales."""
    return numbers.to(scale.dtype) * scale


def product(basis: Tensor, factor: Tensor, left: bool) -> Tensor:
    """UV (out, in): basis (side, r) times factor (r, other side), or that transposed."""
    narrow = basis @ factor
    return narrow if left else narrow.T


def fit_in_turns(
    weight: Tensor, basis: Tensor, left: bool, strength: float, rounds: int
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """Fit q(W) and the trained factor in turns, so that their sum is near W.

    q ← to_int8(W − s·PB), B ← Pᵀ(W − q)/s; the best of all rounds is kept.

    Args:
        weight: W (out, in).
        basis: P, orthonormal columns, (out, r) if `left`, else (in, r).

    Returns:
        (numbers, scale, B (r, other side)), and ‖W − q − s·PB‖ / ‖W‖.
    """
    factor = basis.new_zeros(basis.shape[1], weight.shape[1 if left else 0])
    best: tuple[tuple[Tensor, Tensor, Tensor], float] | None = None
    size = float(weight.double().norm())
    for _ in range(rounds):
        numbers, scale = to_int8(weight - strength * product(basis, factor, left))
        error = weight - from_int8(numbers, scale)
        factor = basis.T @ (error if left else error.T) / strength
        rest = float((error - strength * product(basis, factor, left)).double().norm())
        left_over = rest / size if size > 0 else 0.0
        if best is None or left_over < best[1]:
            best = (numbers, scale, factor), left_over
    assert best is not None  # there is one round at least
    return best


class _QuantisedLinear(torch.autograd.Function):
    """x q(W)ᵀ; while its layer collects, the gradient of W is summed up there.

    `trained` is not used: with a parameter among the inputs, autograd calls `backward` even where
    x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor, trained: Tensor | None, layer: Any
    ) -> Tensor:
        ctx.layer = layer if layer.collecting else None
        ctx.save_for_backward(numbers, scale, x if layer.collecting else None)
        ctx.dtype = x.dtype
        return linear(x, from_int8(numbers, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        numbers, scale, x = ctx.saved_tensors
        wide = gradient.to(scale.dtype)
        if ctx.layer is not None:
            full = wide.flatten(0, -2).T @ x.to(scale.dtype).flatten(0, -2)  # (out, in)
            before = ctx.layer.gathered
            ctx.layer.gathered = full if before is None else before + full
        needed = ctx.needs_input_grad[0]
        back = (wide @ from_int8(numbers, scale)).to(ctx.dtype) if needed else None
        return back, None, None, None, None


class QuantisedLowRank(nn.Module):
    """y = x q(W)ᵀ + s · (x Vᵀ) Uᵀ + b.

    Tensors: `numbers` int8 (out, in), `scale` (out, 1), `basis` (side, r), `factor` (r, other side)
    the one parameter beside `bias`. With out ≤ in the basis is U and the factor is V, else the
    basis is Vᵀ and the factor is Uᵀ.
    """

    numbers: Tensor
    scale: Tensor
    basis: Tensor

    def __init__(self, weight: Tensor, rank: int, strength: float, bias: Tensor | None) -> None:
        """Zeros of the shapes that W (out, in) gives; `put` fills in the numbers."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.strength = strength
        side, other = sorted(weight.shape)
        self.register_buffer("numbers", weight.new_zeros(weight.shape, dtype=torch.int8))
        self.register_buffer("scale", weight.new_zeros(self.out_features, 1))
        self.register_buffer("basis", weight.new_zeros(side, rank))
        self.factor = nn.Parameter(weight.new_zeros(rank, other))
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.collecting = False
        self.gathered: Tensor | None = None  # dL/dW (out, in) of the batches since `collect`

    @property
    def left(self) -> bool:
        """Whether the basis is on the output's side."""
        return self.out_features <= self.in_features

    @property
    def rank(self) -> int:
        return self.factor.shape[0]

    def put(self, weight: Tensor, basis: Tensor, rounds: int) -> float:
        """Hold W (out, in) with this basis (side, rank); returns the relative error."""
        with full_precision(weight):
            parts, error = fit_in_turns(weight, basis, self.left, self.strength, rounds)
        held = (self.numbers, self.scale, self.factor.data, self.basis)
        for old, new in zip(held, (*parts, basis), strict=True):
            old.copy_(new)
        return error

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """q(W) + s·UV (out, in)."""
        dtype = dtype or self.scale.dtype
        base = from_int8(self.numbers, self.scale.to(dtype))
        return base + self.strength * product(
            self.basis.to(dtype), self.factor.to(dtype), self.left
        )

    def collect(self, on: bool) -> None:
        """Sum up dL/dW in the next backward passes, or stop and forget the sum."""
        self.collecting, self.gathered = on, None

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        trained = self.factor if self.collecting else None
        base = _QuantisedLinear.apply(input, self.numbers, self.scale, trained, self)
        down, up = (self.factor, self.basis) if self.left else (self.basis.T, self.factor.T)
        y = base + self.strength * linear(linear(input, down), up)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
