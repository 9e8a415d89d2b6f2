"""TDLRT: ranks of convolutions in Tucker form, found while training (arXiv 2305.19059).

A kernel is C = S ×₀ U₀ ×₁ U₁: 1×1, k×k and 1×1 convolutions whose outer two are orthonormal. The
cycle is that of DLRT, one basis per mode, Û_i = orth[U_i | −∂L/∂U_i]; then S alone is trained; then
every mode is cut by the singular values of its unfolding of S. A tolerance θ is for the whole
kernel, θ/√2 for each of two modes; beside a budget, θ is raised for all kernels alike until their
three convolutions are within it.

This is the form with one gradient that the authors use for convolutions in arXiv 2505.08022.
Against their code: the bias is added once, moments follow along all modes, the tolerance is shared
between the modes, and what has no such form (groups, other paddings, kernels of one pixel) stays
dense, with the reason in the history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg import modes, retract
from ..linalg.spectra import rank_for
from ..nn import TuckerConv
from ..types import Site
from ..walk.sites import ALL, Patterns
from .parts.attachment import refuse_not_finite, weights_of
from .parts.budget import check_ratio, least_tolerance, rank_at
from .parts.compressed import stored_like
from .parts.cycle import Cycle, check_options
from .parts.distributed import agreed
from .parts.optimizer import (
    along_modes,
    insert_parameters,
    replace_parameter,
    replace_weights,
)
from .parts.tucker_form import TuckerForm, conv_sites

Ranks = tuple[int, int]  # of the outputs, of the inputs


class TuckerDLRT(Cycle[TuckerForm]):
    """Rank-adaptive training of convolutions, attached to the user's own loop.

    Attributes:
        history: one dict per event; "rank" is (of the outputs, of the inputs).
    """

    TAKES = (TuckerConv,)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        tolerance: float | None = None,
        ratio: float | None = None,
        every: int = 10,
        rank: int | float | None = None,
        min_rank: int = 3,
        max_rank: int | None = None,
        target_modules: Patterns = ALL,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """Put the chosen convolutions into Tucker form, in the model and in the optimizer.

        Args:
            tolerance: relative, in [0, 1): what a truncation may lose of ‖S‖; 0.1 by default.
            ratio: keep at most this share of the numbers of the chosen weights, in (0, 1); beside
                a tolerance the stricter one decides.
            every: steps of a cycle, at least 2: one that enlarges the bases, the others train S.
            rank: of both modes at the start: int, float for a share of energy, None for half; of a
                `TuckerConv` at most the ranks that it has, which None keeps.
            min_rank, max_rank: of each mode; no truncation goes beyond these.

        Raises:
            LowrankError: as for DLRT; model and optimizer are unchanged then.
        """
        self.tolerance = check_options(tolerance, ratio, every, min_rank, max_rank)
        self.ratio, self.every, self.min_rank, self.max_rank = ratio, every, min_rank, max_rank
        if (isinstance(rank, float) and not 0 < rank <= 1) or (isinstance(rank, int) and rank < 1):
            raise LowrankError(f"rank must be an int >= 1 or a share in (0, 1], got {rank!r}")
        super().__init__(
            model, optimizer, target_modules, exclude_modules, kinds={"conv"}, find=conv_sites
        )
        for site in self.attachment.sites:
            self.layers[site.name] = self._as_tucker(site, rank)
        self.arm(True)

    @property
    def ranks(self) -> dict[str, Ranks]:
        """(of the outputs, of the inputs) of every adapted layer now."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def check_sites(self) -> None:
        kernels: list[torch.Size] = [site.module.weight.shape for site in self.attachment.sites]  # type: ignore[misc]
        self._whole = sum(map(math.prod, kernels))
        if self.ratio is not None:
            least = (self.min_rank, self.min_rank)
            smallest = sum(kernel_params(kernel, least) for kernel in kernels)
            check_ratio(smallest, self._whole, self.ratio, self.min_rank)

    def _as_tucker(self, site: Site, rank: int | float | None) -> TuckerForm:
        old: Any = site.module
        kernel = _kernel(old)
        held = old.ranks if isinstance(old, TuckerConv) else (None, None)
        sizes = [_first_rank(rank, kernel, mode, held[mode]) for mode in (0, 1)]
        (u0, u1), core = modes.hosvd(kernel, sizes)
        like = stored_like(old)
        u0, core, u1 = agreed([t.to(like).contiguous() for t in (u0, core, u1)])
        form = TuckerForm.of(old, u0, core, u1)
        carry = along_modes({0: u0.double().T, 1: u1.double().T})
        optimizer, bases = self.attachment.optimizer, [form.last.weight, form.first.weight]
        replace_weights(optimizer, weights_of(old), form.core.weight, carry)
        insert_parameters(optimizer, form.core.weight, bases)
        self.attachment.put(site, form)
        noted = {"rank": list(form.rank), "shape": list(kernel.shape)}
        lost = _energy_lost(kernel, core)
        self.attachment.note("attach", site.name, **noted, energy_lost=lost)
        return form

    def bases(self, layer: TuckerForm) -> list[tuple[str, Tensor]]:
        return [("last.weight", layer.last.weight), ("first.weight", layer.first.weight)]

    def grow(self, name: str, layer: TuckerForm) -> None:
        g0, g1 = layer.last.weight.grad, layer.first.weight.grad
        if g0 is None or g1 is None:  # the layer was not used
            return
        bases, gradients = (layer.u0, layer.u1), (g0.flatten(1), g1.flatten(1).T)
        more = [retract.new_directions(u, g) for u, g in zip(bases, gradients, strict=True)]
        more = agreed([m.contiguous() for m in more])
        if not any(m.shape[1] for m in more):
            return  # the core keeps its gradient and takes this step
        wide = [torch.cat([u.to(m), m], 1) for u, m in zip(bases, more, strict=True)]
        maps = [torch.eye(w.shape[1], u.shape[1]).to(w) for w, u in zip(wide, bases, strict=True)]
        core = modes.times(layer.core.weight.to(maps[0]), dict(enumerate(maps)))
        self._change(layer, wide, core, maps)
        self.attachment.note("augment", name, rank=list(layer.rank))

    def truncate(self) -> None:
        cores = {name: layer.core.weight.detach() for name, layer in self.layers.items()}
        refuse_not_finite({f"{n}.core.weight": core for n, core in cores.items()}, "the weight")
        parts = {n: [modes.mode_svd(core, mode) for mode in (0, 1)] for n, core in cores.items()}
        ranks = self._ranks({n: [values.cpu() for _, values in parts[n]] for n in parts})
        for name, layer in self.layers.items():
            bases, vectors = (layer.u0, layer.u1), [p for p, _ in parts[name]]
            fresh, core, maps = modes.truncated_modes(bases, cores[name], vectors, ranks[name])
            self._change(layer, fresh, core, maps)
            worst = max(map(retract.loss_of_orthonormality, (layer.u0, layer.u1)))
            measured = {"orthonormality": worst, "energy_lost": _energy_lost(cores[name], core)}
            self.attachment.note("truncate", name, rank=list(layer.rank), **measured)

    def _ranks(self, values: Mapping[str, Sequence[Tensor]]) -> dict[str, Ranks]:
        """Of singular values (k,) of both modes of every core."""

        def ranks_within(theta: float) -> dict[str, Ranks]:
            rank = partial(rank_at, tolerance=theta, least=self.min_rank, most=self.max_rank)
            return {name: (rank(both[0]), rank(both[1])) for name, both in values.items()}

        def size(theta: float) -> int:
            shapes = {name: layer.kernel_shape for name, layer in self.layers.items()}
            return sum(kernel_params(shapes[n], r) for n, r in ranks_within(theta).items())

        limit = math.inf if self.ratio is None else self.ratio * self._whole
        return ranks_within(least_tolerance(size, self.tolerance / math.sqrt(2), limit))

    def _change(
        self, layer: TuckerForm, bases: Sequence[Tensor], core: Tensor, maps: Sequence[Tensor]
    ) -> None:
        """New factors in model and optimizer; the core's state follows along both modes."""
        dtype, optimizer = layer.core.weight.dtype, self.attachment.optimizer
        u0, u1, core, *turns = agreed([t.contiguous() for t in (*bases, core, *maps)])
        old = [layer.core.weight, layer.last.weight, layer.first.weight]
        layer.set_factors(u0.to(dtype), core.to(dtype), u1.to(dtype))
        carry = along_modes(dict(enumerate(turns)))
        replace_parameter(optimizer, old[0], layer.core.weight, carry)
        replace_parameter(optimizer, old[1], layer.last.weight)
        replace_parameter(optimizer, old[2], layer.first.weight)

    def leave(self, name: str, layer: TuckerForm) -> None:
        """The three convolutions, or the plain one where they are not smaller."""
        weights = [layer.core.weight, layer.last.weight, layer.first.weight]
        dense = layer.cost().params >= math.prod(layer.kernel_shape)
        if dense:
            new: Any = layer.dense()
            replace_parameter(self.attachment.optimizer, weights[0], new.weight)
            for weight in weights[1:]:
                replace_parameter(self.attachment.optimizer, weight, [])
        else:
            for weight in weights:
                weight.requires_grad_(True)
            new = TuckerConv.of_children(layer.first, layer.core, layer.last)
        self.attachment.set(name, new)
        storage = "dense" if dense else "factors"
        self.attachment.note("finish", name, rank=list(layer.rank), storage=storage)

    def size_of(self, layer: TuckerForm) -> list[int]:
        return list(layer.rank)

    def resize(self, site: Site, size: Sequence[int]) -> None:
        layer, (a, b) = self.layers[site.name], size
        like, old = layer.core.weight, layer.rank
        bases = [like.new_zeros(len(u), rank) for u, rank in ((layer.u0, a), (layer.u1, b))]
        maps = [like.new_zeros(new, was) for new, was in zip(size, old, strict=True)]
        self._change(layer, bases, like.new_zeros(a, b, *like.shape[2:]), maps)


def kernel_params(kernel: Sequence[int], ranks: Ranks) -> int:
    """Numbers that a kernel (out, in, k, …) takes at these ranks, each at most its mode's size:
    those of three convolutions, or of the dense one where that is less."""
    (out, into, *window), whole = kernel, math.prod(kernel)
    a, b = min(ranks[0], out), min(ranks[1], into)
    return min(out * a + into * b + a * b * math.prod(window), whole)


def _energy_lost(before: Tensor, core: Tensor) -> float:
    """The share of a tensor's energy that the core of its truncation does not have."""
    whole, kept = float(before.double().square().sum()), float(core.double().square().sum())
    return max(1 - kept / whole, 0.0) if whole > 0 else 0.0


def _kernel(layer: nn.Module) -> Tensor:
    """(out, in, k, …) of a convolution; float64 where it is a product."""
    if isinstance(layer, TuckerConv):
        return layer.dense_weight(torch.float64).detach().view(layer.geometry.weight_shape)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach()


def _first_rank(
    rank: int | float | None, kernel: Tensor, mode: int, held: int | None = None
) -> int:
    if rank is None:
        return max(kernel.shape[mode] // 2, 1) if held is None else held
    _, values = modes.mode_svd(kernel, mode)
    wanted = max(rank_for(rank, values.square()), 1) if isinstance(rank, float) else rank
    return min(wanted, len(values), *(() if held is None else (held,)))
