"""A matrix of integers of few bits: codes packed into bytes, with a scale for each group of a row.

A code of b bits is stored in parts of 8, 4, 2 and 1 bits, the binary digits of b: six bits are four
and two. Each part is packed by itself, row by row, so that b bits take b bits for every b in 1…8.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LowrankError
from ..linalg.quantise import decoded, spread_scales

MOST_BITS = 8
PARTS = (8, 4, 2, 1)


class Codes(nn.Module):
    """A matrix (rows, columns), scale · (code − zero); see `linalg.zero_of`.

    Tensors: `codes` (rows, bytes of a row) uint8, `scale` (rows, ⌈columns / group⌉).

    Attributes:
        turned: it multiplies as its transpose.
    """

    codes: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group: int,
        *,
        turned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= MOST_BITS or not 1 <= group <= columns:
            raise LowrankError(
                f"expected bits in [1, {MOST_BITS}] and a group in [1, {columns}] for a matrix of "
                f"shape ({rows}, {columns}), got {bits} bits in groups of {group}"
            )
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        self.turned = turned
        shape = rows, row_bytes(columns, bits)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8, device=device))
        scale = torch.zeros(rows, -(-columns // group), device=device, dtype=dtype)
        self.scale = nn.Parameter(scale)

    def hold(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes (rows, columns), integers below 2^bits, and scales (rows, groups), copied."""
        self.codes = packed(codes, self.bits)
        copy = scale.detach().clone(memory_format=torch.contiguous_format)
        self.scale = nn.Parameter(copy)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows); turned: (..., rows) -> (..., columns)."""
        weight = self.dense(x.dtype)
        return F.linear(x, weight.T if self.turned else weight)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (rows, columns), computed in `dtype` (None: that of the scales)."""
        scale = self.scale.to(dtype or self.scale.dtype)
        codes = unpacked(self.codes, self.bits, self.columns).to(scale.dtype)
        return decoded(codes, spread_scales(scale, self.group, self.columns), self.bits)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}, group={self.group}"


def codes_cost(rows: int, columns: int, bits: int, group: int, itemsize: int) -> tuple[int, int]:
    """Floating-point numbers, the scales, and bytes in all.

    Args:
        itemsize: bytes of one scale.
    """
    scales = rows * -(-columns // group)
    return scales, scales * itemsize + rows * row_bytes(columns, bits)


def row_bytes(columns: int, bits: int) -> int:
    return sum(width for _, width in _places(columns, bits))


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns) in bytes, (rows, `row_bytes`) uint8."""
    parts, rest = [], codes.to(torch.int32)
    for part, width in _places(codes.shape[1], bits):
        low = F.pad(rest % 2**part, (0, width * (8 // part) - codes.shape[1]))
        powers = 2 ** (part * torch.arange(8 // part, dtype=torch.int32, device=codes.device))
        parts.append((low.unflatten(1, (width, -1)) * powers).sum(-1))
        rest = rest // 2**part
    return torch.cat(parts, 1).to(torch.uint8)


def unpacked(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The codes (rows, columns), int32."""
    whole, start, worth = None, 0, 1
    for part, width in _places(columns, bits):
        held = stored[:, start : start + width].to(torch.int32)
        # Division and no shift, which ONNX does not have for these.
        low = [held // 2**place % 2**part for place in range(0, 8, part)]
        found = torch.stack(low, -1).flatten(1)[:, :columns] * worth
        whole = found if whole is None else whole + found
        start, worth = start + width, worth * 2**part
    assert whole is not None
    return whole


def _places(columns: int, bits: int) -> Iterator[tuple[int, int]]:
    """The parts of a code, each with the bytes that a row of it takes."""
    return ((part, -(-columns * part // 8)) for part in PARTS if bits & part)
