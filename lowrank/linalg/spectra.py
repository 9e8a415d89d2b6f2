"""Measures of the rank of a spectrum, computed from its energies (squared singular values).

All take energies (k,), descending, as from `energies`, and are 0 for the zero matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .svd import compute_dtype, tails


def effective_rank(energy: Tensor) -> float:
    """exp of the entropy of p = σ² / Σ σ²: how many directions share the energy.

    A planted rank of 8 under noise gives 8.5 here and 42.8 by `entropy_rank`, whose sum of σ is
    mostly noise: choose ranks by this one.
    """
    return _perplexity(energy.double())


def entropy_rank(energy: Tensor) -> float:
    """exp of the entropy of p = σ / Σ σ: the effective rank of Roy and Vetterli (2007)."""
    return _perplexity(energy.double().sqrt())


def stable_rank(energy: Tensor) -> float:
    """‖W‖²_F / ‖W‖²_2: at most the rank, and insensitive to small directions."""
    most = float(energy.max()) if len(energy) else 0.0
    return float(energy.double().sum()) / most if most > 0 else 0.0


def condition_number(energy: Tensor) -> float:
    """σ_max / σ_min; inf beyond the resolution of the eigenproblem that gave the energies.

    In float64 that is some 10⁷ / √k, beyond the precision of float32 weights.
    """
    if not len(energy) or float(energy[0]) == 0:
        return 0.0
    most, least = float(energy[0]), float(energy[-1])
    floor = len(energy) * torch.finfo(compute_dtype(len(energy))).eps * most
    return math.sqrt(most / least) if least > floor else math.inf


def rank_for(share: float, energy: Tensor) -> int:
    """The smallest rank that keeps this share of the energy."""
    rest = tails(energy)
    return int(torch.nonzero(rest <= (1 - share) * rest[0])[0])


def _perplexity(weights: Tensor) -> float:
    total = weights.sum()
    if not len(weights) or float(total) == 0:
        return 0.0
    p = weights / total
    return float(torch.special.entr(p).sum().exp())
