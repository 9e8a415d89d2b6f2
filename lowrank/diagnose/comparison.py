"""`compare`: what factoring did to each weight, beside a random choice and pruning of equal size.

The Frobenius error is an average over directions; the spectral error is that of the worst one, the
error of the singular values does not see directions, and the angle says whether the leading ones
were kept. Pruning keeps as many of the largest entries as the form stores numbers, and its indices
are not counted. Plain and pivoted factors are compared with
the weight projected on as many random directions, any other form with as many random entries of the
weight as it stores numbers. A method that is not clearly ahead of that has found nothing.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..nn import Form
from ..plans.plan import versions
from ..tables import aligned
from ..walk import layouts
from ..walk.checks import check_module, ordinary_tensors
from ..walk.parts import separate_parts
from ..walk.surgery import factored, modules_of

TOP = 8


@dataclass(frozen=True)
class Distance:
    """How far an approximation is from a weight.

    Attributes:
        frobenius: ‖W − Ŵ‖_F / ‖W‖_F.
        spectral: ‖W − Ŵ‖₂ / ‖W‖₂.
        values: ‖σ(W) − σ(Ŵ)‖ / ‖σ(W)‖, of the singular values.
        angle: degrees between the leading output directions.
    """

    frobenius: float
    spectral: float
    values: float
    angle: float


@dataclass(frozen=True)
class Compared:
    """One factored layer.

    Attributes:
        shape: (out, in).
        kept: share of the dense parameters.
        rank: if the form has one.
        top: number of leading directions that are compared, at most the rank of the approximation.
        distance: of the factored layer from the dense one; None if `reason` says why.
        random: of a random choice of the same size.
        pruned: of the largest entries of the weight, as many as the form stores numbers.
    """

    name: str
    shape: tuple[int, int]
    kept: float
    rank: int | None
    top: int = 0
    distance: Distance | None = None
    random: Distance | None = None
    pruned: Distance | None = None
    reason: str = ""

    def row(self) -> dict[str, str]:
        """A table row, as text."""
        figures: dict[str, str] = {}
        for of, d in (("", self.distance), ("random ", self.random), ("pruned ", self.pruned)):
            figures |= {
                f"{of}error": "" if d is None else f"{d.frobenius:.3f}",
                f"{of}spectral": "" if d is None else f"{d.spectral:.3f}",
                f"{of}values": "" if d is None else f"{d.values:.3f}",
                f"{of}angle°": "" if d is None else f"{d.angle:.1f}",
            }
        return {
            "site": self.name or "(root)",
            "shape": f"{self.shape[0]}x{self.shape[1]}",
            "rank": "" if self.rank is None else str(self.rank),
            "kept": f"{self.kept:.3f}",
            **figures,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Comparison:
    """The factored layers, in the model's order."""

    sites: tuple[Compared, ...]

    def rows(self) -> list[dict[str, str]]:
        """One row per layer, as text."""
        return [site.row() for site in self.sites]

    def to_json(self) -> str:
        """All figures."""
        body = {"format": "lowrank-comparison", "version": 1, "versions": versions(),
                "sites": [_figures(site) for site in self.sites]}  # fmt: skip
        return json.dumps(body, indent=1, allow_nan=False)

    def __getitem__(self, name: str) -> Compared:
        return next(site for site in self.sites if site.name == name)

    def __str__(self) -> str:
        head = (
            "factored layers beside the dense ones, beside a random choice of the same size, and "
            "pruned to as many numbers"
        )
        return "\n".join([head, *aligned(self.rows())])


@ordinary_tensors()
def compare(dense: nn.Module, small: nn.Module, *, top: int = TOP, seed: int = 0) -> Comparison:
    """Spectral error, and the angle of the leading directions, of every factored layer.

    Args:
        dense: the model before compression, which `copy=True` leaves as it was.
        small: the compressed one; both are unchanged.
        top: number of leading singular directions that the angle is of.
        seed: of the random choice.

    Raises:
        LowrankError: the second model has no factored layer, or `top` is below 1.
    """
    if top < 1:
        raise LowrankError(f"top must be at least 1, got {top}")
    check_module(dense)
    check_module(small)
    with separate_parts(dense), separate_parts(small):
        forms = factored(small)
        if not forms:
            raise LowrankError("the second model has no factored layer: pass the compressed one")
        before = dict(modules_of(dense))
        return Comparison(
            tuple(
                _compared(name, form, before.get(name), top, seed) for name, form in forms.items()
            )
        )


@torch.no_grad()
def _compared(name: str, form: Form, module: nn.Module | None, top: int, seed: int) -> Compared:
    approximation = form.dense_weight().detach()
    shape = (int(approximation.shape[0]), int(approximation.shape[1]))
    rank, stored = form.spec().get("rank"), form.cost().params
    rank = rank if isinstance(rank, int) else None
    plain = rank is not None and stored <= rank * sum(shape)  # and not a part of another sum
    kept = stored / approximation.numel()
    if module is None or layouts.kind(module) is None:
        reason = "the first model has no such layer"
        return Compared(name, shape, kept, rank, reason=reason)
    weight = layouts.matrix(module).detach()
    if weight.shape != approximation.shape:
        reason = f"the first model's is of shape {tuple(weight.shape)}"
        return Compared(name, shape, kept, rank, reason=reason)
    weight, approximation = weight.double(), approximation.to(weight.device).double()
    generator = torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
    other = random_choice(weight, rank if plain else None, stored, generator)
    values = linalg.energies(approximation)
    count = min(top, max(int((values > 1e-12 * values[0]).sum()), 1))
    pruned = weight * linalg.largest(min(max(stored, 1), weight.numel()))(weight.abs())
    own, random, largest = (
        _distance(weight, each, count) for each in (approximation, other, pruned)
    )
    return Compared(name, shape, kept, rank, count, own, random, largest)


def random_choice(
    weight: Tensor, rank: int | None, stored: int, generator: torch.Generator
) -> Tensor:
    """W projected on random output directions, `rank` of them; or `stored` random entries of W."""
    if rank is not None:
        draw = torch.randn(len(weight), rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(draw.to(weight)).Q
        return basis @ (basis.T @ weight)
    order = torch.randperm(weight.numel(), generator=generator)[: min(stored, weight.numel())]
    chosen = torch.zeros_like(weight).flatten()
    chosen[order.to(weight.device)] = weight.flatten()[order.to(weight.device)]
    return chosen.view_as(weight)


def _distance(weight: Tensor, approximation: Tensor, count: int) -> Distance:
    return Distance(
        linalg.relative_error(weight, approximation, torch.eye(weight.shape[1]).to(weight)),
        linalg.spectral_error(weight, approximation),
        linalg.spectrum_error(weight, approximation),
        linalg.subspace_angle(weight, approximation, count),
    )


def _figures(site: Compared) -> dict[str, Any]:
    def known(distance: Distance | None) -> dict[str, float | None] | None:
        if distance is None:
            return None
        return {k: v if math.isfinite(v) else None for k, v in vars(distance).items()}

    return {
        "site": site.name, "shape": list(site.shape), "kept": site.kept, "rank": site.rank,
        "top": site.top, "distance": known(site.distance), "random": known(site.random),
        "pruned": known(site.pruned), "reason": site.reason,
    }  # fmt: skip
