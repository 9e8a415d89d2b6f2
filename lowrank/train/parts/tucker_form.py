"""A convolution as 1×1, k×k, 1×1: the Tucker-2 form in which its ranks are trained, and which
convolutions have one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...types import Cost, Site
from ...walk.surgery import modules_of

CONVS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class TuckerForm(nn.Module):
    """Three real convolutions, y = last(core(first(x))).

    Tensors: `first.weight` U₁ᵀ (b, in, 1, …), `core.weight` S (a, b, k, …), `last.weight` U₀
    (out, a, 1, …), `last.bias` (out,). Stride, padding and dilation are those of the core.
    """

    first: _Conv
    core: _Conv
    last: _Conv

    def __init__(self, first: nn.Module, core: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.core, self.last = first, core, last  # type: ignore[assignment]

    @classmethod
    def of(cls, dense: _Conv, u0: Tensor, core: Tensor, u1: Tensor) -> Self:
        """In place of `dense` (groups 1, padded by zeros): U₀ (out, a), S (a, b, k, …), U₁ (in, b).

        A bias stays the Parameter that it is; the factors are copied.
        """
        conv: Any = CONVS[dense.weight.ndim]
        (a, b), inputs, outputs = core.shape[:2], dense.in_channels, dense.out_channels
        middle = conv(
            b, a, dense.kernel_size, stride=dense.stride, padding=dense.padding,
            dilation=dense.dilation, bias=False, device="meta",
        )  # fmt: skip
        last = conv(a, outputs, 1, bias=dense.bias is not None, device="meta")
        form = cls(conv(inputs, b, 1, bias=False, device="meta"), middle, last)
        form.set_factors(u0, core, u1)
        if dense.bias is not None:
            form.last.bias = dense.bias
        return form

    def set_factors(self, u0: Tensor, core: Tensor, u1: Tensor) -> None:
        """New parameters, perhaps of new sizes; the tensors are copied."""
        ones = (1,) * (core.ndim - 2)
        for child, tensor in ((self.last, u0), (self.core, core), (self.first, u1.T)):
            shaped = tensor.detach().reshape(*tensor.shape[:2], *(tensor.shape[2:] or ones))
            copy = shaped.clone(memory_format=torch.contiguous_format)
            child.weight = nn.Parameter(copy)
            child.out_channels, child.in_channels = copy.shape[:2]

    @property
    def u0(self) -> Tensor:
        """(out, a), orthonormal columns."""
        return self.last.weight.flatten(1)

    @property
    def u1(self) -> Tensor:
        """(in, b), orthonormal columns."""
        return self.first.weight.flatten(1).T

    @property
    def rank(self) -> tuple[int, int]:
        """(a, b): of the outputs, of the inputs."""
        return (self.core.out_channels, self.core.in_channels)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """(out, in, k, …) of the dense weight."""
        window = self.core.weight.shape[2:]
        return (self.last.out_channels, self.first.in_channels, *window)

    @property
    def bias(self) -> Tensor | None:
        return self.last.bias

    def forward(self, input: Tensor) -> Tensor:
        """input (batch, in, …) -> (batch, out, …)."""
        out: Tensor = self.last(self.core(self.first(input)))
        return out

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in, k, …), multiplied in `dtype` (None: that of the factors)."""
        dtype = dtype or self.core.weight.dtype
        u0, core, u1 = (t.to(dtype) for t in (self.u0, self.core.weight, self.u1))
        return torch.einsum("oa,ab...,ib->oi...", u0, core, u1)

    def cost(self) -> Cost:
        """MACs are per output position; what a stride saves at the input is not counted."""
        numbers = sum(child.weight.numel() for child in (self.first, self.core, self.last))
        return Cost(numbers, numbers * self.core.weight.dtype.itemsize, numbers)

    def dense(self) -> nn.Module:
        """The plain convolution of the same map, with this very bias."""
        core, conv = self.core, CONVS[self.core.weight.ndim]
        plain: Any = conv(
            self.first.in_channels, self.last.out_channels, core.kernel_size, stride=core.stride,
            padding=core.padding, dilation=core.dilation, bias=False, device="meta",
        )  # fmt: skip
        plain.weight = nn.Parameter(self.dense_weight().detach().contiguous())
        plain.bias = self.bias
        return plain.train(self.training)


def conv_sites(model: nn.Module) -> list[Site]:
    """Every convolution of the model, with the reason where it has no Tucker form.

    Those inside factored modules are skipped, as by `walk.sites.find_sites`.
    """
    names: dict[int, list[str]] = {}
    convolutions: dict[int, Any] = {}
    for name, module in modules_of(model):
        if isinstance(module, tuple(CONVS.values())):
            convolutions[id(module)] = module
            names.setdefault(id(module), []).append(name)
    return [_site(names[key], module) for key, module in convolutions.items()]


def _site(names: Sequence[str], module: Any) -> Site:
    weight = module.weight
    size = weight.numel()
    cost = Cost(size, size * weight.dtype.itemsize, size)
    shape = (weight.shape[0], size // weight.shape[0])
    return Site(names[0], tuple(names), "conv", (module,), shape, cost, _obstacle(module))


def _obstacle(module: Any) -> str:
    if type(module) not in CONVS.values():
        return f"{type(module).__name__} is a subclass and may compute something else"
    if "weight" not in module._parameters:
        return "its weight is not a plain parameter"
    if module.groups != 1:
        return f"it has {module.groups} groups"
    if module.padding_mode != "zeros":
        return f"it pads by {module.padding_mode!r}, which a 1×1 before it would not see alike"
    if math.prod(module.kernel_size) == 1:
        return "its kernel is one pixel: a matrix"
    return ""
