"""A cache for the last product of a shared `down`, kept until all its readers have used it."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class _Kept(NamedTuple):
    input: weakref.ref[Tensor]
    key: tuple[object, ...]
    product: Tensor


class LastProduct:
    """down(x) of one input x, matched by identity and version, never across an in-place change.

    The input is held weakly, and the product is dropped with it, after the last reader, or at the
    next input, whichever comes first. Nothing is kept while a graph is recorded (gradients,
    compilation, export, tracing), nor for inference tensors, which have no version counter. Copies
    and pickles are empty.

    Attributes:
        readers: number of modules that share the factor, without its owner.
    """

    def __init__(self, readers: int = 0) -> None:
        self.readers = readers
        self._left = 0
        self._kept: _Kept | None = None

    def keep(self, x: Tensor, weight: Tensor, product: Tensor) -> None:
        """Keep `product` = x · weightᵀ (..., rank) in place of any other."""
        self.clear()
        if self.readers and not product.requires_grad and _is_plain(x, weight):
            self_ref = weakref.ref(self)

            def forget(_input: object) -> None:
                cache = self_ref()
                if cache is not None:
                    cache.clear()

            self._left = self.readers
            self._kept = _Kept(weakref.ref(x, forget), _key(x, weight), product)

    def take(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """The product of this very input in its present version; None if it is not kept."""
        kept = self._kept
        if kept is None or kept.input() is not x:
            return None
        if not _is_plain(x, weight) or kept.key != _key(x, weight):
            return None
        self._left -= 1
        if self._left <= 0:
            self.clear()
        return kept.product

    def clear(self) -> None:
        self._kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.readers)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.readers,)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether both are ordinary tensors: subclasses are for tracing and sharding."""
    inference = x.is_inference() or weight.is_inference()
    return type(x) is Tensor and not inference and not torch.jit.is_tracing()


def _key(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    """What the product depends on: versions of the tensors, and modes such as autocast."""
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    graph = torch.is_grad_enabled(), x.requires_grad, weight.requires_grad
    return x._version, id(weight), weight._version, weight.dtype, weight.device, cast, graph
