"""Maestro: trainable low-rank ordered dropout (arXiv 2308.14929).

W = UV with U (out, R), V (R, in), R = min(out, in). In every step one layer runs with its first b
components alone, b drawn so that every width of every layer comes up equally often: components
become ordered by importance (on a linear map they become the SVD). A hierarchical group lasso,

    λ Σ_layers Σ_{i=1..R} ( ‖U[:, i:]‖_F + ‖V[i:, :]‖_F ),

pulls the tail to zero, and after every epoch components whose importance
‖U[:, i:]‖_F · ‖V[i:, :]‖_F is below a threshold are dropped.

The model's own code is not touched: the cut is a forward pre-hook on `up`, the lasso enters as its
gradient before the step. Against the authors' code: layers shrink during training (there they are
masked until the end), and the optimizer's state follows; where a tail is zero the gradient of the
lasso is zero, not NaN; the threshold is a share of the layer's own ‖U‖·‖V‖; one draw holds for a
whole optimizer step, so that accumulated batches and recomputed activations see the same model.
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
from .parts.compressed import PLAIN
from .parts.draws import Cut, Draws
from .parts.factor_controller import FactorController
from .parts.factors import shorten


class Maestro(FactorController):
    """Rank-adaptive training of linear layers by ordered dropout, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", rank, and what was measured.
    """

    TAKES = PLAIN

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
                layer until components are dropped, and of a layer that is factored already the rank
                that it has, at most which it is.
            min_rank: no layer shrinks below.

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
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
        self.factor(
            {
                site.name: min(site.shape) if rank is None else min(rank, *site.shape)
                for site in self.attachment.sites
            }
        )
        # What the hooks read are tensors, because torch.compile would take numbers for constants.
        self._widths = {name: torch.zeros((), dtype=torch.int64) for name in self.layers}
        self._hooks: list[RemovableHandle] = [
            layer.up.register_forward_pre_hook(_cutter(self._widths[name]))
            for name, layer in self.factored.items()
        ]
        self._draws.restart(self.ranks)
        self._draw()

    @property
    def importances(self) -> dict[str, Tensor]:
        """‖U[:, i]‖ · ‖V[i, :]‖ of every component, (rank,) float64, by layer.

        On a linear map they become its singular values.
        """
        return {
            name: m.up.weight.detach().double().norm(dim=0)
            * m.down.weight.detach().double().norm(dim=1)
            for name, m in self.factored.items()
        }

    def on_gradients(self) -> None:
        strength = self.lasso * self.attachment.loss_scale()
        for layer in self.factored.values() if self.lasso else ():
            for weight, along in ((layer.up.weight, 0), (layer.down.weight, 1)):
                if weight.grad is not None:
                    weight.grad.add_(lasso_gradient(weight, along), alpha=strength)

    def on_step(self) -> None:
        self._draws.advance()
        self._draw()

    def on_epoch(self) -> None:
        before = self.ranks
        for name, layer in self.factored.items():
            importance, dropped = tail_importance(layer), 0.0
            kept = int((importance > self.threshold * importance[0]).sum())
            kept = min(max(kept, self.min_rank), layer.rank)
            if kept < layer.rank:
                dropped = float(importance[kept] / importance[0]) if importance[0] > 0 else 0.0
                shorten(self.attachment, layer, kept)
            self.attachment.note("shrink", name, rank=kept, importance_dropped=dropped)
        if self.ranks != before:
            self._draws.restart(self.ranks)
            self._draw()
            self.attachment.resized()

    def on_finish(self) -> None:
        self.on_epoch()

    def _draw(self) -> None:
        drawn = self._draws.widths()
        for name, rank in self.ranks.items():
            self._widths[name].fill_(drawn.get(name, rank))

    def on_close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._widths = [], {}

    def progress(self) -> dict[str, Any]:
        return {"policy": self._draws.state()}

    def resume(self, state: dict[str, Any]) -> None:
        self._draws.resume(self.ranks, state["policy"])
        self._draw()


def _cutter(width: Tensor) -> Callable[[nn.Module, Any], Any]:
    """A hook that hides from `up`, in training, the components beyond the drawn width."""

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
    """‖U[:, i:]‖_F · ‖V[i:, :]‖_F, (rank,) float64, falling: of the i-th component and its tail."""
    return _tail_norms(module.up.weight, 0) * _tail_norms(module.down.weight, 1)


def lasso_gradient(factor: Tensor, along: int) -> Tensor:
    """The gradient of Σ_i ‖factor from its i-th component on‖_F; components extend over `along`.

    Component j has the gradient factor_j · Σ_{i ≤ j} 1/‖tail_i‖; zero where its tail is zero.
    """
    norms = _tail_norms(factor, along)
    there = norms > torch.finfo(factor.dtype).tiny ** 0.5
    inverse = torch.where(there, norms.where(there, 1).reciprocal(), 0).cumsum(0)
    return (factor.double() * (inverse if along == 0 else inverse[:, None])).to(factor.dtype)
