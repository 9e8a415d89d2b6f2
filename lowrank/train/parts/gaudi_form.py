"""A linear layer as rank-one blocks whose widths and places are trained (arXiv 2310.18882)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...linalg import BlockTerms, gaudi_mask, run_mask, shrunk, whole_widths
from ...nn import LinearForm
from ...types import Cost

BETA = 0.999  # of the mean of squared gradients
TINY = 1e-8


class GaudiLinear(LinearForm):
    """y = Σ_k (m_k ∘ u_k) (m'_k ∘ v_k)ᵀ x + b with Gaussian-Dirichlet masks m.

    Tensors: `up` u (out, K), `down` v (K, in), `widths` and `starts` (2, K) of rows and columns, as
    fractions; `squares` (2, 2, K), means of the squared gradients of these two; `sigma` (), inf for
    masks of zeros and ones. Without a smoothing, and always in evaluation, widths and starts are
    rounded to whole entries, with the gradients of the mask that is not rounded.
    """

    up: nn.Parameter
    down: nn.Parameter
    widths: nn.Parameter
    starts: nn.Parameter
    sizes: Tensor
    squares: Tensor
    sigma: Tensor
    bias: nn.Parameter | None

    def __init__(self, up: Tensor, down: Tensor, bias: nn.Parameter | None) -> None:
        """u (out, K) and v (K, in) are copied; a bias stays the object that it is."""
        super().__init__()
        self.register_buffer("sizes", up.new_tensor([[len(up)], [down.shape[1]]]), persistent=False)
        self.register_buffer("sigma", up.new_tensor(math.inf))
        empty = up.new_zeros(2, up.shape[1])
        self.set_terms(up, down, empty, empty, up.new_zeros(2, 2, up.shape[1]))
        self.register_parameter("bias", bias)
        self._gathered: Tensor | None = None

    @classmethod
    def of(cls, terms: BlockTerms, bias: nn.Parameter | None, sigma: float) -> Self:
        """The layer of these terms; what they hold off their runs is kept, and hidden."""
        form = cls(terms.up, terms.down, bias)
        with torch.no_grad():
            form.widths.copy_(terms.widths / form.sizes)
            form.starts.copy_(terms.starts / form.sizes)
            form.sigma.fill_(sigma)
        return form

    def set_terms(
        self, up: Tensor, down: Tensor, widths: Tensor, starts: Tensor, squares: Tensor
    ) -> None:
        """New parameters, perhaps of another number of terms; the tensors are copied."""
        for name, tensor in (("up", up), ("down", down), ("widths", widths), ("starts", starts)):
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            setattr(self, name, nn.Parameter(copy))
        self.register_buffer("squares", squares.clone(memory_format=torch.contiguous_format))

    @property
    def in_features(self) -> int:
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        return len(self.up)

    @property
    def terms(self) -> int:
        """K, those included whose blocks are empty now."""
        return self.up.shape[1]

    @property
    def whole(self) -> Tensor:
        """Widths (2, K) in entries; zero on both sides where a block is empty."""
        return whole_widths(self.widths.detach(), self.sizes)

    @property
    def rank(self) -> int:
        """Terms whose blocks are not empty."""
        return int((self.whole > 0).all(0).sum())

    @property
    def numbers(self) -> int:
        """Numbers within the blocks."""
        return int(self.whole.sum())

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        rows, columns = self._masks()
        return F.linear(F.linear(input, self.down * columns), self.up * rows.T, self.bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        rows, columns = self._masks()
        dtype = dtype or self.up.dtype
        return (self.up * rows.T).to(dtype) @ (self.down * columns).to(dtype)

    def whole_terms(self) -> BlockTerms:
        """The terms as they are in evaluation, without those whose blocks are empty.

        At least one is given; where all blocks are empty, it is zero.
        """
        alive = (self.whole > 0).all(0).nonzero()[:, 0]
        up, widths = self.up.detach(), self.whole.long()
        if len(alive) == 0:
            alive = alive.new_zeros(1)
            up, widths = torch.zeros_like(up), torch.ones_like(widths)
        starts = (self.starts.detach() * self.sizes).round().long().remainder(self.sizes.long())
        return BlockTerms(
            up[:, alive], self.down.detach()[alive], starts[:, alive], widths[:, alive]
        )

    def gather(self, scale: float) -> None:
        """Take the gradients of widths and starts, so that the optimizer passes over them."""
        gradients = self.widths.grad, self.starts.grad
        self.widths.grad = self.starts.grad = None
        if gradients[0] is None or gradients[1] is None:  # the layer was not used
            self._gathered = None
        else:
            self._gathered = torch.stack([gradients[0], gradients[1]]) / scale

    def forget(self) -> None:
        """Drop what was gathered."""
        self._gathered = None

    def descend(self, rate: float, step: int) -> None:
        """Adam with β₁ = 0 on widths and starts, as in the authors' code; `step` counts from 1."""
        gradient, self._gathered = self._gathered, None
        if gradient is None:
            return
        self.squares.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)
        size = (self.squares / (1 - BETA**step)).sqrt() + TINY
        widths, starts = rate * gradient / size
        self.widths.sub_(widths).clamp_(0, 1)
        self.starts.sub_(starts).remainder_(1)

    def shrink(self, threshold: float) -> None:
        """The proximal step of the widths."""
        self.widths.copy_(shrunk(self.widths, threshold))

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.terms,
            "bias": self.bias is not None,
        }

    def cost(self) -> Cost:
        numbers = self.numbers
        return Cost(numbers, numbers * self.up.dtype.itemsize, numbers)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, terms={self.terms}"

    def _masks(self) -> tuple[Tensor, Tensor]:
        """(K, out) and (K, in)."""
        widths, starts = (_rounded(t, self.sizes) for t in (self.widths, self.starts))
        sharp = self.sigma.isinf() | (not self.training)
        masks = []
        for side, size in enumerate((self.out_features, self.in_features)):
            soft = gaudi_mask(widths[side], starts[side], size, self.sigma)
            start, width = ((t[side].detach() * size).round() for t in (starts, widths))
            hard = run_mask(start, width, size).to(soft)
            masks.append(torch.where(sharp, hard + (soft - soft.detach()), soft))
        return masks[0], masks[1]


def _rounded(fractions: Tensor, sizes: Tensor) -> Tensor:
    """To whole entries; gradients pass straight through."""
    return fractions + ((fractions * sizes).round() / sizes - fractions).detach()
