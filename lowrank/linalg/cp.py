"""CP decomposition of a convolution's weight: a sum of R outer products of one vector per mode.

W[o, i, a, …] ≈ Σ_r last[o, r] · first[r, i] · taps₀[r, a] · …, by alternating least squares (ALS;
Lebedev et al., arXiv 1412.6553, for convolutions). A best approximation need not exist: components
may grow without bound and cancel (de Silva and Lim, arXiv math/0607647), and rounding then ruins
the weight. A small proximal term keeps each step close to the previous one; several starts are
tried, and it is an error if all of them diverge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LowrankError
from .gram import full_precision, shifted_root

RIDGE = 1e-6  # of the mean diagonal of a step's normal equations
LIMIT = 30.0  # largest √Σ‖component‖² / ‖W‖: cancellation loses digits
EVERY = 5  # sweeps between two evaluations of the error
Parts = tuple[Tensor, list[Tensor], Tensor]  # last (O, R), taps (R, k) for each dimension, first


def cp_factors(
    weight: Tensor,
    rank: int,
    *,
    seed: int = 0,
    starts: int = 3,
    sweeps: int = 200,
    tolerance: float = 1e-7,
    ridge: float = RIDGE,
    limit: float = LIMIT,
) -> Parts:
    """The best of several starts of ALS, in float64.

    Args:
        weight: (O, I, *kernel).
        rank: R; it may exceed every dimension.
        starts: how many are tried, drawn on the CPU from `seed`.
        tolerance: of ‖W‖²; ALS stops when the error falls by less in `EVERY` sweeps.
        limit: √Σ‖component‖² / ‖W‖ above which the components count as divergent.

    Returns:
        last (O, R), taps (R, k) for each dimension of the kernel, first (R, I): each component has
        the same norm in every factor; its largest entry is positive in all but `last`.

    Raises:
        LowrankError: rank below 1, a weight of fewer than three dimensions, or components that
            diverge at every start.
    """
    if weight.ndim < 3 or rank < 1:
        raise LowrankError(
            "expected a weight (O, I, *kernel) and a rank of at least 1, "
            f"got shape {tuple(weight.shape)} and rank {rank}"
        )
    generator = torch.Generator().manual_seed(seed)
    with full_precision(weight):
        whole = weight.detach().double()
        total = float(whole.square().sum())
        best: tuple[float, list[Tensor]] | None = None
        for _ in range(max(starts, 1) if total > 0 else 0):
            sides = _start(whole, rank, generator)
            error = _alternate(whole, sides, sweeps, tolerance * total, ridge)
            if component_norm(sides) <= limit * total**0.5 and (best is None or error < best[0]):
                best = error, sides
        if total > 0 and best is None:
            raise LowrankError(
                f"the {rank} components of a weight of shape {tuple(weight.shape)} diverge from "
                f"all {starts} starts (norm above {limit:g} times the weight's): use another rank, "
                "a larger ridge, or Tucker"
            )
        sides = best[1] if best else [whole.new_zeros(n, rank) for n in whole.shape]
    return _parts(sides)


def rebuilt_cp(parts: Parts) -> Tensor:
    """The weight (O, I, *kernel) of the parts."""
    last, taps, first = parts
    return _product([last, first.T, *(t.T for t in taps)])


def component_norm(sides: Sequence[Tensor]) -> float:
    """√Σ‖component‖²: far above the norm of the sum where components cancel."""
    return float(torch.stack([side.square().sum(0) for side in sides]).prod(0).sum().sqrt())


def _start(whole: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    drawn = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in whole.shape]
    return [(side / side.norm(dim=0)).to(whole) for side in drawn]


def _alternate(
    whole: Tensor, sides: list[Tensor], sweeps: int, least: float, ridge: float
) -> float:
    """ALS in place; returns the squared error.

    No tensor exceeds (I · K, R): W is contracted with the outputs' vectors once a sweep, and all
    other modes start from that.
    """
    error = float("inf")
    flat = whole.flatten(1)  # (O, I·K)
    grams = [side.T @ side for side in sides]
    for sweep in range(1, sweeps + 1):
        sides[0] = _solved(sides, grams, 0, flat @ _joint(sides[1:]), ridge)
        grams[0] = sides[0].T @ sides[0]
        seen = (flat.T @ sides[0]).view(len(sides[1]), -1, sides[0].shape[1])  # (I, K, R)
        length = _turn(sides, grams, 1, (seen * _joint(sides[2:])).sum(1), ridge)
        seen = (seen * sides[1][:, None]).sum(0) * length
        seen = seen.view(*whole.shape[2:], -1)  # (*kernel, R)
        for mode in range(2, len(sides)):
            target = _against(seen, sides[2:], mode - 2)
            seen = seen * _turn(sides, grams, mode, target, ridge)
        if sweep % EVERY == 0 or sweep == sweeps:
            previous, error = error, float((whole - _product(sides)).square().sum())
            if previous - error < least:
                break
    return error


def _turn(
    sides: list[Tensor], grams: list[Tensor], mode: int, target: Tensor, ridge: float
) -> Tensor:
    """Update a mode other than the first, which takes all norms; returns them, (R,)."""
    side = _solved(sides, grams, mode, target, ridge)
    length: Tensor = torch.linalg.vector_norm(side, dim=0).clamp(min=1e-300)
    sides[mode], sides[0] = side / length, sides[0] * length
    grams[mode], grams[0] = sides[mode].T @ sides[mode], grams[0] * length * length[:, None]
    return length


def _solved(
    sides: Sequence[Tensor], grams: Sequence[Tensor], mode: int, target: Tensor, ridge: float
) -> Tensor:
    """The least-squares factor (n, R) of a mode for W contracted with the others, `target`."""
    gram = torch.ones_like(grams[mode])
    for other in (gram for m, gram in enumerate(grams) if m != mode):
        gram *= other
    shift = ridge * gram.diagonal().mean(0, keepdim=True).clamp(min=1e-300)
    root, shift = shifted_root(gram, shift)
    # Proximal: towards the previous step, so that the error falls without shrinkage.
    solution: Tensor = torch.cholesky_solve((target + shift * sides[mode]).T, root).T
    return solution


def _against(seen: Tensor, taps: Sequence[Tensor], place: int) -> Tensor:
    """(*kernel, R) contracted with the vectors of all other dimensions of the kernel, (k, R)."""
    letters = "abc"[: len(taps)]
    others = [m for m in range(len(taps)) if m != place]
    text = ",".join([letters + "r", *(letters[m] + "r" for m in others)])
    product: Tensor = torch.einsum(f"{text}->{letters[place]}r", seen, *(taps[m] for m in others))
    return product


def _joint(sides: Sequence[Tensor]) -> Tensor:
    """(Π n, R): the outer product of the vectors of each component, flattened."""
    joint = sides[0]
    for side in sides[1:]:
        joint = (joint[:, None] * side).flatten(0, 1)
    return joint


def _product(sides: Sequence[Tensor]) -> Tensor:
    return (sides[0] @ _joint(sides[1:]).T).view([len(side) for side in sides])


def _parts(sides: Sequence[Tensor]) -> Parts:
    """Factors of equal norm, signs collected in `last`; a zero component keeps unit norm in all
    others, so that gradients reach it."""
    lengths = torch.stack([side.norm(dim=0) for side in sides])  # (modes, R)
    alive = lengths.prod(0) > 0
    even = lengths.prod(0).pow(1 / len(sides))
    factors, sign = [], torch.ones_like(even)
    for mode, (side, length) in enumerate(zip(sides, lengths, strict=True)):
        unit = torch.where(alive, side / length.where(alive, 1), 0)
        if mode:
            peak = unit.gather(0, unit.abs().argmax(0, keepdim=True))[0]
            flip = torch.where(peak < 0, -1.0, 1.0)
            unit, sign = unit * flip, sign * flip
            unit = torch.where(alive, unit * even, len(side) ** -0.5)
        factors.append(unit)
    last = factors[0] * sign * even
    return last, [side.T for side in factors[2:]], factors[1].T
