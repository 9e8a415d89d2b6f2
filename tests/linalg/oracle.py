"""What the decompositions are held against: NumPy in float64, by routes of its own."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}
SPECTRA = {
    "k^-0.5": lambda k: np.arange(1, k + 1) ** -0.5,
    "k^-2": lambda k: np.arange(1, k + 1) ** -2.0,
    "exponential": lambda k: np.exp(-np.arange(k) / 2),
    "planted": lambda k: np.where(np.arange(k) < 5, 3.0 - 0.5 * np.arange(k), 0.0),
}


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def with_spectrum(spectrum: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A float64 weight (out, in) with these singular values and random bases."""
    rng, k = np.random.default_rng(seed), min(shape)
    left, right = orthonormal(shape[0], k, rng), orthonormal(shape[1], k, rng)
    return torch.from_numpy(left * SPECTRA[spectrum](k) @ right.T)


def grams(size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Second moments as calibrations give them, good and bad."""
    rng = np.random.default_rng(seed)
    basis = orthonormal(size, size, rng)
    dead = rng.standard_normal((3 * size, size))
    dead[:, ::4] = 0
    few = rng.standard_normal((size // 3, size))
    found = {
        "identity": np.eye(size),
        "good": basis * np.linspace(1, 3, size) @ basis.T,
        "condition 1e14": basis * np.logspace(0, -14, size) @ basis.T,
        "dead inputs": dead.T @ dead / len(dead),
        "few tokens": few.T @ few / len(few),
        "rank one": np.outer(basis[0], basis[0]),
        "zero": np.zeros((size, size)),
        "one outlier": np.diag(np.where(np.arange(size) == 2, 1e6, 1e-3)),
    }
    return {name: torch.from_numpy((gram + gram.T) / 2) for name, gram in found.items()}


def root(gram: torch.Tensor | None, size: int) -> Matrix:
    """A square root S, S Sᵀ = H; the singular values of W S are those of W H^½."""
    if gram is None:
        return np.eye(size)
    values, vectors = np.linalg.eigh(gram.numpy())
    return vectors * np.sqrt(values.clip(min=0))


def excess(
    weight: torch.Tensor, approximation: torch.Tensor, rank: int, gram: torch.Tensor | None = None
) -> float:
    """(error − optimum) / total, squared, in the norm ‖· H^½‖; 0 where everything is 0."""
    scale = root(gram, weight.shape[1])
    exact = weight.double().numpy()
    optimum = (np.linalg.svd(exact @ scale, compute_uv=False)[rank:] ** 2).sum()
    error = (((exact - approximation.double().numpy()) @ scale) ** 2).sum()
    total = ((exact @ scale) ** 2).sum()
    return float((error - optimum) / total) if total > 0 else float(error - optimum)
