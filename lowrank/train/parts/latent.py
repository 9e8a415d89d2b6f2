"""Layers W = C · D whose few coefficients per row are chosen again and again during training.

Both train a dense latent in place of C. The forward pass uses s of its entries per row; in the
backward pass all of them get a gradient, as if none had been left out (straight-through).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...linalg.gram import full_precision
from ...linalg.sparse import ROUNDS, pursuit, spread
from ...linalg.svd import compute_dtype
from ...nn import Form


class Latent(Form):
    """What both share: `basis.weight` D (r, in), `latent`, `bias` (out,), and s = `count`."""

    latent: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, basis: nn.Parameter, count: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        rank, self.in_features = basis.shape
        self.count = count
        self.basis = nn.Linear(self.in_features, rank, bias=False, device="meta")
        self.basis.weight = basis
        self.register_parameter("bias", bias)

    @property
    def rank(self) -> int:
        return self.basis.out_features

    @property
    def out_features(self) -> int:
        return len(self.latent)

    def choose(self) -> int:
        """Choose the s best atoms of every row again; returns how many of all are new."""
        raise NotImplementedError

    def code(self) -> tuple[Tensor, Tensor]:
        """Coefficients (out, s) and their atoms (out, s) int64, ascending."""
        raise NotImplementedError

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """C D (out, in)."""
        dtype = dtype or self.latent.dtype
        value, index = self.code()
        return spread(value.to(dtype), index, self.rank) @ self.basis.weight.to(dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, count={self.count}"


class LatentCoefficients(Latent):
    """C is `latent` Z (out, r) where `mask` (out, r) says so: the s of largest |z_ij| ‖d_j‖ a row.

    dL/dZ = dL/dŴ Dᵀ in all entries, dL/dD = Cᵀ dL/dŴ.
    """

    mask: Tensor

    def __init__(
        self, basis: nn.Parameter, latent: Tensor, count: int, bias: nn.Parameter | None
    ) -> None:
        super().__init__(basis, count, bias)
        self.latent = nn.Parameter(latent)
        self.register_buffer("mask", torch.zeros_like(latent, dtype=torch.bool))
        self.choose()

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        fixed = self.latent.detach()
        coefficients = fixed * self.mask + (self.latent - fixed)  # the second part is zero
        return linear(self.basis(input), coefficients, self.bias)

    @torch.no_grad()
    def choose(self) -> int:
        score = self.latent.abs() * self.basis.weight.norm(dim=1)
        index = score.topk(self.count, dim=1).indices
        mask = torch.zeros_like(self.mask).scatter_(1, index, True)
        new = int((mask & ~self.mask).sum())
        self.mask.copy_(mask)
        return new

    def code(self) -> tuple[Tensor, Tensor]:
        index = self.mask.nonzero()[:, 1].view(self.out_features, self.count)
        return self.latent.gather(1, index), index


class LatentWeight(Latent):
    """C is the sparse code of `latent` W (out, in) on D, taken at the last choice.

    Buffers: `value` (out, s), `index` (out, s). dL/dW = dL/dŴ, dL/dD = Cᵀ dL/dŴ.
    """

    value: Tensor
    index: Tensor

    def __init__(
        self,
        basis: nn.Parameter,
        latent: nn.Parameter,
        code: tuple[Tensor, Tensor],
        bias: nn.Parameter | None,
    ) -> None:
        value, index = code
        super().__init__(basis, value.shape[1], bias)
        self.latent = latent
        self.register_buffer("value", value.detach().clone())
        self.register_buffer("index", index.to(torch.int32, copy=True))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        coefficients = spread(self.value, self.index.long(), self.rank)
        through = self.latent - self.latent.detach()  # zero
        return linear(input, coefficients @ self.basis.weight + through, self.bias)

    @torch.no_grad()
    def choose(self) -> int:
        dtype = compute_dtype(min(self.latent.shape))
        weight, basis = self.latent.to(dtype), self.basis.weight.to(dtype)
        with full_precision(weight):
            products, gram = weight @ basis.T, basis @ basis.T
            value, index = pursuit(products, gram, self.count, rounds=ROUNDS)
        before = _support(self.index, self.rank)
        new = int((_support(index, self.rank) & ~before).sum())
        self.value.copy_(value)
        self.index.copy_(index)
        return new

    def code(self) -> tuple[Tensor, Tensor]:
        return self.value, self.index.long()


def _support(index: Tensor, rank: int) -> Tensor:
    mask = torch.zeros(len(index), rank, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, index.long(), True)
