"""What the factored forms of a convolution share: they say of themselves what nn.Conv says."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .form import Form
from .geometry import Conv, Geometry
from .lazy import LazyProduct


class FactoredConv(Form):
    """Real convolutions one after the other in place of one; the bias is the last one's.

    Attributes:
        geometry: of the whole.
        OUT: the name of the child that gives the outputs.
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
        """The dense weight (O, I/g, *kernel), multiplied when it is used."""
        shape = self.geometry.weight_shape
        return LazyProduct.of(shape, self._out().weight, lambda: self.dense_weight().view(shape))

    def _out(self) -> Conv:
        conv: Conv = getattr(self, self.OUT)
        return conv
