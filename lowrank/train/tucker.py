"""TDLRT: ranks of convolutions in Tucker form, found while training (arXiv 2305.19059).

A kernel is C = S ×₀ U₀ ×₁ U₁: 1×1, k×k and 1×1 convolutions whose outer two are orthonormal. The
cycle is that of DLRT, one basis per mode, Û_i = orth[U_i | −∂L/∂U_i]; then S alone is trained; then
every mode is cut by the singular values of its unfolding of S. A tolerance θ is for the whole
kernel, θ/√2 for each of two modes; where a budget stands beside it, θ is raised for all kernels
alike until their three convolutions are within it.

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
from ..types import Cost, Site
from ..walk.sites import ALL, Patterns
from .dlrt import checked
from .parts.attachment import Attachment, refuse_not_finite
from .parts.budget import check_reachable, least_tolerance, rank_at
from .parts.cycle import Cycle
from .parts.distributed import agreed
from .parts.optimizer import along, insert, replace
from .parts.tucker_form import CONVS, TuckerForm

KIND = "conv"
Ranks = tuple[int, int]  # of the outputs, of the inputs


def conv_sites(model: nn.Module) -> list[Site]:
    """Every convolution of the model, with the reason where it has no Tucker form."""
    names: dict[int, list[str]] = {}
    found: dict[int, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, tuple(CONVS.values())):
            found[id(module)] = module
            names.setdefault(id(module), []).append(name)
    return [_site(names[key], module) for key, module in found.items()]


class TuckerDLRT(Cycle[TuckerForm]):
    """Rank-adaptive training of convolutions, attached to the user's own loop.

    Attributes:
        history: one dict an event; "rank" is (of the outputs, of the inputs).
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
            rank: of both modes at the start: int, float for a share of energy, None for half.
            min_rank, max_rank: of each mode; no truncation goes beyond these.

        Raises:
            LowrankError: as for DLRT; the model and the optimizer are as they were.
        """
        self.tolerance, self.ratio = checked(tolerance, ratio, every, min_rank, max_rank)
        self.every, self.min_rank, self.max_rank = every, min_rank, max_rank
        if (isinstance(rank, float) and not 0 < rank <= 1) or (isinstance(rank, int) and rank < 1):
            raise LowrankError(f"rank must be an int >= 1 or a share in (0, 1], got {rank!r}")
        self._at = Attachment(
            model,
            optimizer,
            type(self).__name__,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            kinds={KIND},
            find=conv_sites,
        )
        kernels: list[Tensor] = [site.module.weight for site in self._at.sites]  # type: ignore[misc]
        self._whole = sum(kernel.numel() for kernel in kernels)
        if ratio is not None:
            smallest = sum(stored(kernel.shape, (min_rank, min_rank)) for kernel in kernels)
            check_reachable(smallest, self._whole, ratio, min_rank)
        self._modules = {site.name: self._enter(site, rank) for site in self._at.sites}
        self._arm(True)

    @property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """(of the outputs, of the inputs) of every adapted layer now."""
        return {name: module.rank for name, module in self._modules.items()}

    def _enter(self, site: Site, rank: int | float | None) -> TuckerForm:
        dense: Any = site.module
        kernel = dense.weight.detach()
        sizes = [_start(rank, kernel, mode) for mode in (0, 1)]
        (u0, u1), core = modes.hosvd(kernel, sizes)
        u0, core, u1 = agreed([t.to(kernel).contiguous() for t in (u0, core, u1)])
        form = TuckerForm.of(dense, u0, core, u1)
        carry = along({0: u0.double().T, 1: u1.double().T})
        replace(self._at.optimizer, dense.weight, form.core.weight, carry)
        insert(self._at.optimizer, form.core.weight, [form.last.weight, form.first.weight])
        self._at.put(site, form)
        whole, kept = float(kernel.double().square().sum()), float(core.double().square().sum())
        lost = max(1 - kept / whole, 0.0) if whole > 0 else 0.0
        noted = {"rank": list(form.rank), "shape": list(kernel.shape), "energy_lost": lost}
        self._at.note("attach", site.name, **noted)
        return form

    def _bases(self, module: TuckerForm) -> list[tuple[str, Tensor]]:
        return [("last.weight", module.last.weight), ("first.weight", module.first.weight)]

    def _augment(self, name: str, module: TuckerForm) -> None:
        g0, g1 = module.last.weight.grad, module.first.weight.grad
        if g0 is None or g1 is None:  # the layer was not used
            return
        bases, gradients = (module.u0, module.u1), (g0.flatten(1), g1.flatten(1).T)
        more = [retract.new_directions(u, g) for u, g in zip(bases, gradients, strict=True)]
        more = agreed([m.contiguous() for m in more])
        if not any(m.shape[1] for m in more):
            return  # the core keeps its gradient and takes this step
        wide = [torch.cat([u.to(m), m], 1) for u, m in zip(bases, more, strict=True)]
        maps = [torch.eye(w.shape[1], u.shape[1]).to(w) for w, u in zip(wide, bases, strict=True)]
        self._change(
            module, wide, modes.times(module.core.weight.to(maps[0]), dict(enumerate(maps))), maps
        )
        self._at.note("augment", name, rank=list(module.rank))

    def _truncate(self) -> None:
        cores = {f"{n}.core.weight": m.core.weight for n, m in self._modules.items()}
        refuse_not_finite(cores, "the weight")
        cuts = {
            name: [modes.mode_svd(m.core.weight.detach(), mode) for mode in (0, 1)]
            for name, m in self._modules.items()
        }
        ranks = self._ranks({name: [values.cpu() for _, values in cuts[name]] for name in cuts})
        for name, module in self._modules.items():
            core, bases = module.core.weight.detach(), (module.u0, module.u1)
            vectors = [p for p, _ in cuts[name]]
            fresh, small, maps = modes.truncated(bases, core, vectors, ranks[name])
            whole, kept = float(core.double().square().sum()), float(small.double().square().sum())
            self._change(module, fresh, small, maps)
            worst = max(map(retract.loss_of_orthonormality, (module.u0, module.u1)))
            lost = max(1 - kept / whole, 0.0) if whole > 0 else 0.0
            measured = {"orthonormality": worst, "energy_lost": lost}
            self._at.note("truncate", name, rank=list(module.rank), **measured)

    def _ranks(self, values: Mapping[str, Sequence[Tensor]]) -> dict[str, Ranks]:
        """Of singular values (k,) of both modes of every core."""

        def at(theta: float) -> dict[str, Ranks]:
            rank = partial(rank_at, tolerance=theta, least=self.min_rank, most=self.max_rank)
            return {name: (rank(both[0]), rank(both[1])) for name, both in values.items()}

        def size(theta: float) -> int:
            found = at(theta)
            return sum(stored(m.kernel_shape, found[name]) for name, m in self._modules.items())

        limit = math.inf if self.ratio is None else self.ratio * self._whole
        return at(least_tolerance(size, self.tolerance / math.sqrt(2), limit))

    def _change(
        self, module: TuckerForm, bases: Sequence[Tensor], core: Tensor, maps: Sequence[Tensor]
    ) -> None:
        dtype = module.core.weight.dtype
        u0, u1, core, *turns = agreed([t.contiguous() for t in (*bases, core, *maps)])
        old = [module.core.weight, module.last.weight, module.first.weight]
        module.set_factors(u0.to(dtype), core.to(dtype), u1.to(dtype))
        replace(self._at.optimizer, old[0], module.core.weight, along(dict(enumerate(turns))))
        replace(self._at.optimizer, old[1], module.last.weight)
        replace(self._at.optimizer, old[2], module.first.weight)

    def _leave(self, name: str, module: TuckerForm) -> None:
        """The three convolutions, or the plain one where they are not smaller."""
        weights = [module.core.weight, module.last.weight, module.first.weight]
        storage = "factors" if module.cost().params < math.prod(module.kernel_shape) else "dense"
        if storage == "dense":
            new: Any = module.dense()
            replace(self._at.optimizer, weights[0], new.weight)
            replace(self._at.optimizer, weights[1], [])
            replace(self._at.optimizer, weights[2], [])
            self._at.set(name, new)
        else:
            for weight in weights:
                weight.requires_grad_(True)
            self._at.set(name, TuckerConv.of_children(module.first, module.core, module.last))
        self._at.note("finish", name, rank=list(module.rank), storage=storage)

    def _sizes(self, module: TuckerForm) -> Sequence[int]:
        return module.rank

    def _blank(self, module: TuckerForm, sizes: Sequence[int]) -> None:
        a, b = sizes
        like, old = module.core.weight, module.rank
        bases = [like.new_zeros(len(u), r) for u, r in ((module.u0, a), (module.u1, b))]
        maps = [like.new_zeros(new, was) for new, was in zip(sizes, old, strict=True)]
        self._change(module, bases, like.new_zeros(a, b, *like.shape[2:]), maps)


def stored(kernel: Sequence[int], ranks: Ranks) -> int:
    """Numbers that a kernel (out, in, k, …) takes at these ranks, each at most its mode's size:
    those of three convolutions, or of the dense one where that is less."""
    (out, into, *window), whole = kernel, math.prod(kernel)
    a, b = min(ranks[0], out), min(ranks[1], into)
    return min(out * a + into * b + a * b * math.prod(window), whole)


def _start(rank: int | float | None, kernel: Tensor, mode: int) -> int:
    size = kernel.shape[mode]
    if rank is None:
        return max(size // 2, 1)
    _, values = modes.mode_svd(kernel, mode)
    wanted = max(rank_for(rank, values.square()), 1) if isinstance(rank, float) else rank
    return min(wanted, len(values))


def _site(names: Sequence[str], module: Any) -> Site:
    weight = module.weight
    size = weight.numel()
    cost = Cost(size, size * weight.dtype.itemsize, size)
    shape = (weight.shape[0], size // weight.shape[0])
    return Site(names[0], tuple(names), KIND, (module,), shape, cost, _obstacle(module))


def _obstacle(module: Any) -> str:
    if type(module) not in CONVS.values():
        return f"{type(module).__name__} is a subclass and may compute something else"
    if "weight" not in module._parameters:
        return "its weight is not a plain parameter"
    if module.groups != 1:
        return f"it has {module.groups} groups"
    if module.padding_mode != "zeros":
        return f"it pads by {module.padding_mode!r}, which a 1×1 before it would not see alike"
    if math.prod(module.kernel_size) == 1:
        return "its kernel is one pixel: a matrix"
    return ""
