"""CP of a convolution's weight: a sum of R products of one vector a dimension.

W[o, i, a, …] ≈ Σ_r last[o, r] · first[r, i] · taps₀[r, a] · …, by alternating least squares (ALS;
Lebedev et al., arXiv 1412.6553, for convolutions). A best sum need not exist: components may grow
without bound and cancel (de Silva and Lim, arXiv math/0607647), and such weights are worthless once
rounded. A small ridge pulls every step towards the one before, which bounds it; several starts are
tried, and where all diverge it is an error, not a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LowrankError
from .gram import full_precision

RIDGE = 1e-6  # of the mean diagonal of a step's normal equations
LIMIT = 30.0  # times the weight's length that all components may have: what cancels is lost
EVERY = 5  # sweeps between two looks at the error
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
        rank: R; it may be larger than any of the sides.
        starts: how many are tried; the seed draws them on the CPU.
        tolerance: of ‖W‖²; an error that falls by less in some sweeps has converged.
        limit: √Σ‖component‖² / ‖W‖ above which components are said to diverge.

    Returns:
        last (O, R), taps (R, k) for each dimension of the kernel, first (R, I): every component has
        sides of one length, the largest entry of all but `last` positive.

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
                f"the {rank} components of a weight {tuple(weight.shape)} diverge at all "
                f"{starts} starts (longer than {limit:g} times the weight): take another rank, "
                "a larger ridge, or the Tucker form"
            )
        sides = best[1] if best else [whole.new_zeros(n, rank) for n in whole.shape]
    return _parts(sides)


def rebuilt_cp(parts: Parts) -> Tensor:
    """The weight (O, I, *kernel) that parts stand for."""
    last, taps, first = parts
    return _product([last, first.T, *(t.T for t in taps)])


def component_norm(sides: Sequence[Tensor]) -> float:
    """√Σ‖component‖²: much more than the norm of their sum where they cancel."""
    return float(torch.stack([side.square().sum(0) for side in sides]).prod(0).sum().sqrt())


def _start(whole: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    drawn = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in whole.shape]
    return [(side / side.norm(dim=0)).to(whole) for side in drawn]


def _alternate(
    whole: Tensor, sides: list[Tensor], sweeps: int, least: float, ridge: float
) -> float:
    """ALS in place; returns the squared error."""
    error = float("inf")
    grams = [side.T @ side for side in sides]
    eye = torch.eye(len(grams[0]), dtype=whole.dtype, device=whole.device)
    for sweep in range(1, sweeps + 1):
        for mode in range(len(sides)):
            gram = torch.stack([g for m, g in enumerate(grams) if m != mode]).prod(0)
            shift = ridge * gram.diagonal().mean().clamp(min=1e-300)
            # Proximal: towards the step before, so that the error falls and nothing shrinks.
            target = _against(whole, sides, mode) + shift * sides[mode]
            sides[mode] = torch.linalg.solve(gram + shift * eye, target.T).T
            if mode:  # lengths are gathered in the first side
                length = torch.linalg.vector_norm(sides[mode], dim=0).clamp(min=1e-300)
                sides[mode], sides[0] = sides[mode] / length, sides[0] * length
                grams[0] = sides[0].T @ sides[0]
            grams[mode] = sides[mode].T @ sides[mode]
        if sweep % EVERY == 0 or sweep == sweeps:
            before, error = error, float((whole - _product(sides)).square().sum())
            if before - error < least:
                break
    return error


def _against(whole: Tensor, sides: Sequence[Tensor], mode: int) -> Tensor:
    """Σ over all other dimensions of W times their vectors: (n, R)."""
    letters = "abcde"[: whole.ndim]
    others = [m for m in range(whole.ndim) if m != mode]
    text = ",".join([letters, *(letters[m] + "r" for m in others)])
    product: Tensor = torch.einsum(f"{text}->{letters[mode]}r", whole, *(sides[m] for m in others))
    return product


def _product(sides: Sequence[Tensor]) -> Tensor:
    letters = "abcde"[: len(sides)]
    text = ",".join(letter + "r" for letter in letters)
    tensor: Tensor = torch.einsum(f"{text}->{letters}", *sides)
    return tensor


def _parts(sides: Sequence[Tensor]) -> Parts:
    """Sides of one length, signs gathered in the outputs; a component that is zero keeps unit sides
    everywhere else, so that gradients reach it."""
    lengths = torch.stack([side.norm(dim=0) for side in sides])  # (modes, R)
    alive = lengths.prod(0) > 0
    even = lengths.prod(0).pow(1 / len(sides))
    made, sign = [], torch.ones_like(even)
    for mode, (side, length) in enumerate(zip(sides, lengths, strict=True)):
        unit = torch.where(alive, side / length.where(alive, 1), 0)
        if mode:
            peak = unit.gather(0, unit.abs().argmax(0, keepdim=True))[0]
            turn = torch.where(peak < 0, -1.0, 1.0)
            unit, sign = unit * turn, sign * turn
            unit = torch.where(alive, unit * even, len(side) ** -0.5)
        made.append(unit)
    last = made[0] * sign * even
    return last, [side.T for side in made[2:]], made[1].T
