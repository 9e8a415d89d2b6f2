"""Tubal SVD of a convolution's weight (O, I, *kernel): low rank at every frequency of the kernel.

A tube is the K numbers between one input and one output. In an orthonormal basis of tubes, the
columns of M (K, K), the weight is K matrices S_f = Σ_k M_kf W_k (O, I), whose singular values
compete for one number of components (t-SVD: Kilmer and Martin, LAA 435, 2011; one threshold for all
frequencies: Kilmer et al., PNAS 2021). By the weight, ‖W − Ŵ‖, that is the optimum for the basis.
The basis is not Fourier's but that of cosines (DCT-II; Kernfeld, Kilmer and Aeron, LAA 485, 2015)
along each axis of the kernel: real, so that every component costs O + I numbers, where those of a
pair of conjugate frequencies cost 2 (O + I), and nearer to trained kernels
(`benchmarks/factorizers.py`).

By the outputs, ‖(W − Ŵ)H^½‖ with the Gram matrix H of the patches: neighbouring pixels resemble
each other alike everywhere, so that cosines nearly diagonalise H along its taps. Components are
chosen as if they did, each S_f in the metric of its own frequency; then the output side of all is
refitted in H itself, in closed form, and one Cholesky factor gives the errors of all numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import full_precision, shifted_root
from .svd import balance, carried, output_basis, tails

RIDGE = 1e-10  # of the mean diagonal of a metric


class Tubes(NamedTuple):
    """Components in the order of their energy, W ≈ Σ_r up[:, r] · down[r] · M[:, place[r]]."""

    up: Tensor  # (O, R), orthonormal within a frequency
    down: Tensor  # (R, I)
    place: Tensor  # (R,) int64, frequencies
    energy: Tensor  # (R,), descending


def cosines(
    kernel: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """M (K, K), orthonormal: row k are the values at tap k, column f is a frequency, the mean
    first. Computed on the device."""
    whole = torch.ones(1, 1, dtype=dtype, device=device)
    for size in kernel:
        place = torch.arange(size, dtype=dtype, device=device)
        waves = torch.cos((place[:, None] + 0.5) * place * (math.pi / size)) * (2 / size) ** 0.5
        waves = torch.where(place > 0, waves, size**-0.5)
        whole = (whole[:, None, :, None] * waves[:, None]).flatten(2).flatten(0, 1)
    return whole


def tubal_errors(weight: Tensor, gram: Tensor | None = None, most: int | None = None) -> Tensor:
    """Squared error of `tubal_factors` at every number of components 0…R, (R + 1,) float64.

    Args:
        weight: (O, I, *kernel).
        gram: H (I·K, I·K), of patches in the order of the weight's (I, K); None stands for the
            identity.
        most: R at most; of K · min(O, I).
    """
    tubes = _tubes(weight, gram)
    if gram is None:
        return tails(tubes.energy)[: None if most is None else most + 1]
    with full_precision(weight):
        flat, rows = weight.detach().double().flatten(1), _rows(_first(tubes, most), weight)
        moved = rows @ gram.to(flat)
        root = _root(moved @ rows.T)
        kept = torch.linalg.solve_triangular(root, moved @ flat.T, upper=False).square().sum(1)
        total = ((flat @ gram.to(flat)) * flat).sum()
        left = total - torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        return left.clamp(min=0)


def tubal_factors(
    weight: Tensor, count: int, gram: Tensor | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """up (O, R) and down (R, I) of R = `count` components, float64, balanced, ordered by
    frequency, and how many each of the K frequencies has.

    Args:
        weight, gram: as for `tubal_errors`.
        count: from 1 to K · min(O, I).
    """
    tubes = _first(_tubes(weight, gram), count)
    up = tubes.up
    if gram is not None:
        with full_precision(weight):
            rows = _rows(tubes, weight)
            moved = rows @ gram.to(rows)
            # From the present output side on, so that a component of no energy keeps it.
            lost = weight.detach().double().flatten(1) - up @ rows
            more = torch.cholesky_solve(moved @ lost.T, _root(moved @ rows.T))
            up = up + more.T
    up, down = balance(up, tubes.down)
    order = tubes.place.argsort(stable=True)
    taps = weight[0, 0].numel()
    return up[:, order], down[order], torch.bincount(tubes.place, minlength=taps).tolist()


def tubal_weight(up: Tensor, down: Tensor, ranks: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """The weight (…, O, I, K) of components up (…, O, R) and down (…, R, I), ordered by frequency,
    of which frequency f has ranks[f]."""
    lefts, rights = torch.split(up, list(ranks), -1), torch.split(down, list(ranks), -2)
    slices = [u @ v for u, v in zip(lefts, rights, strict=True) if u.shape[-1]]
    wide = torch.promote_types(up.dtype, torch.float32)
    basis = cosines(kernel, dtype=wide, device=up.device)
    present = [f for f, rank in enumerate(ranks) if rank]
    return torch.stack(slices, dim=-1) @ basis[:, present].T.to(up.dtype)


def _tubes(weight: Tensor, gram: Tensor | None) -> Tubes:
    """All K · min(O, I) components."""
    with full_precision(weight):
        whole = weight.detach().double().flatten(2)
        outputs, inputs, taps = whole.shape
        basis = cosines(weight.shape[2:], device=whole.device)
        slices = (whole @ basis).movedim(2, 0)  # (K, O, I)
        metrics = [None] * taps if gram is None else _of_frequencies(gram.to(whole), basis, inputs)
        found = [_of_slice(part, metric) for part, metric in zip(slices, metrics, strict=True)]
        ups, downs, energies = zip(*found, strict=True)
        order = torch.cat(energies).argsort(descending=True, stable=True)
        place = torch.arange(taps, device=whole.device).repeat_interleave(min(outputs, inputs))
        energy = torch.cat(energies)[order]
        return Tubes(torch.cat(ups, 1)[:, order], torch.cat(downs)[order], place[order], energy)


def _of_slice(part: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All components of one frequency, and their energies."""
    up = output_basis(part, min(part.shape), metric).double()
    down = up.T @ part
    energy = down.square().sum(1) if metric is None else carried(part, up, metric)
    return up, down, energy


def _of_frequencies(gram: Tensor, basis: Tensor, inputs: int) -> Tensor:
    """The diagonal blocks of H in the basis, (K, I, I)."""
    half = gram.view(-1, inputs, len(basis)) @ basis  # (I·K, I, K)
    blocks = torch.einsum("ikjf,kf->fij", half.view(inputs, -1, *half.shape[1:]), basis)
    return (blocks + blocks.mT) / 2


def _first(tubes: Tubes, count: int | None) -> Tubes:
    up, down, place, energy = tubes
    return Tubes(up[:, :count], down[:count], place[:count], energy[:count])


def _rows(tubes: Tubes, weight: Tensor) -> Tensor:
    """The input side with its taps, (R, I · K): the weight is `up` times it."""
    taps = cosines(weight.shape[2:], device=tubes.down.device).T[tubes.place]  # (R, K)
    return (tubes.down[:, :, None] * taps[:, None]).flatten(1)


def _root(metric: Tensor) -> Tensor:
    """A Cholesky factor, with a ridge as large as it needs."""
    even = (metric + metric.T) / 2
    return shifted_root(even, RIDGE * even.diagonal().mean(0, keepdim=True))[0]
