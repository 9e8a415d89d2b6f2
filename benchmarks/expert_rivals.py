"""Weights of experts that share something, for benchmarks/experts.py: none of them is in lowrank.

All take the experts' weights (E, out, in), their Gram matrices (E, in, in) and their tokens (E,),
and return the weights that remain at a ratio of the numbers; None where the ratio is too small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Weights = Tensor
Way = Callable[[Tensor, Tensor, Tensor, float], Weights | None]
STEPS = 3000


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a Gram matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(gram)
    scale = values.clamp(min=float(values.max()) * 1e-10).sqrt()
    return vectors * scale @ vectors.T, vectors / scale @ vectors.T


def _error(weights: Tensor, other: Tensor, grams: Tensor, counts: Tensor) -> float:
    rest = weights - other
    return float((counts * torch.einsum("eoi,eij,eoj->e", rest, grams, rest)).sum())


def shared_basis(weights: Tensor, grams: Tensor, counts: Tensor, ratio: float) -> Weights | None:
    """One basis for all experts, of the inputs (MoBE's thought in closed form, whitened and
    weighted by tokens) or of the outputs, whichever is nearer."""
    experts, rows, columns = weights.shape
    numbers, share = ratio * weights.numel(), counts / counts.sum()
    rank = int(numbers / (experts * rows + columns))
    root, inverse = _root((share[:, None, None] * grams).sum(0))
    scaled = weights @ root
    whole = torch.einsum("e,eoi,eoj->ij", share, scaled, scaled)
    basis = torch.linalg.eigh(whole).eigenvectors[:, -rank:].T @ inverse  # (r, in)
    cross, square = weights @ grams @ basis.T, basis @ grams @ basis.T
    inputs = cross @ torch.linalg.pinv(square, hermitian=True) @ basis
    rank = int(numbers / (rows + experts * columns))
    whole = torch.einsum("e,eoi,eij,epj->op", share, weights, grams, weights)
    basis = torch.linalg.eigh(whole).eigenvectors[:, -rank:]  # (out, r)
    outputs = basis @ (basis.T @ weights)
    return min((inputs, outputs), key=lambda w: _error(weights, w, grams, counts))


def base_and_difference(
    weights: Tensor, grams: Tensor, counts: Tensor, ratio: float
) -> Weights | None:
    """One dense matrix for all experts, nearest to their outputs, and a difference of low rank,
    whitened, for each."""
    experts, rows, columns = weights.shape
    rank = int((ratio * weights.numel() - rows * columns) / (experts * (rows + columns)))
    if rank < 1:
        return None
    share = counts[:, None, None]
    base = (share * weights @ grams).sum(0) @ torch.linalg.pinv((share * grams).sum(0))
    found = []
    for weight, gram in zip(weights, grams, strict=True):
        root, inverse = _root(gram)
        u, s, v = torch.linalg.svd((weight - base) @ root, full_matrices=False)
        found.append(base + (u[:, :rank] * s[:rank]) @ v[:rank] @ inverse)
    return torch.stack(found)


def mobe(weights: Tensor, grams: Tensor, counts: Tensor, ratio: float) -> Weights | None:
    """W_e = A_e SiLU(Σ_j α_ej B_j), with half as many B as experts, fitted to the weights by Adam
    (MoBE, arXiv 2508.05257; no data). Of a fused gate and up, each is fitted alone."""
    experts, rows, columns = weights.shape
    if rows > columns:
        parts = [mobe(part, grams, counts, ratio) for part in weights.chunk(rows // columns, 1)]
        return torch.cat([part for part in parts if part is not None], dim=1)
    count = max(experts // 2, 1)
    rank = int((ratio * weights.numel() - experts * count) / (experts * rows + count * columns))
    if rank < 1:
        return None
    draw = torch.Generator().manual_seed(0)
    goal = (weights / weights.std()).float()
    left = nn.Parameter(torch.randn(experts, rows, rank, generator=draw) / rank**0.5)
    mixing = nn.Parameter(torch.randn(experts, count, generator=draw) / count**0.5)
    bases = nn.Parameter(torch.randn(count, rank, columns, generator=draw))
    optimizer = torch.optim.Adam([left, mixing, bases], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def product() -> Tensor:
        return left @ nn.functional.silu(torch.einsum("ej,jrc->erc", mixing, bases))

    for _ in range(STEPS):
        optimizer.zero_grad()
        (product() - goal).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return product().to(weights) * weights.std()


RIVALS: dict[str, Way] = {
    "shared basis": shared_basis,
    "base and difference": base_and_difference,
    "MoBE-like": mobe,
}
