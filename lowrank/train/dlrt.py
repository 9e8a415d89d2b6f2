"""DLRT: dynamical low-rank training, ranks found while training (arXiv 2205.13571).

W = U S Vᵀ with orthonormal U, V. Every `every` steps the bases grow by the directions in which the
gradient would leave them, Û = orth[U | −∂L/∂U], V̂ likewise, S padded by zeros, so that nothing
changes; S alone is then trained by the user's optimizer; at the end of the cycle the smallest
singular values of S go, as many as together stay below `tolerance` of all of it. This is the form
with one gradient per step of arXiv 2505.08022 (Alg. 1); all other parameters are trained as usual.
In the step in which bases grow, S rests, and a clipping by the norm of all gradients sees those of
U and V too.

Against the authors' code: V is turned by Q and not by Qᵀ, the whole tail of the singular values
counts, moments follow every change of basis, factors have their true sizes at all times (no buffers
of the largest rank), and a budget can stand beside the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg import retract
from ..nn import USVLinear
from ..walk.sites import ALL_LINEAR, Patterns
from .parts import usv
from .parts.attachment import Attachment, refuse_not_finite
from .parts.budget import Spectrum, check_reachable, ranks_for, stored
from .parts.cycle import Cycle


class DLRT(Cycle[USVLinear]):
    """Rank-adaptive training of linear layers, attached to the user's own loop.

    Attributes:
        history: one dict an event, with "step", "site", "event", ranks, and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        tolerance: float | None = None,
        ratio: float | None = None,
        every: int = 10,
        rank: int | float | None = None,
        min_rank: int = 2,
        max_rank: int | None = None,
        init: usv.Init = "svd",
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        seed: int = 0,
    ) -> None:
        """Replace the chosen layers by U S Vᵀ, in the model and in the optimizer.

        Args:
            model: built, and wrapped by DDP or `accelerate.prepare` where it will be.
            optimizer: with the model's parameters; its options go over to the factors.
            tolerance: relative, in [0, 1): what a truncation may lose of ‖S‖; 0.1 by default.
            ratio: keep at most this share of the numbers of the chosen weights, in (0, 1); beside
                a tolerance the stricter one decides.
            every: steps of a cycle, at least 2: one that enlarges the bases, the others train S.
            rank: at the start: int, or float for a share of energy; None is half of min(out, in).
            min_rank, max_rank: no truncation goes beyond these.
            init: "svd" of the weight, or "random".

        Raises:
            LowrankError: an option is out of range, nothing can be adapted, or what `Attachment`
                refuses; the model and the optimizer are as they were.
        """
        self.tolerance, self.ratio = checked(tolerance, ratio, every, min_rank, max_rank)
        self.every, self.min_rank, self.max_rank = every, min_rank, max_rank
        start = usv.Start(rank, init, seed)
        self._at = Attachment(
            model,
            optimizer,
            type(self).__name__,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )
        if ratio is not None:
            shapes = [site.shape for site in self._at.sites]
            smallest = sum(stored(shape, min(min_rank, *shape)) for shape in shapes)
            check_reachable(smallest, sum(map(math.prod, shapes)), ratio, min_rank)
        self._modules: dict[str, USVLinear] = {
            site.name: usv.enter(self._at, site, start, number)
            for number, site in enumerate(self._at.sites)
        }
        self._arm(True)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every adapted layer now."""
        return {name: module.rank for name, module in self._modules.items()}

    def _bases(self, module: USVLinear) -> list[tuple[str, Tensor]]:
        return [("up.weight", module.up.weight), ("down.weight", module.down.weight)]

    def _leave(self, name: str, module: USVLinear) -> None:
        usv.leave(self._at, name, module)

    def _sizes(self, module: USVLinear) -> Sequence[int]:
        return tuple(module.s.shape)

    def _blank(self, module: USVLinear, sizes: Sequence[int]) -> None:
        usv.blank(self._at, module, *sizes)

    def _augment(self, name: str, module: USVLinear) -> None:
        u, v = module.up.weight, module.down.weight
        if u.grad is None or v.grad is None:  # the layer was not used
            return
        more_u = retract.new_directions(u, u.grad)
        more_v = retract.new_directions(v.T, v.grad.T)
        more_u, more_v = usv.agreed([more_u.contiguous(), more_v.contiguous()])
        if more_u.shape[1] == 0 and more_v.shape[1] == 0:
            return  # the core keeps its gradient and takes this step
        wide_u = torch.cat([u.to(more_u), more_u], 1)
        wide_v = torch.cat([v.T.to(more_v), more_v], 1)
        left = torch.eye(wide_u.shape[1], u.shape[1]).to(wide_u)
        right = torch.eye(v.shape[0], wide_v.shape[1]).to(wide_v)
        core = left @ module.s.to(left) @ right.to(left)
        usv.change(self._at, module, (wide_u, core, wide_v), (left, right))
        self._at.note("augment", name, rank=module.rank, size=list(module.s.shape))

    def _truncate(self) -> None:
        refuse_not_finite({f"{n}.core.weight": m.s for n, m in self._modules.items()}, "the weight")
        found = {name: retract.core_svd(m.s) for name, m in self._modules.items()}
        spectra = [
            Spectrum((m.out_features, m.in_features), found[name][1].cpu())
            for name, m in self._modules.items()
        ]
        most = self.max_rank
        ranks = ranks_for(spectra, self.tolerance, self.ratio, self.min_rank, most)
        for (name, module), rank in zip(self._modules.items(), ranks, strict=True):
            p, values, q = found[name]
            *factors, left, right = retract.truncated_bases(module.u, module.v, p, values, q, rank)
            usv.change(self._at, module, tuple(factors), (left, right))  # type: ignore[arg-type]
            whole = float(values.double().square().sum())
            lost = float(values[rank:].double().square().sum()) / whole if whole > 0 else 0.0
            measured = usv.measures(module, values[: module.rank])
            self._at.note("truncate", name, **measured, energy_lost=lost)


def checked(
    tolerance: float | None, ratio: float | None, every: int, least: int, most: int | None
) -> tuple[float, float | None]:
    if tolerance is not None and not 0 <= tolerance < 1:
        raise LowrankError(
            f"tolerance must be in [0, 1), got {tolerance}: at 1 and above it truncates everything"
        )
    if ratio is not None and not 0 < ratio < 1:
        raise LowrankError(f"ratio is the share kept, in (0, 1), got {ratio}")
    if every < 2:
        raise LowrankError(
            f"every must be at least 2, got {every}: one step enlarges the bases, the others train"
        )
    if least < 1 or (most is not None and most < least):
        raise LowrankError(f"need 1 <= min_rank <= max_rank, got {least} and {most}")
    return (0.1 if ratio is None else 0.0) if tolerance is None else tolerance, ratio
