"""The number of components above the noise, by analytic empirical variational Bayes (EVBMF).

V (L, M), L ≤ M, is modelled as low rank plus Gaussian noise of unknown variance σ². The empirical
variational Bayes solution keeps the singular values above √(M σ² (1 + τ̄)(1 + α / τ̄)), with α =
L / M and τ̄ ≈ 2.5129 √α; σ² minimises the free energy, a function of one variable (Nakajima,
Sugiyama, Babacan and Tomioka, JMLR 14, 2013). Kim et al. (arXiv 1511.06530) choose the Tucker ranks
of a convolution by it. For a weight unlike the model the rank may be too low: it is a guide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LowrankError
from .svd import energies

TAU = 2.5129
GRID = 256  # variances evaluated first; the free energy may have several minima
REFINE = 48  # golden-section steps around the best one
GOLDEN = (5**0.5 - 1) / 2


def evbmf_rank(matrix: Tensor, *, least: int = 1) -> int:
    """The number of components above the noise, between `least` and the smaller side.

    Args:
        matrix: (m, n); either side may be the longer.

    Raises:
        LowrankError: it is not a matrix, or not finite.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise LowrankError(f"expected a matrix, got a tensor of shape {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise LowrankError("the matrix holds NaN or Inf: no rank can be estimated")
    return evbmf_count(energies(matrix), max(matrix.shape), least=least)


def evbmf_count(energy: Tensor, long: int, *, least: int = 1) -> int:
    """`evbmf_rank` from squared singular values, descending, and the longer side of the matrix.

    Args:
        energy: (L,), L the shorter side.
    """
    short, energy = len(energy), energy.detach().double().cpu()
    floor = energy[0] * short * torch.finfo(torch.float64).eps
    if float(energy[0]) <= 0:
        return min(least, short)
    energy = energy.clamp(min=float(floor))  # rounding, if there is no noise at all
    alpha = short / long
    tau = TAU * alpha**0.5
    bar = (1 + tau) * (1 + alpha / tau)
    return min(max(_above(energy, long, alpha, bar), least), short)


def evbmf_ranks(weight: Tensor, *, least: int = 1) -> tuple[int, int]:
    """(r_out, r_in) of a weight (O, I, K), each from its own unfolding."""
    return (
        evbmf_rank(weight.flatten(1), least=least),
        evbmf_rank(weight.transpose(0, 1).flatten(1), least=least),
    )


def _above(energy: Tensor, long: int, alpha: float, bar: float) -> int:
    """Components above the noise of the σ² of least free energy.

    σ² lies within the bounds that the solution implies, and is known well enough once no
    component lies between the thresholds of the ends.
    """
    short = len(energy)
    # At most so many components stand out from noise: those after them bound σ² from below.
    most = min(int(-(-short // (1 + alpha))) - 1, short) - 1
    rest = energy[min(max(most, 0) + 1, short - 1) :]
    low = max(float(rest[0]) / (long * bar), float(rest.mean()) / long)
    high = max(float(energy.sum()) / (short * long), low)
    fractions = torch.linspace(0, 1, GRID, dtype=torch.float64)
    tried = low * (high / low) ** fractions
    best = int(_free_energy(tried, energy, long, alpha, bar).argmin())
    left, right = float(tried[max(best - 1, 0)]), float(tried[min(best + 1, GRID - 1)])

    def above(variance: float) -> int:
        return int((energy > long * variance * bar).sum())

    for _ in range(REFINE):
        if above(left) == above(right):
            break
        probes = torch.tensor(
            [right - GOLDEN * (right - left), left + GOLDEN * (right - left)], dtype=torch.float64
        )
        lower, upper = _free_energy(probes, energy, long, alpha, bar).tolist()
        if lower < upper:
            right = float(probes[1])
        else:
            left = float(probes[0])
    return above((left + right) / 2)


def _free_energy(variance: Tensor, energy: Tensor, long: int, alpha: float, bar: float) -> Tensor:
    """The free energy of each variance, (v,)."""
    x = energy / (long * variance[:, None])
    shift = x - (1 + alpha)
    tau = (shift + (shift.square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    tau = tau.clamp(min=0)  # below the noise, where it is not used
    signal = x - tau + ((tau + 1) / x).log() + alpha * (tau / alpha + 1).log()
    return torch.where(x > bar, signal, x - x.log()).sum(1)
