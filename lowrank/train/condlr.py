"""CondLR: low-rank training with a bounded condition number (arXiv 2306.01485).

W = U S Vᵀ. The gradients of U and V are projected on the tangent space of their Stiefel manifolds,
(I − UUᵀ)G, and scaled; the user's optimizer steps; U and V are retracted by a QR with positive
diagonal, and the singular values of S are moved into [μ − e, μ + e], e = μ(τ − 1)/(τ + 1), μ their
mean. So the condition number of W is at most τ after every step.

Exact low-rank dynamics would scale by (S Sᵀ)⁻¹, which a small singular value makes unstable; the
authors replace it by the number (σ_r/σ_1)², option "bound". Against their code: (I − UUᵀ) is never
formed as a matrix, τ < 1 is an error (there it silently sets S to zero), layers are replaced in
place (there residual connections are lost), and momentum is projected again after each retraction.
The clamp lifts small singular values: with a tolerance they are truncated before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LowrankError, unknown
from ..linalg import retract
from ..nn import USVLinear
from ..types import Site
from ..walk.sites import ALL_LINEAR, Patterns
from .parts import usv
from .parts.attachment import refuse_not_finite
from .parts.base_controller import BaseController
from .parts.compressed import PLAIN
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


class CondLR(BaseController[USVLinear]):
    """Training at a bounded condition number, attached to the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", rank, condition, orthonormality.
    """

    TAKES = PLAIN

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
            rank: int, or float for a share of energy; None is half of min(out, in), and of a layer
                that is factored already the rank that it has.
            tolerance: relative, in [0, 1): every `every` steps, before the clamp, the tail of S
                that carries less than this of ‖S‖ is cut. Ranks only fall. None: they are fixed.
            every: steps between truncations, and between lines of the history.
            scaling: of the projected gradients: "bound", "exact" or "none" (see above).

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
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
        super().__init__(model, optimizer, target_modules, exclude_modules)
        for number, site in enumerate(self.attachment.sites):
            self.layers[site.name] = usv.as_usv(self.attachment, site, start, number)
        self._bound_all(truncate=tolerance is not None)
        self.attachment.resized()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every adapted layer now."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def gradients(self) -> dict[str, Tensor | None]:
        return usv.gradients_of(self.layers)

    def on_gradients(self) -> None:
        """Project and scale the gradients of U and V."""
        for layer in self.layers.values():
            for weight, basis, core in _sides(layer, layer.s.double()):
                if weight.grad is not None:
                    turned = _as_basis(weight, layer, weight.grad)
                    step = SCALINGS[self.scaling](retract.tangent(basis, turned), core)
                    weight.grad.copy_(_as_basis(weight, layer, step))

    def on_step(self) -> None:
        """Retract U and V, bound the condition of S."""
        for name, layer in self.layers.items():
            factors = {n: p for n, p in layer.named_parameters() if not n.endswith("bias")}
            refuse_not_finite({f"{name}.{n}": p for n, p in factors.items()}, "the weight")
        for layer in self.layers.values():
            for weight, basis, _ in _sides(layer, layer.s):
                new = agreed([retract.orthonormal(basis)])[0]
                weight.copy_(_as_basis(weight, layer, new))
                for buffer in linear_state(self.attachment.optimizer, weight).values():
                    flat = retract.tangent(new, _as_basis(weight, layer, buffer))
                    buffer.copy_(_as_basis(weight, layer, flat))
        due = self.attachment.step % self.every == 0
        before = self.ranks
        self._bound_all(truncate=due and self.tolerance is not None, note=due)
        if self.ranks != before:
            self.attachment.resized()

    def leave(self, name: str, layer: USVLinear) -> None:
        usv.as_factors(self.attachment, name, layer)

    def size_of(self, layer: USVLinear) -> list[int]:
        return list(layer.s.shape)

    def resize(self, site: Site, size: Sequence[int]) -> None:
        usv.resize_usv(self.attachment, self.layers[site.name], *size)

    @torch.no_grad()
    def _bound_all(self, *, truncate: bool, note: bool = True) -> None:
        """Truncate where asked, then clamp."""
        for name, layer in self.layers.items():
            p, values, q = retract.core_svd(layer.s)
            rank = len(values)
            if truncate:
                rank = max(retract.tail_rank(values, self.tolerance or 0.0), 1)
            leading = values[:rank]
            kept = leading if math.isinf(self.tau) else retract.clamped(leading, self.tau)
            if rank < len(values):
                usv.truncate_usv(self.attachment, layer, p, kept, q)
            elif not torch.equal(kept, values):
                layer.s.copy_(agreed([p * kept @ q.T])[0])
            if note:
                self.attachment.note("bound", name, **usv.measures(layer, values, kept))


def _sides(layer: USVLinear, core: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The parameters that hold U and Vᵀ, each with its basis (n, r) and its core S, Sᵀ."""
    return [(layer.up.weight, layer.u, core), (layer.down.weight, layer.v, core.T)]


def _as_basis(weight: Tensor, layer: USVLinear, tensor: Tensor) -> Tensor:
    """V is stored transposed: from the parameter's shape to the basis's, and back."""
    return tensor.T if weight is layer.down.weight else tensor
