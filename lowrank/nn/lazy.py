"""A product of factors that is multiplied only when someone computes with it.

Some models ask a layer for its weight's dtype in every forward pass (transformers' T5 does) and
never use its numbers. Multiplying the factors each time would cost more than the layer saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

# What is known without the product; everything else, `.T` and `.requires_grad` too, makes it.
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
        """What `product()` gives: a tensor of that shape, with the dtype and device of `like`."""
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        made.product = product
        return made

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
        raise TypeError(f"{func} reached a product of factors that was not multiplied")


def _multiplied(value: Any) -> Any:
    if isinstance(value, LazyProduct):
        return value.product()
    if isinstance(value, dict):
        return {key: _multiplied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_multiplied(item) for item in value)
    return value
