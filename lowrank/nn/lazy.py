"""A product of factors that is computed only when used, and that nobody can write to.

Some models read the dtype of a layer's weight in every forward pass (transformers' T5 does) but
never its values. Multiplying the factors each time would cost more than the layer saves. And since
each access computes the product anew, a write to it would be lost: it is an error instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LowrankError

# Known without the product; anything else, `.T` and `.requires_grad` too, computes it.
FREE = frozenset({"device", "dtype", "is_cuda", "is_quantized", "layout", "ndim", "shape"})
# Methods that change a tensor, but whose name has no underscore at its end.
CHANGES = frozenset(
    {"__setitem__", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
)
IN_PLACE = frozenset(
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
)
WRITTEN = ("input", "self", "tensor")  # names of the tensor that a function writes to
REASON = (
    "this weight is the product of a layer's factors, computed on each access: {} would be lost. "
    "Change the factors instead, which are the layer's parameters, or merge it first "
    "(lowrank.to_dense); .clone() gives a tensor of your own"
)


class LazyProduct(torch.Tensor):
    """up (out, rank) · down (rank, in) as a tensor (out, in).

    Its dtype, shape and device are free; any operation multiplies the factors first, and gradients
    reach them. A view of the product is lazy too, since a write to it would be lost as well.
    """

    product: Callable[[], Tensor]
    source: Tensor
    # transformers draws weights anew after loading, save those with this mark. Of a factored layer
    # its factors are drawn, if need be.
    _is_hf_initialized = True

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor, product: Callable[[], Tensor]) -> Tensor:
        """`product()` as a lazy tensor of that shape, with the dtype and device of `like`, whose
        address it has: weights of one address are tied, which peft asks.

        Under torch.compile, which drops what is not used and cannot trace a lazy tensor, it is the
        product itself.
        """
        if torch.compiler.is_dynamo_compiling():
            return product()
        lazy: LazyProduct = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=like.device
        )
        lazy.product, lazy.source = product, like
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(getattr(func, "__self__", None), "__name__", "") in FREE and not _sets(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func is Tensor.data_ptr:
            return args[0].source.data_ptr()
        if any(map(_is_lazy, _written(func, args, named))):
            raise LowrankError(REASON.format(_called(func)))
        found: dict[int, Tensor] = {}
        result = func(*_multiplied(args, found), **_multiplied(named, found))
        return _guarded(result, found.values())

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        if func._schema.is_mutable:
            raise LowrankError(REASON.format(func))
        raise TypeError(f"{func} reached a lazy product that was not computed")


def _written(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[object]:
    """The arguments that the function writes to."""
    name = getattr(func, "__name__", "")
    changes = name in CHANGES or name in IN_PLACE or _sets(func)
    ends = name.endswith("_") and not name.endswith("__")
    written = [kwargs.get("out")]
    if changes or ends or kwargs.get("inplace"):
        written += [*args[:1], *(kwargs.get(key) for key in WRITTEN)]
    return written


def _sets(func: Callable[..., Any]) -> bool:
    """Whether it assigns to an attribute of a tensor, such as `.data`."""
    return getattr(func, "__name__", "") in ("__set__", "__delete__")


def _called(func: Callable[..., Any]) -> str:
    """What the user called, in words."""
    if _sets(func):
        return f"an assignment to .{getattr(getattr(func, '__self__', None), '__name__', '?')}"
    return f"{getattr(func, '__name__', func)}"


def _is_lazy(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_lazy, value))
    return isinstance(value, LazyProduct)


def _multiplied(value: Any, found: dict[int, Tensor]) -> Any:
    """The value with products in place of lazy ones, each computed once; they go into `found`."""
    if isinstance(value, LazyProduct):
        if id(value) not in found:
            found[id(value)] = value.product()
        return found[id(value)]
    if isinstance(value, dict):
        return {key: _multiplied(item, found) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_multiplied(item, found) for item in value)
    return value


def _guarded(result: Any, products: Any) -> Any:
    """The result, lazy itself where it is a view of a product."""
    if type(result) in (list, tuple):
        return type(result)(_guarded(item, products) for item in result)
    if type(result) is not Tensor or not any(_shares(result, product) for product in products):
        return result
    return LazyProduct.of(result.shape, result, lambda: result)


def _shares(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one memory."""
    if one.layout != torch.strided or other.layout != torch.strided:
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
