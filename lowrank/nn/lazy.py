"""A product of factors that is computed only when used.

Some models read the dtype of a layer's weight in every forward pass (transformers' T5 does) but
never its values. Multiplying the factors each time would cost more than the layer saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

# Known without the product; anything else, `.T` and `.requires_grad` too, computes it.
FREE = frozenset({"device", "dtype", "is_cuda", "is_quantized", "layout", "ndim", "shape"})


class LazyProduct(torch.Tensor):
    """up (out, rank) · down (rank, in) as a tensor (out, in).

    Its dtype, shape and device are free; any operation multiplies the factors first, and gradients
    reach them.
    """

    product: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, up: Tensor, down: Tensor) -> Self:
        return cls.of((up.shape[0], down.shape[1]), up, lambda: up @ down)

    @classmethod
    def of(cls, shape: tuple[int, ...], like: Tensor, product: Callable[[], Tensor]) -> Self:
        """`product()` as a lazy tensor of that shape, with the dtype and device of `like`."""
        lazy: Self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        lazy.product = product
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(getattr(func, "__self__", None), "__name__", "") in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        return func(*_multiplied(args), **_multiplied(dict(kwargs or {})))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise TypeError(f"{func} reached a lazy product that was not computed")


def _multiplied(value: Any) -> Any:
    if isinstance(value, LazyProduct):
        return value.product()
    if isinstance(value, dict):
        return {key: _multiplied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_multiplied(item) for item in value)
    return value
