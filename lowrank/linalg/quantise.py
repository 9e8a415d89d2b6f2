"""Weights as integers of few bits, scale · (code − zero), rounded so that the loss changes least.

The error ‖S(W − Q)H^½‖² of rounding is that of its Cholesky factors: with AᵀA ∝ SᵀS and BᵀB ∝ H, A
and B upper triangular with unit diagonals, it is Σ a_i² b_j² (A (W − Q) Bᵀ)²_ij. So numbers are
rounded from the last row and column to the first, each to its weight plus what A and B carry over
from the errors of those before it: the nearest-plane rule. With S = I that is what GPTQ (arXiv
2210.17323) does; errors carried on both sides are YAQA's idea (arXiv 2505.22988). Nothing is
inverted here, and the Gram matrices are those that low rank has anyway.

Codes are unsigned. Of three bits and more the zero is a code, and the scale is negative where the
largest number of a group is positive, so that the largest one uses the longer side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gram import full_precision, raised, unit_of

DAMP = 1e-2  # of the mean diagonal of H, as GPTQ has it
SHRUNK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # scales that are tried, up to so many bits:
SEARCHED = 4
TILE = 32


class Carrier(NamedTuple):
    """How errors are carried on, for the weight (out, in) of one layer.

    Attributes:
        right: B (in, in) unit upper triangular, of the inputs in the order `inputs`.
        inputs: (in,), the one of least energy first: it is rounded last.
        input_size: b² (in,), in the layer's own order.
        left, outputs, output_size: the same of the outputs; None for the identity.
    """

    right: Tensor
    inputs: Tensor
    input_size: Tensor
    left: Tensor | None = None
    outputs: Tensor | None = None
    output_size: Tensor | None = None


def carrier(gram: Tensor, root: Tensor | None = None, damp: float = DAMP) -> Carrier:
    """The carrier of a metric.

    Args:
        gram: H (in, in); zero stands for the identity.
        root: S (out, out), upper triangular, from `output_root`; None stands for the identity.
        damp: of the mean diagonal of H.
    """
    with full_precision(gram):
        right, inputs, size = _unit_root(gram.double(), damp)
        if root is None:
            return Carrier(right, inputs, size)
        return Carrier(right, inputs, size, *_unit_root(root.T @ root, 0.0))


def _unit_root(metric: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor]:
    """The unit upper triangular root of a metric (k, k), its order, and the squares (k,) of what
    the rows were divided by."""
    unit = unit_of(metric.diagonal().mean())
    size = float(metric.diagonal().mean())
    metric = raised(metric, damp * size if size > 0 else unit)
    order = metric.diagonal().argsort(stable=True)
    root = torch.linalg.cholesky(metric[order][:, order]).mT
    side = root.diagonal()
    return root / side[:, None], order, torch.empty_like(side).index_copy_(0, order, side.square())


def zero_of(bits: int) -> float:
    """The code, or the middle of two, that stands for zero."""
    return (2**bits - 1) / 2 if bits <= 2 else float(2 ** (bits - 1))


def group_scales(
    weight: Tensor, bits: int, group: int, importance: Tensor, dtype: torch.dtype
) -> Tensor:
    """A scale for each `group` consecutive inputs of every row, (out, ⌈in / group⌉).

    Args:
        weight: (out, in).
        importance: (in,), weights of the squared errors by which scales are compared.
        dtype: what the scales will be stored in: codes must fit the rounded ones.

    Returns:
        In the dtype of `weight`; 0 for a group of zeros.
    """
    short = -weight.shape[1] % group
    rows = pad(weight, (0, short)).reshape(len(weight), -1, group)  # (out, groups, group)
    energy = pad(importance.to(weight), (0, short)).reshape(-1, group)
    widest = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    full = widest.abs() / zero_of(bits) if bits <= 2 else -widest / zero_of(bits)
    best = least = torch.empty(0)
    for share in SHRUNK if bits <= SEARCHED else SHRUNK[:1]:
        scale = (full * share).to(dtype).to(weight)
        error = (energy * (rows - decoded(nearest(rows, scale, bits), scale, bits)).square()).sum(
            2, keepdim=True
        )
        if share == 1.0:
            best, least = scale, error
            continue
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best.squeeze(2)


def spread_scales(scale: Tensor, group: int, inputs: int) -> Tensor:
    """The scale of every number, (out, in), from those of groups (out, groups)."""
    return scale.repeat_interleave(group, 1)[:, :inputs]


def nearest(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest codes, as floating-point numbers; 0 where the scale is zero."""
    codes = (weight / step.where(step != 0, 1) + zero_of(bits)).round().clamp(0, 2**bits - 1)
    return codes.where(step != 0, 0)


def decoded(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """The numbers that codes stand for."""
    return step * (codes - zero_of(bits))


def expected_error(weight: Tensor, step: Tensor, bits: int, carry: Carrier) -> Tensor:
    """What rounding with carried errors leaves in the metric, number by number (out, in).

    The sum of the squares of what it leaves, were every number rounded by as much as it is alone:
    what is carried on only moves where it lies between two codes.
    """
    alone = weight - decoded(nearest(weight, step, bits), step, bits)
    rest = alone * carry.input_size.to(weight).sqrt()
    if carry.output_size is not None:
        rest = rest * carry.output_size.to(weight).sqrt()[:, None]
    return rest


def in_metric(error: Tensor, carry: Carrier) -> Tensor:
    """S E H^½ of an error E (out, in), H damped, up to a rotation on either side."""
    size = carry.input_size.to(error).sqrt()[carry.inputs]
    with full_precision(error):
        rest = error[:, carry.inputs] @ carry.right.to(error).T * size
        if carry.left is None or carry.outputs is None or carry.output_size is None:
            return rest
        size = carry.output_size.to(error).sqrt()[carry.outputs]
        return size[:, None] * (carry.left.to(error) @ rest[carry.outputs])


def carried_codes(weight: Tensor, step: Tensor, bits: int, carry: Carrier) -> Tensor:
    """The codes (out, in), uint8, with errors carried on.

    Args:
        weight, step: (out, in), in the compute dtype.
    """
    columns = carry.inputs
    rows = torch.arange(len(weight), device=weight.device) if carry.left is None else carry.outputs
    assert rows is not None
    weight, step = weight[rows][:, columns], step[rows][:, columns]
    with full_precision(weight):
        if carry.left is None:
            codes = _by_columns(weight, step, bits, carry.right.to(weight))
        else:
            codes = _by_tiles(weight, step, bits, carry.left.to(weight), carry.right.to(weight))
    turned = torch.empty_like(codes)
    turned[rows[:, None], columns] = codes
    return turned.to(torch.uint8)


def _by_columns(weight: Tensor, step: Tensor, bits: int, right: Tensor) -> Tensor:
    """Codes of rows that are independent of each other, column by column from the last."""
    codes, errors = torch.zeros_like(weight), torch.zeros_like(weight)
    for start in reversed(range(0, weight.shape[1], TILE)):
        end = min(start + TILE, weight.shape[1])
        wanted = weight[:, start:end] + errors[:, end:] @ right[start:end, end:].T
        for column in reversed(range(start, end)):
            near = errors[:, column:end] @ right[column, column:end]
            code = nearest(wanted[:, column - start] + near, step[:, column], bits)
            codes[:, column] = code
            errors[:, column] = weight[:, column] - decoded(code, step[:, column], bits)
    return codes


def _by_tiles(weight: Tensor, step: Tensor, bits: int, left: Tensor, right: Tensor) -> Tensor:
    """Codes with errors carried across rows and columns.

    A number waits for those below it and to its right. So tiles on one diagonal go together, and
    within them numbers on one diagonal.
    """
    (outputs, inputs), size = weight.shape, min(TILE, max(weight.shape))
    below, beside = -outputs % size, -inputs % size
    weight, step = (pad(part, (0, beside, 0, below)) for part in (weight, step))
    left, right = pad(left, (0, below, 0, below)), pad(right, (0, beside, 0, beside))
    errors, partial = torch.zeros_like(weight), torch.zeros_like(weight)  # E, and E Bᵀ
    codes = torch.zeros_like(weight)
    tall, wide = weight.shape[0] // size, weight.shape[1] // size
    for number in reversed(range(tall + wide - 1)):
        places = [
            (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            for i in range(max(0, number - wide + 1), min(tall, number + 1))
            for j in [number - i]
        ]
        behind = torch.stack([errors[i, j.stop :] @ right[j, j.stop :].T for i, j in places])
        under = torch.stack([left[i, i.stop :] @ partial[i.stop :, j] for i, j in places])
        own, steps = (torch.stack([part[place] for place in places]) for part in (weight, step))
        above = torch.stack([left[i, i] for i, _ in places])
        after = torch.stack([right[j, j] for _, j in places])
        made = _within_tiles(own, steps, bits, behind, under, above, after)
        for place, code, error, product in zip(places, *made, strict=True):
            codes[place], errors[place], partial[place] = code, error, product
    return codes[:outputs, :inputs]


def _within_tiles(
    weight: Tensor,
    step: Tensor,
    bits: int,
    behind: Tensor,
    under: Tensor,
    left: Tensor,
    right: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, E and E Bᵀ of tiles (tiles, size, size), one diagonal of numbers after the other.

    Args:
        behind: E Bᵀ of the columns after the tiles.
        under: A E Bᵀ of the rows after them.
        left, right: A and B within them.
    """
    size = weight.shape[-1]
    codes, errors, products = (torch.zeros_like(weight) for _ in range(3))
    for number in reversed(range(2 * size - 1)):
        i = torch.arange(max(0, number - size + 1), min(size, number + 1), device=weight.device)
        j = number - i
        own = behind[:, i, j] + (errors[:, i] * right[:, j]).sum(-1)
        across = (left[:, i] * products[:, :, j].mT).sum(-1)  # its own product is still zero
        wanted = weight[:, i, j] + own + across + under[:, i, j]
        code = nearest(wanted, step[:, i, j], bits)
        error = weight[:, i, j] - decoded(code, step[:, i, j], bits)
        codes[:, i, j], errors[:, i, j], products[:, i, j] = code, error, own + error
    return codes, errors, products
