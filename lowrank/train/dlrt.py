"""DLRT: dynamical low-rank training, ranks found while training (arXiv 2205.13571).

W = U S Vᵀ with orthonormal U, V. Every `every` steps the bases grow by the directions in which the
gradient would leave them, Û = orth[U | −∂L/∂U], V̂ likewise, S padded by zeros, so that nothing
changes; S alone is then trained by the user's optimizer; at the end of the cycle the smallest
singular values of S are cut, as many as stay below `tolerance` of ‖S‖ together. This is the form
with one gradient per step of arXiv 2505.08022 (Alg. 1); all other parameters are trained as usual.
In the step in which bases grow, S rests, and clipping by the norm of all gradients sees those of U
and V too.

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

from ..linalg import retract
from ..nn import USVLinear
from ..types import Site
from ..walk.sites import ALL_LINEAR, Patterns
from .parts import usv
from .parts.attachment import refuse_not_finite
from .parts.budget import CoreValues, check_ratio, matrix_params, ranks_for
from .parts.compressed import PLAIN
from .parts.cycle import Cycle, check_options
from .parts.distributed import agreed


class DLRT(Cycle[USVLinear]):
    """Rank-adaptive training of linear layers, attached to the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", ranks, and what was measured.
    """

    TAKES = PLAIN

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
            ratio: keep at most this share of the numbers that the chosen weights have, or would
                have dense, in (0, 1); beside a tolerance the stricter one decides.
            every: steps of a cycle, at least 2: one that enlarges the bases, the others train S.
            rank: at the start: int, or float for a share of energy; None is half of min(out, in),
                and of a layer that is factored already the rank that it has.
            min_rank, max_rank: no truncation goes beyond these.
            init: "svd" of the weight, or "random".

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        self.tolerance = check_options(tolerance, ratio, every, min_rank, max_rank)
        self.ratio, self.every, self.min_rank, self.max_rank = ratio, every, min_rank, max_rank
        start = usv.Start(rank, init, seed)
        super().__init__(model, optimizer, target_modules, exclude_modules)
        for number, site in enumerate(self.attachment.sites):
            self.layers[site.name] = usv.as_usv(self.attachment, site, start, number)
        self.arm(True)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every adapted layer now."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def check_sites(self) -> None:
        if self.ratio is not None:
            shapes, least = [site.shape for site in self.attachment.sites], self.min_rank
            smallest = sum(matrix_params(shape, min(least, *shape)) for shape in shapes)
            check_ratio(smallest, sum(map(math.prod, shapes)), self.ratio, least)

    def bases(self, layer: USVLinear) -> list[tuple[str, Tensor]]:
        return [("up.weight", layer.up.weight), ("down.weight", layer.down.weight)]

    def leave(self, name: str, layer: USVLinear) -> None:
        usv.as_factors(self.attachment, name, layer)

    def size_of(self, layer: USVLinear) -> list[int]:
        return list(layer.s.shape)

    def resize(self, site: Site, size: Sequence[int]) -> None:
        usv.resize_usv(self.attachment, self.layers[site.name], *size)

    def grow(self, name: str, layer: USVLinear) -> None:
        u, v = layer.up.weight, layer.down.weight
        if u.grad is None or v.grad is None:  # the layer was not used
            return
        more_u = retract.new_directions(u, u.grad)
        more_v = retract.new_directions(v.T, v.grad.T)
        more_u, more_v = agreed([more_u.contiguous(), more_v.contiguous()])
        if more_u.shape[1] == 0 and more_v.shape[1] == 0:
            return  # the core keeps its gradient and takes this step
        wide_u = torch.cat([u.to(more_u), more_u], 1)
        wide_v = torch.cat([v.T.to(more_v), more_v], 1)
        left = torch.eye(wide_u.shape[1], u.shape[1]).to(wide_u)
        right = torch.eye(v.shape[0], wide_v.shape[1]).to(wide_v)
        core = left @ layer.s.to(left) @ right.to(left)
        usv.change_factors(self.attachment, layer, (wide_u, core, wide_v), (left, right))
        size = list(layer.s.shape)
        self.attachment.note("augment", name, rank=layer.rank, size=size)

    def truncate(self) -> None:
        weights = {f"{name}.core.weight": layer.s for name, layer in self.layers.items()}
        refuse_not_finite(weights, "the weight")
        parts = {name: retract.core_svd(layer.s) for name, layer in self.layers.items()}
        cores = [
            CoreValues((layer.out_features, layer.in_features), parts[name][1].cpu())
            for name, layer in self.layers.items()
        ]
        ranks = ranks_for(cores, self.tolerance, self.ratio, self.min_rank, self.max_rank)
        for (name, layer), rank in zip(self.layers.items(), ranks, strict=True):
            p, values, q = parts[name]
            usv.truncate_usv(self.attachment, layer, p, values[:rank], q)
            measured = usv.measures(layer, values, values[:rank])
            self.attachment.note("truncate", name, **measured)
