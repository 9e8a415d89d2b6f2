"""Alternating directions (ADMM) for matrices with a fixed number of non-zeros.

X is to be near a target in a metric, and sparse. It is split in two: `free` obeys the metric,
`sparse` the pattern; a dual Y and a penalty ρ hold them together (Boyd et al., Foundations and
Trends in Machine Learning 3(1), 2011, section 3.1):

    free   = argmin_X  loss(X) + ⟨Y, X − sparse⟩ + ρ/2 ‖X − sparse‖²
    sparse = the nearest to free + Y / ρ that has the pattern
    Y      = Y + ρ (free − sparse)

and a third block, the basis that stands beside or below X, then follows the new `sparse`. The set
of sparse matrices is not convex: ρ rises from weak to strong, so that the support moves freely at
first and both parts agree in the end. The schedule is ours. What comes out is the support; the best
values on it are `on_support`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

STEPS = 20  # of conjugate gradients


class Blocks(Protocol):
    """The three steps of one problem; shapes are the problem's own."""

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        """The X of least loss, held to `sparse` by the dual and the penalty."""

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest matrix that has the pattern, and its support in any form."""

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Move the third block; returns both arguments in the units that it now has."""


def alternate(
    blocks: Blocks,
    sparse: Tensor,
    support: Tensor,
    *,
    iterations: int,
    weak: float,
    strong: float,
    most: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`sparse` and its support after so many exchanges with `free`.

    Args:
        blocks: its third block moves with every exchange.
        sparse: the start, with its `support`; both come back where `iterations` is 0.
        weak, strong: ρ of the first and of the last exchange; it rises geometrically.
        most: the exchange ends before a `sparse` whose norm is above this, or is no number.
    """
    dual = torch.zeros_like(sparse)
    for step in torch.linspace(0, 1, iterations).tolist():
        rho = weak * (strong / weak) ** step
        free = blocks.free(sparse, dual, rho)
        projected, where = blocks.project(free + dual / rho)
        if most is not None and not float(projected.norm()) <= most:
            break
        dual = dual + rho * (free - projected)
        sparse, dual = blocks.follow(projected, dual)
        support = where
    return sparse, support


def on_support(
    start: Tensor,
    slope: Tensor,
    curvature: Callable[[Tensor], Tensor],
    mask: Tensor,
    diagonal: Tensor,
    *,
    apart: bool,
    steps: int = STEPS,
) -> Tensor:
    """The X on the mask of least ½ ⟨X, A X⟩ − ⟨B, X⟩, by conjugate gradients from `start`.

    The error never rises. Where A is flat X stays as it is.

    Args:
        start: X (a, b), zero off the mask.
        slope: B − A X (a, b) at the start; off the mask it is not read.
        curvature: X -> A X, symmetric and positive semi-definite.
        mask: (a, b) bool.
        diagonal: of A, as what broadcasts to (a, b): the preconditioner.
        apart: A couples no two rows, and each is a problem of its own.
        steps: at most.
    """
    eps, tiny = torch.finfo(start.dtype).eps, torch.finfo(start.dtype).tiny
    scale = diagonal.clamp(min=eps * float(diagonal.max()) or 1.0)

    def total(matrix: Tensor) -> Tensor:
        return matrix.sum(1 if apart else (0, 1), keepdim=True)

    sparse, left = start, slope * mask
    direction = left / scale
    size = total(left * direction)
    done = eps * size  # below it only rounding errors are left
    for _ in range(steps):
        along = curvature(direction) * mask
        bent = total(direction * along)
        moves = (size > done) & (bent > eps * total(scale * direction * direction))
        if not apart and not bool(moves):
            break
        stride = (size / bent.clamp(min=tiny)).where(moves, 0)
        sparse, left = sparse + stride * direction, left - stride * along
        again = total(left * left / scale)
        direction = left / scale + (again / size.clamp(min=tiny)).where(moves, 0) * direction
        size = again
    return sparse
