"""What forms with factors `down` and `up` say of themselves, as `nn.Linear` does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .lazy import LazyProduct


class DownUp(nn.Module):
    """A layer with two real `nn.Linear` children, and something beside or between them."""

    down: nn.Linear
    up: nn.Linear

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), multiplied when it is used: for code that reads `.weight`."""
        shape = (self.out_features, self.in_features)
        return LazyProduct.of(shape, self.up.weight, self.dense_weight)

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in), multiplied in `dtype` (None: that of the factors)."""
        raise NotImplementedError
