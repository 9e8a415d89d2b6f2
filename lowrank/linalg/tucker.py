"""Tucker-2 decomposition of a convolution's weight (O, I, K), along its channels only.

W ≈ C ×₁ A ×₂ B with A (O, r_out), B (I, r_in) and a core C (r_out, r_in, K) (Kim et al., arXiv
1511.06530). By the weight alone: the truncated higher-order SVD, refined by alternation (HOOI; De
Lathauwer et al. 2000). By the outputs, ‖(W − Ŵ)H^½‖ with the Gram matrix H of the patches: the
input channels are chosen in the metric of H summed over the kernel, the best core and output
channels for them follow in closed form, and alternation refines both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gram import full_precision, shifted_root, squared_error, unit_of
from .svd import factor, tails

STOP = 1e-5  # of the error
ROUNDING = 1e-12  # of ‖W‖²: where nothing is lost, gains are of this size
RIDGE = 1e-10  # of the mean diagonal of a metric
Parts = tuple[Tensor, Tensor, Tensor]  # last (O, r_out), core (r_out, r_in, K), first (r_in, I)


def hosvd_errors(weight: Tensor) -> Tensor:
    """Squared error of the truncated HOSVD at every (r_out, r_in), (O + 1, I + 1) float64.

    An upper bound for HOOI; at most twice the optimum.

    Args:
        weight: (O, I, K).
    """
    with full_precision(weight):
        whole = weight.detach().double()
        out, into = _basis(whole, 0), _basis(whole, 1)
        energy = _core(whole, out, into).square().sum(2)
    kept = torch.zeros(energy.shape[0] + 1, energy.shape[1] + 1, dtype=torch.float64)
    kept[1:, 1:] = energy.cumsum(0).cumsum(1).cpu()
    return (kept[-1, -1] - kept).clamp(min=0)


def tucker_factors(weight: Tensor, ranks: tuple[int, int], *, sweeps: int = 20) -> Parts:
    """The parts of a Tucker-2 decomposition, outer factors orthonormal, by HOSVD and at most
    `sweeps` of HOOI, until one lowers the error by less than `STOP` of it.

    Args:
        weight: (O, I, K), any floating dtype; computed in float64.
        ranks: (r_out, r_in).
    """
    r_out, r_in = ranks
    with full_precision(weight):
        whole = weight.detach().double()
        turned = whole.transpose(0, 1).contiguous()
        out, into = _basis(whole, 0)[:, :r_out], _basis(turned, 0)[:, :r_in]
        total = float(whole.square().sum())
        kept = float(_core(whole, out, into).square().sum())
        for _ in range(sweeps):
            out = _basis(_shrunk(turned, into), 0)[:, :r_out]
            rest = _shrunk(whole, out)
            into = _basis(rest, 0)[:, :r_in]
            before, kept = kept, float((into.T @ rest.flatten(1)).square().sum())
            if kept - before <= max(STOP * (total - kept), ROUNDING * total):
                break
        return out, _core(whole, out, into), into.T


def first_of(weight: Tensor, gram: Tensor) -> Tensor:
    """Input channels by their energy in the outputs, descending, (min(O·K, I), I) float64: the
    leading `r_in` rows are `first` at that rank.

    Args:
        weight: (O, I, K).
        gram: (I·K, I·K), of patches in the order of the weight's (I, K).
    """
    outputs, inputs, taps = weight.shape
    whole = weight.detach().double()
    channel = gram.to(whole).view(inputs, taps, inputs, taps).diagonal(dim1=1, dim2=3).sum(2)
    rows = whole.movedim(2, 1).reshape(outputs * taps, inputs)
    side = min(rows.shape)
    return factor(rows, side, channel)[1]


def conditioned(weight: Tensor, first: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best kernel for given input channels, its metric, and the error.

    min over Z (O, r_in·K) of ‖(W − Z F)H^½‖², F = first ⊗ 1: Z = W H Fᵀ (F H Fᵀ)⁻¹.

    Returns:
        Z (O, r_in · K), its metric F H Fᵀ, and the error of Z.
    """
    flat = weight.detach().double().flatten(1)
    metric = gram.to(flat)
    inner, cross = _spread(first, metric, weight.shape[2])
    kernel = _solved(flat @ cross.T, inner)
    lost = ((flat @ metric) * flat).sum() - ((kernel @ inner) * kernel).sum()
    return kernel, inner, float(lost.clamp(min=0))


def nested_fits(
    weight: Tensor, first: Tensor, gram: Tensor, ranks: Sequence[int]
) -> Iterator[tuple[Tensor, float]]:
    """What `conditioned` fits with the leading r of the given input channels, for every r.

    The metric F H Fᵀ of fewer channels is a leading block of that of more, and so is its Cholesky
    factor L: with Y = L⁻¹ F H Wᵀ, the outputs of the best Z have the second moment Y_rᵀ Y_r, of the
    leading r · K rows of Y. One decomposition gives all ranks.

    Args:
        ranks: ascending, each at most len(first).

    Yields:
        For each rank Y_rᵀ Y_r (O, O), and the error of Z.
    """
    taps = weight.shape[2]
    flat = weight.detach().double().flatten(1)
    metric = gram.to(flat)
    first, moved = first[: max(ranks)], flat @ metric
    inner, _ = _spread(first, metric, taps)
    wanted = (first @ moved.T.reshape(weight.shape[1], -1)).view(len(inner), -1)  # F H Wᵀ
    rows = torch.linalg.solve_triangular(_root(inner), wanted, upper=False)
    total, kept, start = (moved * flat).sum(), flat.new_zeros(len(flat), len(flat)), 0
    for rank in ranks:
        more = rows[start : rank * taps]
        kept, start = kept + more.T @ more, rank * taps
        yield kept, float((total - kept.diagonal().sum()).clamp(min=0))


def outer_errors(moment: Tensor, most: int) -> Tensor:
    """Error added by truncating outputs with a second moment (O, O) to r_out ≤ `most`, their rank:
    (most + 1,) float64."""
    with full_precision(moment):
        values: Tensor = torch.linalg.eigvalsh(moment)
    return tails(values.clamp(min=0).flip(0)[:most])


def outer(kernel: Tensor, metric: Tensor, r_out: int, r_in: int) -> tuple[Tensor, Tensor]:
    """The best `last` (O, r_out) and `core` (r_out, r_in, K) of Z (O, r_in · K)."""
    up, down = factor(kernel, r_out, metric)
    return up, down.view(r_out, r_in, -1)


def alternated(
    weight: Tensor, parts: Parts, gram: Tensor, *, sweeps: int = 10, steps: int = 8
) -> tuple[Parts, list[float]]:
    """Parts with a smaller error ‖(W − Ŵ)H^½‖², by alternation: conjugate gradients on the input
    channels from their present value, then the best core and output channels for them.

    Neither step raises the error; a sweep that gains less than 1e-3 of it is the last.

    Args:
        weight: (O, I, K).
        parts: the start; `outer` after `conditioned` gives a good one.
        gram: H (I·K, I·K), of patches in the order of the weight's (I, K).
        steps: of conjugate gradients per sweep.

    Returns:
        The parts, and the error at the start and after each sweep.
    """
    with full_precision(weight):
        whole = weight.detach().double()
        unit = unit_of(whole)  # squares of squares of small numbers would underflow
        whole, core = whole / unit, parts[1].detach() / unit
        flat, metric = whole.flatten(1), gram.to(whole)
        parts = (parts[0].detach(), core, parts[2].detach())
        r_out, r_in = parts[1].shape[:2]
        errors = [squared_error(flat, rebuilt(parts).flatten(1), metric)]
        for _ in range(sweeps):
            first = _nearer(whole, parts, metric, steps)
            first = torch.linalg.qr(first.T).Q.T
            kernel, inner, _lost = conditioned(whole, first, metric)
            candidate = (*outer(kernel, inner, r_out, r_in), first)
            error = squared_error(flat, rebuilt(candidate).flatten(1), metric)
            if not error < errors[-1]:
                break
            parts = candidate
            errors.append(error)
            if errors[-2] - error < 1e-3 * errors[-2]:
                break
    return (parts[0], parts[1] * unit, parts[2]), [error * unit**2 for error in errors]


def rebuilt(parts: Parts) -> Tensor:
    """The weight (O, I, K) of the parts."""
    last, core, first = parts
    return torch.einsum("op,pjk,ji->oik", last, core, first)


def _nearer(whole: Tensor, parts: Parts, metric: Tensor, steps: int) -> Tensor:
    """`first` (r_in, I) after conjugate-gradient steps on ‖(W − C ∘ F)H^½‖²: nothing is inverted,
    and each step lowers the error."""
    last, core, first = parts
    turn, square = torch.linalg.qr(last)
    spread = torch.einsum("qp,pjk->qjk", square, core)  # applied after F, outputs reduced
    target = torch.einsum("oq,oik->qik", turn, whole)

    def pulled(difference: Tensor) -> Tensor:
        weighed = (difference.flatten(1) @ metric).view_as(difference)
        return torch.einsum("qjk,qik->ji", spread, weighed)

    residual = pulled(target - torch.einsum("qjk,ji->qik", spread, first))
    direction, size = residual, residual.square().sum()
    least = 1e-24 * size
    for _ in range(steps):
        if size <= least:
            break
        image = pulled(torch.einsum("qjk,ji->qik", spread, direction))
        bend = (direction * image).sum()
        if not bend > 0:
            break
        stride = size / bend
        first, residual = first + stride * direction, residual - stride * image
        previous, size = size, residual.square().sum()
        direction = residual + size / previous * direction
    return first


def _solved(rows: Tensor, metric: Tensor) -> Tensor:
    """rows · M⁻¹ for a positive semi-definite M (n, n), with a ridge as large as Cholesky needs."""
    if not float(metric.diagonal().mean()) > 0:
        return rows * 0
    solution: Tensor = torch.cholesky_solve(rows.T, _root(metric)).T
    return solution


def _root(metric: Tensor) -> Tensor:
    """A Cholesky factor, with a ridge as large as it needs."""
    return shifted_root(metric, RIDGE * metric.diagonal().mean(0, keepdim=True))[0]


def _spread(first: Tensor, metric: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """F H Fᵀ (r · K, r · K) and F H (r · K, I · K) with F = first ⊗ 1, which is not formed."""
    rank, inputs = first.shape
    cross = (first @ metric.reshape(inputs, -1)).view(rank * taps, inputs * taps)
    inner = (first @ cross.T.reshape(inputs, -1)).view(rank * taps, rank * taps)
    return (inner + inner.T) / 2, cross


def _core(weight: Tensor, out: Tensor, into: Tensor) -> Tensor:
    return torch.einsum("oik,op,ij->pjk", weight, out, into)


def _shrunk(weight: Tensor, basis: Tensor) -> Tensor:
    """(n, m, K) projected on the basis (n, r) along its first mode, as (m, r, K)."""
    inner = basis.T @ weight.flatten(1)
    return inner.view(-1, *weight.shape[1:]).transpose(0, 1)


def _basis(weight: Tensor, mode: int) -> Tensor:
    """Orthonormal (n, n): directions of a mode, by descending energy."""
    unfolded = weight.movedim(mode, 0).flatten(1)
    vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors
    return vectors.flip(1)
