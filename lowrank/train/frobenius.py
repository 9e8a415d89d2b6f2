"""FrobeniusDecay: weight decay on the product of factors (Khodak et al., arXiv 2105.01029).

The penalty λ/2 · ‖UV‖²_F, whose gradients λ U(VVᵀ) and λ (UᵀU)V enter before the step. Decay of the
factors themselves penalises the nuclear norm of UV instead; the two do not go together. The paper
finds that it pays together with the spectral initialisation of `lowrank.factorize_by_design`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import ChannelConv, LowRankLinear
from ..types import Site
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.factor_controller import FactorController
from .parts.product_decay import add_decay, check_strength, refuse_decay


class FrobeniusDecay(FactorController):
    """λ/2 · ‖W‖² of layers that are factored already: of `LowRankLinear`, and of the `ChannelConv`
    that `factorize_by_design` makes of a convolution."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        strength: float = 1e-4,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """
        Args:
            model: with factored layers, as `lowrank.factorize_by_design` gives.
            optimizer: with weight_decay 0 for the factors.
            strength: λ ≥ 0.

        Raises:
            LowrankError: λ is negative, no layer is factored, the optimizer decays factors itself,
                or `Attachment` refuses the model.
        """
        check_strength(strength)
        self.strength = strength
        super().__init__(
            model, optimizer, target_modules, exclude_modules,
            find=_factored_sites, kinds={"linear", "conv"},
        )  # fmt: skip

    def check_sites(self) -> None:
        refuse_decay(self.attachment)

    def on_gradients(self) -> None:
        add_decay(self.layers.values(), self.strength * self.attachment.loss_scale())

    def leave(self, name: str, layer: nn.Module) -> None:
        if isinstance(layer, ChannelConv):
            self.attachment.note("finish", name, rank=layer.rank, storage="factors")
        else:
            super().leave(name, layer)


def _factored_sites(root: nn.Module) -> list[Site]:
    sites = []
    for name, module in root.named_modules():
        if isinstance(module, LowRankLinear):
            shape = (module.out_features, module.in_features)
            sites.append(Site(name, (name,), "linear", (module,), shape, module.cost()))
        elif isinstance(module, ChannelConv) and module.wide == "first" and module.groups == 1:
            shape = (len(module.up.weight), module.down.weight[0].numel())
            sites.append(Site(name, (name,), "conv", (module,), shape, module.cost()))
    return sites
