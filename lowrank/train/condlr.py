"""CondLR: low-rank training with a bounded condition number (arXiv 2306.01485).

W = U S Vᵀ. The gradients of U and V are projected on the tangent space of their Stiefel manifolds,
(I − UUᵀ)G, and scaled; the user's optimizer steps; U and V are retracted by a QR with positive
diagonal, and the singular values of S are moved into [μ − e, μ + e], e = μ(τ − 1)/(τ + 1), μ their
mean. So the condition number of W is at most τ after every step.

Exact low-rank dynamics would scale by (S Sᵀ)⁻¹, which a small singular value makes unstable; the
authors replace it by the number (σ_r/σ_1)², option "bound". Against their code: (I − UUᵀ) is never
formed as a matrix, τ < 1 is an error (there it silently sets S to zero), layers are replaced where
they are (there residual connections are lost), and momentum is projected again after each
retraction. A clamp lifts small singular values: with a tolerance they are truncated before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LowrankError, unknown
from ..linalg import retract
from ..nn import USVLinear
from ..walk.sites import ALL_LINEAR, Patterns
from .parts import usv
from .parts.attachment import Attachment, refuse_not_finite
from .parts.distributed import agreed
from .parts.optimizer import linear_state

Scaling = Literal["bound", "exact", "none"]


def _bound(gradient: Tensor, core: Tensor) -> Tensor:
    values = torch.linalg.svdvals(core)
    return gradient * (values[-1] / values[0]).square() if values[0] > 0 else gradient


def _exact(gradient: Tensor, core: Tensor) -> Tensor:
    """G (S Sᵀ)⁻¹, of a core that is square and not singular."""
    return torch.linalg.solve(core @ core.T, gradient.T).T


SCALINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bound": _bound,
    "exact": _exact,
    "none": lambda gradient, core: gradient,
}


class CondLR:
    """Training at a bounded condition number, attached to the user's own loop.

    Attributes:
        history: one dict an event, with "step", "site", "event", rank, condition, orthonormality.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        tau: float = 1.5,
        rank: int | float | None = None,
        tolerance: float | None = None,
        every: int = 100,
        scaling: Scaling = "bound",
        init: usv.Init = "svd",
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        seed: int = 0,
    ) -> None:
        """Replace the chosen layers by U S Vᵀ of condition at most τ.

        Args:
            tau: τ ≥ 1; math.inf switches the clamp off (Riemannian gradient descent).
            rank: int, or float for a share of energy; None is half of min(out, in).
            tolerance: relative, in [0, 1): every `every` steps, before the clamp, a tail of S that
                carries less of its norm is cut. Ranks only fall. None: they are fixed.
            every: steps between truncations, and between lines of the history.
            scaling: of the projected gradients: "bound", "exact" or "none" (see above).

        Raises:
            LowrankError: an option is out of range, nothing can be adapted, or what `Attachment`
                refuses; the model and the optimizer are as they were.
        """
        if not tau >= 1:
            raise LowrankError(f"tau bounds a condition number and must be >= 1, got {tau}")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise LowrankError(f"tolerance must be in [0, 1), got {tolerance}")
        if every < 1:
            raise LowrankError(f"every must be at least 1, got {every}")
        if scaling not in SCALINGS:
            raise unknown("scaling", scaling, SCALINGS)
        self.tau, self.tolerance, self.every, self.scaling = tau, tolerance, every, scaling
        start = usv.Start(rank, init, seed)
        self._at = Attachment(
            model,
            optimizer,
            type(self).__name__,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )
        self._modules: dict[str, USVLinear] = {
            site.name: usv.enter(self._at, site, start, number)
            for number, site in enumerate(self._at.sites)
        }
        with torch.no_grad():
            self._bound_all(truncate=tolerance is not None)
        self._at.resized()
        self._ready = False

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
        """After backward and clipping: project and scale the gradients of U and V.

        Raises:
            LowrankError: a gradient is not finite; nothing was changed.
        """
        if not self._at.acting():
            return
        found = usv.gradients(self._modules)
        finite = all(g is None or bool(g.isfinite().all()) for g in found.values())
        self._ready = True
        if self._at.scaled() and not finite:
            return  # the scaler will skip this step
        if not finite:
            refuse_not_finite(found)
        for module in self._modules.values():
            core = module.s.double()
            for weight, basis, s in _sides(module, core):
                if weight.grad is not None:
                    turned = _as_basis(weight, module, weight.grad)
                    step = SCALINGS[self.scaling](retract.tangent(basis, turned), s)
                    weight.grad.copy_(_as_basis(weight, module, step))

    @torch.no_grad()
    def after_step(self) -> None:
        """After `optimizer.step()`: retract U and V, bound the condition of S.

        Raises:
            LowrankError: `before_step` was not called, or a factor is not finite.
        """
        if not self._at.stepped():
            return
        if not self._ready:
            raise LowrankError(
                "CondLR.before_step was not called: call it after backward() and before "
                "optimizer.step(), or U and V take a step that is not tangent"
            )
        self._ready = False
        self._at.step += 1
        due = self._at.step % self.every == 0
        for name, module in self._modules.items():
            factors = {n: p for n, p in module.named_parameters() if not n.endswith("bias")}
            refuse_not_finite({f"{name}.{n}": p for n, p in factors.items()}, "the weight")
        for module in self._modules.values():
            for weight, basis, _ in _sides(module, module.s):
                new = agreed([retract.orthonormal(basis)])[0]
                weight.copy_(_as_basis(weight, module, new))
                for buffer in linear_state(self._at.optimizer, weight).values():
                    flat = retract.tangent(new, _as_basis(weight, module, buffer))
                    buffer.copy_(_as_basis(weight, module, flat))
        shrunk = self._bound_all(truncate=due and self.tolerance is not None, note=due)
        if shrunk:
            self._at.resized()

    def end_epoch(self) -> None:
        """Nothing: the bound holds after every step."""

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The model with plain factored layers (dense where not larger); the controller is done."""
        for name, module in self._modules.items():
            usv.leave(self._at, name, module)
        return self._close()

    @torch.no_grad()
    def detach(self) -> None:
        """Stop bounding: the layers stay U S Vᵀ, and the optimizer trains all three freely."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """JSON. Load it before the model's and the optimizer's states: it sets their sizes."""
        return {
            "controller": "CondLR",
            "step": self._at.step,
            "sites": {name: list(m.s.shape) for name, m in self._modules.items()},
            "history": list(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the sizes of a checkpoint, before model and optimizer.

        Raises:
            LowrankError: it is of another controller, or of other sites.
        """
        self._at.check_state(state, self._modules)
        for name, sizes in state["sites"].items():
            usv.blank(self._at, self._modules[name], *sizes)
        self._at.step = state["step"]
        self.history[:] = state["history"]
        self._at.resized()

    def _bound_all(self, *, truncate: bool, note: bool = True) -> bool:
        """Truncate where asked, then clamp; whether a rank has changed."""
        shrunk = False
        for name, module in self._modules.items():
            p, values, q = retract.core_svd(module.s)
            rank = (
                max(retract.tail_rank(values, self.tolerance or 0.0), 1)
                if truncate
                else len(values)
            )
            kept = (
                values[:rank] if math.isinf(self.tau) else retract.clamped(values[:rank], self.tau)
            )
            if rank < len(values):
                *factors, left, right = retract.truncated_bases(
                    module.u, module.v, p, kept, q, rank
                )
                usv.change(self._at, module, tuple(factors), (left, right))  # type: ignore[arg-type]
                shrunk = True
            elif not torch.equal(kept, values):
                core = agreed([p * kept @ q.T])[0]
                module.s.copy_(core)
            if note:
                whole = float(values.square().sum())
                lost = float(values[rank:].square().sum()) / whole if whole > 0 else 0.0
                self._at.note("bound", name, **usv.measures(module, kept), energy_lost=lost)
        return shrunk

    def _close(self) -> nn.Module:
        self._modules = {}
        self._at.resized()
        self._at.release()
        return self._at.root


def _sides(module: USVLinear, core: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The parameters that hold U and Vᵀ, each with its basis (n, r) and its core S, Sᵀ."""
    return [(module.up.weight, module.u, core), (module.down.weight, module.v, core.T)]


def _as_basis(weight: Tensor, module: USVLinear, tensor: Tensor) -> Tensor:
    """V is stored transposed: from the parameter's shape to the basis's, and back."""
    return tensor.T if weight is module.down.weight else tensor
