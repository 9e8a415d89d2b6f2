"""λ/2 · ‖W‖²_F of layers, factored or not: weight decay on the product of factors, by gradients."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...errors import LowrankError
from ...nn import ChannelConv, LowRankLinear
from .attachment import Attachment, weights_of
from .wrappers import inner_optimizer


def check_strength(strength: float) -> None:
    """Raise LowrankError if λ is negative."""
    if not strength >= 0:
        raise LowrankError(f"the strength of Frobenius decay must be at least 0, got {strength}")


def refuse_decay(attachment: Attachment) -> None:
    """The optimizer's own decay must not act on the weights that get the penalty.

    Raises:
        LowrankError: it does, at the layer that is named.
    """
    groups = inner_optimizer(attachment.optimizer).param_groups
    decayed = {id(p) for group in groups if group.get("weight_decay") for p in group["params"]}
    for site in attachment.sites:
        if any(id(weight) in decayed for weight in weights_of(site.module)):
            raise LowrankError(
                f"the optimizer decays the weight of {site.name} itself: put the layers with "
                "Frobenius decay into a parameter group with weight_decay=0"
            )


def add_decay(layers: Iterable[nn.Module], strength: float) -> None:
    """Add its gradient: λU(VVᵀ) and λ(UᵀU)V of W = UV, λW of a dense W."""
    for layer in layers if strength else ():
        if isinstance(layer, LowRankLinear | ChannelConv):  # of filters: as matrices
            up, down = layer.up.weight, layer.down.weight
            left, right = up.flatten(1), down.flatten(1)
            pairs = [
                (up, (left @ (right @ right.T)).view_as(up)),
                (down, ((left.T @ left) @ right).view_as(down)),
            ]
        else:
            pairs = [(weight, weight) for weight in weights_of(layer)]
        for weight, gradient in pairs:
            if weight.grad is not None:
                weight.grad.add_(gradient, alpha=strength)
