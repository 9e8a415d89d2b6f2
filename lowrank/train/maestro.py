"""Maestro: trainable low-rank ordered dropout (arXiv 2308.14929).

W = UV with U (out, R), V (R, in), R = min(out, in). At every step one layer runs with its first b
components alone, b drawn so that every width of every layer comes up equally often: components
become ordered by importance (on a linear map they become the SVD). A hierarchical group lasso,

    λ Σ_layers Σ_{i=1..R} ( ‖U[:, i:]‖_F + ‖V[i:, :]‖_F ),

pulls the tail to zero, and after every epoch components go whose importance
‖U[:, i:]‖_F · ‖V[i:, :]‖_F is below a threshold.

The model's own code is not touched: the cut is a forward pre-hook on `up`, the lasso enters as its
gradient before the step. Against the authors' code: layers shrink while training (there they are
masked until the end), and the optimizer's state follows; where a tail is zero the gradient of the
lasso is zero, not NaN; the threshold is a share of the layer's own ‖U‖·‖V‖; one draw holds for an
optimizer step, so that accumulated batches and recomputed activations see one and the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LowrankError
from ..linalg.svd import tails
from ..nn import LowRankLinear
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.draws import Cut, Draws
from .parts.factor_controller import FactorController
from .parts.factors import enter, shorten


class Maestro(FactorController):
    """Rank-adaptive training of linear layers by ordered dropout, in the user's own loop.

    Attributes:
        history: one dict an event, with "step", "site", "event", rank, and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        lasso: float = 1e-4,
        threshold: float = 1e-3,
        cut: Cut = "one",
        rank: int | None = None,
        min_rank: int = 1,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        seed: int = 0,
    ) -> None:
        """Replace the chosen layers by factors of full rank, in the model and in the optimizer.

        Weight decay of the optimizer on the factors is a penalty on the nuclear norm of W.

        Args:
            model: built, and wrapped by DDP or `accelerate.prepare` where it will be.
            optimizer: with the model's parameters; its options go over to the factors.
            lasso: λ ≥ 0.
            threshold: in [0, 1): components whose importance is below this share of the layer's
                are dropped by `end_epoch` and `finish`.
            cut: "one" layer a step, or "all", each to a width of its own.
            rank: R at the start; None is min(out, in), which takes more memory than the dense
                layer until components are dropped.
            min_rank: no layer shrinks below.

        Raises:
            LowrankError: an option is out of range, nothing can be adapted, or what `Attachment`
                refuses; the model and the optimizer are as they were.
        """
        if not lasso >= 0:
            raise LowrankError(f"lasso must be at least 0, got {lasso}")
        if not 0 <= threshold < 1:
            raise LowrankError(f"threshold is a share of importance, in [0, 1), got {threshold}")
        if min_rank < 1 or (rank is not None and rank < min_rank):
            raise LowrankError(f"need 1 <= min_rank <= rank, got {min_rank} and {rank}")
        self.lasso, self.threshold, self.min_rank = lasso, threshold, min_rank
        self._draws = Draws(cut, seed)
        super().__init__(model, optimizer, target_modules, exclude_modules)
        self._hooks: list[RemovableHandle] = []
        self._widths: dict[str, Tensor] = {}  # what the hooks read: torch.compile sees no constant
        for site in self._at.sites:
            side = min(site.shape)
            layer = enter(self._at, site, side if rank is None else min(rank, side))
            self._layers[site.name] = layer
            self._widths[site.name] = torch.zeros((), dtype=torch.int64)
            hook = _cutter(self._widths[site.name])
            self._hooks.append(layer.up.register_forward_pre_hook(hook))
        self._draws.restart(self.ranks)
        self._draw()
        self._at.resized()

    @property
    def importances(self) -> dict[str, Tensor]:
        """‖U[:, i]‖ · ‖V[i, :]‖ of every component, (rank,) float64, by layer.

        On a linear map they become its singular values.
        """
        return {
            name: m.up.weight.detach().double().norm(dim=0)
            * m.down.weight.detach().double().norm(dim=1)
            for name, m in self._factored().items()
        }

    def detach(self) -> None:
        """Stop: the layers stay LowRankLinear of their present ranks and run whole."""
        self._close()

    def _add(self) -> None:
        scale = self.lasso * self._at.loss_scale()
        for module in self._factored().values() if self.lasso else ():
            for weight, along in ((module.up.weight, 0), (module.down.weight, 1)):
                if weight.grad is not None:
                    weight.grad.add_(lasso_gradient(weight, along), alpha=scale)

    def _stepped(self) -> None:
        self._draws.advance()
        self._draw()

    def _epoch(self) -> None:
        changed = False
        for name, module in self._factored().items():
            found = tail_importance(module)
            kept = int((found > self.threshold * found[0]).sum())
            kept = min(max(kept, self.min_rank), module.rank)
            dropped = float(found[kept] / found[0]) if kept < len(found) and found[0] > 0 else 0.0
            if kept < module.rank:
                shorten(self._at, module, kept)
                changed = True
            self._at.note("shrink", name, rank=kept, importance_dropped=dropped)
        if changed:
            self._draws.restart(self.ranks)
            self._draw()
            self._at.resized()

    def _last(self) -> None:
        self._epoch()

    def _draw(self) -> None:
        drawn = self._draws.widths()
        for name, rank in self.ranks.items():
            self._widths[name].fill_(drawn.get(name, rank))

    def _close(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._widths = [], {}
        return super()._close()

    def _policy(self) -> dict[str, Any]:
        return self._draws.state()

    def _take(self, policy: dict[str, Any]) -> None:
        self._draws.resume(self.ranks, policy)
        self._draw()


def _cutter(width: Tensor) -> Callable[[nn.Module, Any], Any]:
    """A hook that hides from `up` what `down` gave beyond the drawn width, while training."""

    def cut(up: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not up.training:
            return None
        (inner,) = inputs  # (..., rank)
        kept = torch.arange(inner.shape[-1], device=inner.device) < width
        return (inner * kept.to(inner.dtype),)

    return cut


def _tail_norms(factor: Tensor, along: int) -> Tensor:
    """‖·‖_F of all components from the i-th on, (rank,) float64; `along` is summed over."""
    return tails(factor.detach().double().square().sum(along))[:-1].sqrt()


def tail_importance(module: LowRankLinear) -> Tensor:
    """‖U[:, i:]‖_F · ‖V[i:, :]‖_F, (rank,) float64, falling: what goes with the i-th component."""
    return _tail_norms(module.up.weight, 0) * _tail_norms(module.down.weight, 1)


def lasso_gradient(factor: Tensor, along: int) -> Tensor:
    """Of Σ_i ‖factor from its i-th component on‖_F, `along` being what a component extends over.

    Component j has the gradient factor_j · Σ_{i ≤ j} 1/‖tail_i‖; zero where its tail is zero.
    """
    norms = _tail_norms(factor, along)
    there = norms > torch.finfo(factor.dtype).tiny ** 0.5
    inverse = torch.where(there, norms.where(there, 1).reciprocal(), 0).cumsum(0)
    return (factor.double() * (inverse if along == 0 else inverse[:, None])).to(factor.dtype)
