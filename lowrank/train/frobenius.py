"""FrobeniusDecay: weight decay on the product of factors (Khodak et al., arXiv 2105.01029).

The penalty λ/2 · ‖UV‖²_F, whose gradients λ U(VVᵀ) and λ (UᵀU)V enter before the step. Decay of the
factors themselves penalises the nuclear norm of UV instead; the two do not go together. The paper
finds that it pays together with the spectral initialisation of `lowrank.factorize_by_design`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LowrankError
from ..nn import ChannelConv, LowRankLinear
from ..types import Site
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.attachment import Attachment, weights_of
from .parts.factor_controller import FactorController
from .parts.factors import decay
from .parts.optimizer import inner_optimizer


class FrobeniusDecay(FactorController):
    """λ/2 · ‖W‖² of layers that are factored already, in the user's own loop: of LowRankLinear, and
    of ChannelConv as `factorize_by_design` makes it of a convolution."""

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
                or what `Attachment` refuses.
        """
        check_strength(strength)
        self.strength = strength
        super().__init__(
            model, optimizer, target_modules, exclude_modules,
            find=_factored_sites, kinds={"linear", "conv"},
        )  # fmt: skip
        refuse_decay(self._at)

    def _add(self) -> None:
        scale = self._at.loss_scale()
        for module in self._layers.values():
            decay(module, self.strength, scale)

    def _leave(self, name: str, module: nn.Module) -> None:
        if isinstance(module, ChannelConv):
            self._at.note("finish", name, rank=module.rank, storage="factors")
        else:
            super()._leave(name, module)


def check_strength(strength: float) -> None:
    if not strength >= 0:
        raise LowrankError(f"the strength of Frobenius decay must be at least 0, got {strength}")


def refuse_decay(at: Attachment) -> None:
    """The optimizer's own decay must not act on the weights that get the penalty.

    Raises:
        LowrankError: it does, at the layer that is named; all claims are given up.
    """
    groups = inner_optimizer(at.optimizer).param_groups
    decayed = {id(p) for group in groups if group.get("weight_decay") for p in group["params"]}
    for site in at.sites:
        if any(id(weight) in decayed for weight in weights_of(site.module)):
            at.release()
            raise LowrankError(
                f"the optimizer decays the weight of {site.name} by itself: put the layers that "
                "get Frobenius decay into a parameter group with weight_decay=0"
            )


def _factored_sites(root: nn.Module) -> list[Site]:
    found = []
    for name, module in root.named_modules():
        if isinstance(module, LowRankLinear):
            shape = (module.out_features, module.in_features)
            found.append(Site(name, (name,), "linear", (module,), shape, module.cost()))
        elif isinstance(module, ChannelConv) and module.wide == "first" and module.groups == 1:
            shape = (len(module.up.weight), module.down.weight[0].numel())
            found.append(Site(name, (name,), "conv", (module,), shape, module.cost()))
    return found
