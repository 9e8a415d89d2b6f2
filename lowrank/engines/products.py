"""What an engine computes for a fused layer: a stacked product, and what each part makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Fused(nn.Module):
    """x (..., in) -> the outputs of all parts, side by side; without their biases."""

    def __init__(self, rows: Sequence[Tensor | None], pieces: nn.ModuleList) -> None:
        """
        Args:
            rows: of each part, its own of the stacked product (k, in); None if it has none.
        """
        super().__init__()
        own = [part for part in rows if part is not None]
        self.sizes = [0 if part is None else len(part) for part in rows]
        self.first = Matrix(torch.cat(own)) if own else None
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        stacked = () if self.first is None else self.first(x).split(self.sizes, -1)
        outputs = [piece(x, stacked) for piece in self.pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


class Product(nn.Module):
    """A part of the stacked product, times `up` (out, rank) unless it is dense."""

    def __init__(self, at: int, up: Tensor | None = None) -> None:
        super().__init__()
        self.at, self.up = at, None if up is None else Matrix(up)

    def forward(self, x: Tensor, stacked: Sequence[Tensor]) -> Tensor:
        return stacked[self.at] if self.up is None else self.up(stacked[self.at])


class PivotedOutputs(nn.Module):
    """The pivot outputs, and the others mixed from them; see nn/pivoted_linear.py."""

    def __init__(self, at: int, mix: Tensor, order: Tensor) -> None:
        super().__init__()
        self.at, self.mix, self.order = at, Matrix(mix), nn.Buffer(order)

    def forward(self, x: Tensor, stacked: Sequence[Tensor]) -> Tensor:
        kept = stacked[self.at]
        return torch.cat((kept, self.mix(kept)), -1).index_select(-1, self.order)


class PivotedInputs(nn.Module):
    """The other inputs mixed into the pivot inputs, then `up`; see nn/pivoted_linear.py."""

    def __init__(self, mix: Tensor, order: Tensor, up: Tensor) -> None:
        super().__init__()
        self.mix, self.up = Matrix(mix), Matrix(up)
        self.kept, self.mixed = nn.Buffer(order[: len(mix)]), nn.Buffer(order[len(mix) :])

    def forward(self, x: Tensor, stacked: Sequence[Tensor]) -> Tensor:
        mixed = self.mix(x.index_select(-1, self.mixed))
        return self.up(x.index_select(-1, self.kept) + mixed)


class Matrix(nn.Module):
    """x (..., in) -> (..., out), by the engine's own product if it gives one: its kernels may want
    the weight in an order of theirs.

    Attributes:
        weight: (out, in); the engine's to change once it gives its product.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self._dense: Any = None

    def give(self, dense: Any) -> None:
        """Compute by `dense.apply(self, x, None)`, the engine's method of dense layers."""
        dense.process_weights_after_loading(self)
        self._dense = dense

    def forward(self, x: Tensor) -> Tensor:
        if self._dense is None:
            return linear(x, self.weight)
        product: Tensor = self._dense.apply(self, x.contiguous(), None)
        return product
