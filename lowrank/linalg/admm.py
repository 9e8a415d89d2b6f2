"""ADMM for matrices with a fixed number of non-zeros.

X has to be sparse and close to a target in some metric. It is split in two: `free` minimises the
loss, `sparse` has the pattern; a dual Y and a penalty ρ couple them (Boyd et al., Foundations and
Trends in Machine Learning 3(1), 2011, section 3.1):

    free   = argmin_X  loss(X) + ⟨Y, X − sparse⟩ + ρ/2 ‖X − sparse‖²
    sparse = projection of free + Y / ρ onto the pattern
    Y      = Y + ρ (free − sparse)

A third block, the basis that X multiplies or is added to, is then updated for the new `sparse`.
The set of sparse matrices is not convex: ρ rises from weak to strong, so that the support moves
freely at first and both parts agree in the end. The schedule is ours. The result is the support;
`on_support` finds the best values on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

STEPS = 20  # of conjugate gradients, at most


class Blocks(Protocol):
    """The three block updates of one problem, in its own shapes."""

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        """Minimise the loss plus the dual and penalty terms."""

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest matrix with the pattern, and its support in any form."""

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Update the third block; return both arguments, rescaled to match it."""


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
    """`sparse` and its support after `iterations` steps of ADMM.

    Args:
        blocks: its third block is updated at every step.
        sparse, support: the start, returned as it is if `iterations` is 0.
        weak, strong: ρ of the first and of the last step; it rises geometrically.
        most: stop before a `sparse` whose norm exceeds this or is NaN.
    """
    dual = torch.zeros_like(sparse)
    for step in torch.linspace(0, 1, iterations).tolist():
        rho = weak * (strong / weak) ** step
        free = blocks.free(sparse, dual, rho)
        projected, projected_support = blocks.project(free + dual / rho)
        if most is not None and not float(projected.norm()) <= most:
            break
        dual = dual + rho * (free - projected)
        sparse, dual = blocks.follow(projected, dual)
        support = projected_support
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
    """The minimiser of ½ ⟨X, A X⟩ − ⟨B, X⟩ on the mask, by conjugate gradients from `start`.

    The error never rises. In the null space of A, X keeps its start.

    Args:
        start: X (a, b), zero off the mask.
        slope: B − A X (a, b) at the start; ignored off the mask.
        curvature: X -> A X, symmetric and positive semi-definite.
        mask: (a, b) bool.
        diagonal: of A, broadcastable to (a, b): the preconditioner.
        apart: whether A couples no rows, so that each is a separate problem.
        steps: at most.
    """
    eps, tiny = torch.finfo(start.dtype).eps, torch.finfo(start.dtype).tiny
    scale = diagonal.clamp(min=eps * float(diagonal.max()) or 1.0)

    def total(matrix: Tensor) -> Tensor:
        return matrix.sum(1 if apart else (0, 1), keepdim=True)

    sparse, residual = start, slope * mask
    direction = residual / scale
    size = total(residual * direction)
    floor = eps * size  # below it only rounding errors are left
    for _ in range(steps):
        image = curvature(direction) * mask
        bend = total(direction * image)
        moves = (size > floor) & (bend > eps * total(scale * direction * direction))
        if not apart and not bool(moves):
            break
        stride = (size / bend.clamp(min=tiny)).where(moves, 0)
        sparse, residual = sparse + stride * direction, residual - stride * image
        new_size = total(residual * residual / scale)
        direction = residual / scale + (new_size / size.clamp(min=tiny)).where(moves, 0) * direction
        size = new_size
    return sparse
