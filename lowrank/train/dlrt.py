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

from typing import Any

import torch
from torch import nn

from ..errors import LowrankError
from ..linalg import retract
from ..nn import USVLinear
from ..sites import ALL_LINEAR, Patterns
from . import usv
from .budget import Spectrum, check_reachable, ranks_for
from .common import Attachment, refuse_not_finite


class DLRT:
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
        self.tolerance, self.ratio = _checked(tolerance, ratio, every, min_rank, max_rank)
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
            check_reachable([site.shape for site in self._at.sites], ratio, min_rank)
        self._modules: dict[str, USVLinear] = {
            site.name: usv.enter(self._at, site, start, number)
            for number, site in enumerate(self._at.sites)
        }
        self._since = 0  # steps since the bases were enlarged
        self._arm(True)

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._at.history

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every adapted layer now."""
        return {name: module.rank for name, module in self._modules.items()}

    def rebind(self, optimizer: Any) -> None:
        """A trainer wrapped the optimizer by itself: see `Attachment.rebind`."""
        self._at.rebind(optimizer)

    @torch.no_grad()
    def before_step(self) -> None:
        """After backward and clipping: where a cycle begins, enlarge the bases.

        Raises:
            LowrankError: a gradient is not finite; nothing was changed.
        """
        if not self._at.acting() or not self._armed:
            return
        found = usv.gradients(self._modules)
        if self._at.scaled() and not all(g is None or g.isfinite().all() for g in found.values()):
            return  # the scaler will skip this step: the cycle begins with the next one
        refuse_not_finite(found)
        for name, module in self._modules.items():
            self._augment(name, module)
        self._since = 0
        self._arm(False)

    @torch.no_grad()
    def after_step(self) -> None:
        """After `optimizer.step()`: where a cycle ends, truncate.

        Raises:
            LowrankError: `before_step` was not called, or a core is not finite.
        """
        if not self._at.stepped():
            return
        if self._armed:
            raise LowrankError(
                f"{type(self).__name__}.before_step was not called: call it after backward() and "
                "before optimizer.step(), or the optimizer moves U and V off their manifold"
            )
        self._at.step += 1
        self._since += 1
        if self._since >= self.every:
            self._truncate()
            self._arm(True)

    def end_epoch(self) -> None:
        """Truncate now, so that the model is evaluated at its true ranks; a cycle begins anew."""
        if not self._armed:
            with torch.no_grad():
                self._truncate()
            self._arm(True)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Truncate a last time; the model with plain factored layers (dense where not larger).

        The optimizer then holds the new parameters. The controller is done.
        """
        if not self._armed:
            self._truncate()
        for name, module in self._modules.items():
            usv.leave(self._at, name, module)
        return self._close()

    @torch.no_grad()
    def detach(self) -> None:
        """Stop adapting: the layers stay U S Vᵀ, all three trained from now on by the optimizer."""
        if not self._armed:
            self._truncate()
        for module in self._modules.values():
            module.requires_grad_(True)
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """JSON. Load it before the model's and the optimizer's states: it sets their sizes."""
        return {
            "controller": type(self).__name__,
            "step": self._at.step,
            "since": self._since,
            "armed": self._armed,
            "sites": {name: list(m.s.shape) for name, m in self._modules.items()},
            "history": list(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the sizes and the place in the cycle of a checkpoint, before model and optimizer.

        Raises:
            LowrankError: it is of another controller, or of other sites.
        """
        self._at.check_state(state, self._modules)
        for name, (rank_out, rank_in) in state["sites"].items():
            usv.blank(self._at, self._modules[name], rank_out, rank_in)
        self._at.step, self._since = state["step"], state["since"]
        self.history[:] = state["history"]
        self._arm(state["armed"])

    def _arm(self, on: bool) -> None:
        """U and V need gradients only in the step that enlarges them."""
        self._armed = on
        for module in self._modules.values():
            for parameter in (module.up.weight, module.down.weight):
                parameter.requires_grad_(on)
                parameter.grad = None
        self._at.resized()

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
            *factors, left, right = retract.truncated(module.u, module.v, p, values, q, rank)
            usv.change(self._at, module, tuple(factors), (left, right))  # type: ignore[arg-type]
            whole = float(values.double().square().sum())
            lost = float(values[rank:].double().square().sum()) / whole if whole > 0 else 0.0
            measured = usv.measures(module, values[: module.rank])
            self._at.note("truncate", name, **measured, energy_lost=lost)

    def _close(self) -> nn.Module:
        self._armed = False
        self._modules = {}
        self._at.resized()
        self._at.release()
        return self._at.root


def _checked(
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
