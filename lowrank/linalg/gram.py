"""Second moments and the errors measured with them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import LowrankError

T = TypeVar("T")
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a Gram matrix (1, 1); grows as √in
RIDGES = (0.0, 1e-4, 1e-2, 1.0)  # of the mean diagonal, the first for a matrix that is not singular
PART = 512  # columns that are multiplied at once; fewer are slow
FAINT = 1e-12  # largest magnitude of numbers whose products fp32 may round to zero
GROWTH = 8.0  # most that a fit may exceed the largest entry of the weight by


def gram_sum(rows: Tensor, total: Tensor | None = None) -> Tensor:
    """Σ x xᵀ over rows (tokens, in), multiplied in fp32 (fp64 or faint inputs: fp64), summed in
    float64.

    Chunks bound both the rounding of the fp32 sums and the memory of the cast. Of wide rows only
    the blocks on and above the diagonal are multiplied: the matrix is symmetric.

    Args:
        total: (in, in) float64, to be added to in place; None stands for zeros.
    """
    if total is None:
        total = _zeros(rows, rows)
    cuts = _cuts(rows)
    for chunk in _chunks(rows, _wide(rows)):
        parts = [chunk[:, start : start + cuts.step] for start in cuts]
        with full_precision(rows):  # hooks may run inside the caller's autocast
            for row, left in zip(cuts, parts, strict=True):
                for column, right in zip(cuts, parts, strict=True):
                    if row <= column:
                        place = total[row : row + cuts.step, column : column + cuts.step]
                        place += left.T @ right
    for row in cuts[1:]:  # mirrored
        total[row : row + cuts.step, :row] = total[:row, row : row + cuts.step].T
    return total


def cross_sum(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """Σ x yᵀ over the rows of two tensors (tokens, ·), in the precision of `gram_sum`.

    Args:
        total: as for `gram_sum`.
    """
    if total is None:
        total = _zeros(left, right)
    cuts = _cuts(left)
    wide = _wide(left, right)
    for x, y in zip(_chunks(left, wide), _chunks(right, wide), strict=True):
        with full_precision(left):
            for start in cuts:
                total[start : start + cuts.step] += x[:, start : start + cuts.step].T @ y
    return total


def _zeros(left: Tensor, right: Tensor) -> Tensor:
    shape = left.shape[1], right.shape[1]
    return torch.zeros(shape, dtype=torch.float64, device=left.device)


def _cuts(rows: Tensor) -> range:
    """The first columns of the parts that are multiplied at once, nearly equal ones."""
    side = rows.shape[1]
    return range(0, side, max(-(-side // max(side // PART, 1)), 1))


def _wide(*tensors: Tensor) -> torch.dtype:
    """The precision in which they are multiplied."""
    exact = any(t.dtype == torch.float64 or 0 < _largest(t) < FAINT for t in tensors)
    return torch.float64 if exact else torch.float32


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    least, most = tensor.aminmax()  # a copy of the magnitudes could be large
    return max(-float(least), float(most))


def _chunks(rows: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    return (chunk.to(dtype) for chunk in torch.split(rows, 8192))


def squared_error(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """‖(W − Ŵ)H^½‖² in float64; H (in, in) None stands for the identity."""
    difference = weight.detach().double() - approximation.detach().double()
    size = float(difference.square().sum())
    if gram is None:
        return size
    metric = gram.to(difference)
    error = float(((difference @ metric) * difference).sum())
    # Below the rounding of the sum, of either sign, only that bound is known.
    return max(error, torch.finfo(metric.dtype).eps * size * float(metric.diagonal().sum()))


def unit_of(tensor: Tensor) -> float:
    """The power of two at or below the largest magnitude, 1 if that is zero.

    Division by it is exact, and keeps squares of denormal numbers from underflowing.
    """
    most = _largest(tensor)
    return 2.0 ** math.floor(math.log2(most)) if 0 < most < math.inf else 1.0


def steady(gram: Tensor, ridge: float = 0.0) -> Tensor:
    """The metric in which factors are fitted to inputs of Gram matrix H (in, in).

    If H is singular, as of fewer rows than features, or with duplicate or dead ones, its rounding
    errors would decide where it has no energy, and a fit could grow there without bound: a ridge
    keeps it near the weight. Any other H is returned as it is, unless a ridge is given.
    Inputs that are zero leave everything open: the metric is the identity.

    Args:
        ridge: of the mean diagonal, at least; 0: only as much as a singular H needs.
    """
    size = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not float(size) > 0:
        return eye
    with full_precision(gram):
        least = ROUNDING * len(gram) ** 0.5
        if ridge <= least:
            singular = bool(torch.linalg.cholesky_ex(gram - least * size * eye).info)
            return gram + least * size * eye if singular else gram
        return gram + ridge * size * eye


def bounded_fit(
    weight: Tensor,
    gram: Tensor | None,
    fit: Callable[[Tensor | None], T],
    parts: Callable[[T], Iterable[Tensor]],
) -> T:
    """A fit in the metric of H, with as small a ridge as keeps all parts of the size of the weight.

    Few rows leave a fit free to trade large weights for a little error on these rows alone.

    Args:
        gram: H (in, in), or None for the identity.
        fit: from a metric (in, in) or None.
        parts: of a fit, in the unit of the weight.
    """
    if gram is None:
        return fit(None)
    limit = GROWTH * float(weight.abs().max())
    for ridge in RIDGES:
        found = fit(steady(gram / unit_of(gram.diagonal().mean()), ridge))
        if all(float(part.abs().max()) <= limit for part in parts(found) if part.numel()):
            break
    return found


def raised(matrix: Tensor, shift: Tensor | float) -> Tensor:
    """A copy of (…, k, k) with shifts, broadcast to (…, k), added to the diagonals."""
    copy = matrix.clone()
    copy.diagonal(dim1=-2, dim2=-1).add_(shift)
    return copy


def shifted_root(matrix: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of symmetric (…, k, k) plus shifts (…, 1) > 0 on the diagonals, and the
    shifts: ten times as large as often as rounding errors require.

    Raises:
        LowrankError: the matrix holds NaN or Inf.
    """
    while True:
        root = raised(
            matrix, shift
        ).mT  # symmetric; LAPACK's order, so that it is factored in place
        failed = torch.empty(root.shape[:-2], dtype=torch.int32, device=root.device)
        torch.linalg.cholesky_ex(root, out=(root, failed))
        again = (failed > 0)[..., None]
        if not bool(again.any()):
            return root, shift
        shift = torch.where(again, (shift * 10).clamp(min=torch.finfo(shift.dtype).tiny), shift)
        if not bool(shift.isfinite().all()):
            raise LowrankError(
                "a matrix to be factored holds NaN or Inf: check the weights and the data"
            )


def safe_root(normal: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """Cholesky factors of positive semi-definite (…, k, k), which may be singular or zero.

    Args:
        shift: added to each diagonal, on top of a ridge for rounding errors.
    """
    side = normal.diagonal(dim1=-2, dim2=-1)
    ridge = side.amax(-1, keepdim=True) * (8 * side.shape[-1] * torch.finfo(normal.dtype).eps)
    ridge = ridge.clamp(min=torch.finfo(normal.dtype).tiny ** 0.5) + shift
    return shifted_root(normal, ridge)[0]


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context that disables autocast on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)


DAMP = 0.1
FLOOR = 1e-11  # of the trace: above the rounding errors of a singular G
TINY = 1e-30  # for a zero G
# The last root, by id of G and damping, with G and its version when it was made.
_LAST: dict[tuple[int, float], tuple[weakref.ref[Tensor], int, Tensor]] = {}


def output_root(out_gram: Tensor, damp: float = DAMP) -> Tensor:
    """S (out, out) float64, upper triangular, with SᵀS = G + damp · mean(diag G) · I.

    The Cholesky factor, which is far cheaper than an eigendecomposition; S V has the singular
    values of G^½ V.

    The last one is kept while its G lives: a layer's factors, their error and the refits of all
    candidates follow each other. It must not be changed in place.

    Args:
        out_gram: G = E[g gᵀ] (out, out), symmetric positive semi-definite. If zero, or singular
            and undamped, it is floored: S is always invertible.
        damp: relative to the mean of the diagonal.
    """
    known = _LAST.get((id(out_gram), damp))
    if known is not None and known[0]() is out_gram and known[1] == out_gram._version:
        return known[2]
    with full_precision(out_gram):
        exact = out_gram.double()
        size = float(exact.diagonal().mean())
        least = size * len(exact) * FLOOR or TINY
        root = shifted_root(exact, exact.new_tensor([max(damp * size, least)]))[0].mT
    _LAST.clear()  # before the next one is kept
    ended = weakref.ref(out_gram, lambda _: _LAST.clear())
    _LAST[id(out_gram), damp] = (ended, out_gram._version, root)
    return root


def unrooted(root: Tensor, up: Tensor) -> Tensor:
    """S⁻¹ up (out, rank), by a triangular solve."""
    with full_precision(root):
        solved: Tensor = torch.linalg.solve_triangular(root.to(up), up, upper=True)
        return solved
