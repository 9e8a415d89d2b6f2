"""Grouped convolutions from one convolution a group, transposed ones from linear layers.

A transposed convolution multiplies the channels (I,) at each position of its input by a matrix
(O · K, I) and adds what overlaps: that matrix is a linear layer. Where it is factored in two, the
second factor is a transposed convolution of fewer channels, and runs as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .children import is_bare, is_plain
from .geometry import CONVS
from .lowrank_linear import LowRankLinear
from .unfused import Cut, Unfused

SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
LEAST = 4  # channels of a group that has to have more
RANKS = 2  # at which it has to be smaller


class _SplitConv(Unfused):
    """What both kinds have in common: a layer for each group, named by its number."""

    @classmethod
    def closed(cls, module: Any, weight: Tensor) -> Tensor:
        return weight.view(len(weight), -1, *module.kernel_size)

    def spec(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in (*SIZES, "padding_mode")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @staticmethod
    def groups_of(module: Any) -> tuple[str, ...]:
        return tuple(map(str, range(module.groups)))


class SplitGrouped(_SplitConv):
    """A grouped convolution from one convolution for each group."""

    kernel_size: Any
    groups: Any

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if module.groups == 1:
            return "it has one group"
        outputs, *inputs = module.weight.shape
        each, taps = outputs // module.groups, torch.Size(inputs).numel()
        if inputs[0] <= LEAST or RANKS * (each + taps) >= each * taps:
            return (
                f"its {module.groups} groups of {inputs[0]} channels are matrices of {each} by "
                f"{taps}, too small to be factored"
            )
        return ""

    @classmethod
    def cuts(cls, module: Any) -> Mapping[str, Cut]:
        keys = cls.groups_of(module)
        return {"weight": Cut("weight", keys), "bias": Cut("bias", keys)}

    @classmethod
    def empty(cls, module: Any, weight: Tensor, bias: bool) -> nn.Module:
        conv_type: Any = CONVS[len(module.kernel_size)]
        conv: nn.Module = conv_type(
            weight.shape[1], weight.shape[0], module.kernel_size, stride=module.stride,
            padding=module.padding, dilation=module.dilation, padding_mode=module.padding_mode,
            bias=bias, device="meta",
        )  # fmt: skip
        return conv

    def forward(self, input: Tensor) -> Tensor:
        """input (B, I, *space) or (I, *space) -> (B, O, *space')."""
        axis = -1 - len(self.kernel_size)
        parts = input.chunk(self.groups, dim=axis)
        layers = self.layers().values()
        return torch.cat([layer(part) for layer, part in zip(layers, parts, strict=True)], axis)


class SplitTransposed(_SplitConv):
    """A transposed convolution from a linear layer (O/g · K, I/g) for each group."""

    kernel_size: Any  # as the other attributes, those of the class of torch
    stride: Any
    dilation: Any
    groups: Any
    padding: Any
    bias: Any

    @classmethod
    def obstacle(cls, module: Any) -> str:
        inputs, *outputs = module.weight.shape
        each, taps = inputs // module.groups, torch.Size(outputs).numel()
        if RANKS * (each + taps) >= each * taps:
            return f"its matrix of {taps} by {each} is too small to be factored"
        return ""

    @classmethod
    def cuts(cls, module: Any) -> Mapping[str, Cut]:
        return {"weight": Cut("weight", cls.groups_of(module))}

    @classmethod
    def opened(cls, module: Any, rows: Tensor) -> Tensor:
        return rows.flatten(1).T  # (I/g, O/g, *kernel) -> (O/g · K, I/g)

    @classmethod
    def closed(cls, module: Any, weight: Tensor) -> Tensor:
        return weight.T.unflatten(1, (-1, *module.kernel_size))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """input (B, I, *space) or (I, *space) -> (B, O, *space')."""
        dims = len(self.kernel_size)
        batched = input if input.dim() == dims + 2 else input[None]
        more = self._output_padding(
            batched, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        parts = batched.chunk(self.groups, dim=1)
        layers = self.layers().values()
        found = [self._spread(*each, more) for each in zip(layers, parts, strict=True)]
        output = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        if self.bias is not None:
            output = output + self.bias.view(-1, *[1] * dims)
        return output if batched is input else output[0]

    def _spread(self, layer: nn.Module, x: Tensor, more: list[int]) -> Tensor:
        """What the channels of one group (B, I/g, *space) add up to (B, O/g, *space')."""
        if isinstance(layer, LowRankLinear) and is_bare(layer) and is_plain(layer.up):
            down = layer.down(x.movedim(1, -1)).movedim(-1, 1)
            return self._transposed(down, layer.up.weight, more)
        return self._folded(layer(x.movedim(1, -1)), more)

    def _transposed(self, x: Tensor, weight: Tensor, more: list[int]) -> Tensor:
        """A transposed convolution of all channels by a matrix (O/g · K, channels)."""
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        run: Any = convolve[len(self.kernel_size) - 1]
        taps = self.closed(self, weight)
        output: Tensor = run(
            x, taps, None, self.stride, self.padding, tuple(more), 1, self.dilation
        )
        return output

    def _folded(self, products: Tensor, more: list[int]) -> Tensor:
        """The products at each position (B, *space, O/g · K), added where they overlap."""
        batch, *space, _ = products.shape
        taps = products.movedim(-1, 1).unflatten(1, (-1, *self.kernel_size))  # (B, O/g, *k, *space)
        geometry = list(zip(space, self.kernel_size, self.stride, self.dilation, strict=True))
        sides = [
            (n - 1) * stride + (k - 1) * spread + 1 + extra
            for (n, k, stride, spread), extra in zip(geometry, more, strict=True)
        ]
        output = products.new_zeros(batch, taps.shape[1], *sides)
        for tap in itertools.product(*map(range, self.kernel_size)):
            reached: list[Any] = [
                slice(at * spread, at * spread + (n - 1) * stride + 1, stride)
                for at, (n, _, stride, spread) in zip(tap, geometry, strict=True)
            ]
            output[(..., *reached)] += taps[(slice(None), slice(None), *tap)]
        kept: list[Any] = [slice(p, side - p) for p, side in zip(self.padding, sides, strict=True)]
        return output[(..., *kept)]


class SplitConv1d(SplitGrouped, nn.Conv1d):
    WHOLE = nn.Conv1d


class SplitConv2d(SplitGrouped, nn.Conv2d):
    WHOLE = nn.Conv2d


class SplitConv3d(SplitGrouped, nn.Conv3d):
    WHOLE = nn.Conv3d


class SplitConvTranspose1d(SplitTransposed, nn.ConvTranspose1d):
    WHOLE = nn.ConvTranspose1d


class SplitConvTranspose2d(SplitTransposed, nn.ConvTranspose2d):
    WHOLE = nn.ConvTranspose2d


class SplitConvTranspose3d(SplitTransposed, nn.ConvTranspose3d):
    WHOLE = nn.ConvTranspose3d
