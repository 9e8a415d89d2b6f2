"""The base of the factored forms of a convolution, with the attributes of nn.Conv."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .form import Form
from .geometry import Conv, Geometry
from .lazy import LazyProduct


class FactoredConv(Form):
    """A sequence of nn.Conv children in place of one convolution; the last one has the bias.

    Attributes:
        geometry: of the original convolution.
        OUT: name of the last child.
    """

    KIND = "conv"
    WORDS = frozenset({"padding_mode"})
    OUT: ClassVar[str]
    geometry: Geometry

    @property
    def bias(self) -> Tensor | None:
        return self._out().bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I/g, *kernel), computed when used."""
        shape = self.geometry.weight_shape
        return LazyProduct.of(shape, self._out().weight, lambda: self.dense_weight().view(shape))

    def _out(self) -> Conv:
        conv: Conv = getattr(self, self.OUT)
        return conv
