"""The bases of the factored forms of a convolution, with the attributes of nn.Conv."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .form import Form, floating
from .geometry import Conv, Geometry
from .lazy import LazyProduct


class FactoredConv(Form):
    """What stands in place of one convolution.

    Attributes:
        geometry: of the original convolution.
    """

    KIND = "conv"
    WORDS = frozenset({"padding_mode"})
    geometry: Geometry

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I/g, *kernel), computed when used."""
        shape = self.geometry.weight_shape
        return LazyProduct.of(shape, floating(self), lambda: self.dense_weight().view(shape))


class ConvSequence(FactoredConv):
    """A sequence of nn.Conv children; the last one has the bias.

    Attributes:
        OUT: name of the last child.
    """

    OUT: ClassVar[str]

    @property
    def bias(self) -> Tensor | None:
        conv: Conv = getattr(self, self.OUT)
        return conv.bias
