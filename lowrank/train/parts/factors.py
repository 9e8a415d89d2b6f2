"""Sites held as two factors while they are trained: from dense, through changes of rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...io.merging import densify
from ...linalg import svd
from ...nn import ChannelConv, LowRankLinear
from ...types import Site
from ...walk import layouts
from .attachment import Attachment, weights_of
from .distributed import agreed
from .optimizer import corner, replace


def enter(at: Attachment, site: Site, rank: int) -> LowRankLinear:
    """The best factors of this rank in place of a dense layer, balanced; no state in the optimizer.

    A moment of the weight is no linear function of one of its factors, so that none is carried.
    """
    weight = layouts.matrix(site.module).detach()
    up, down = agreed([t.to(weight).contiguous() for t in svd.factor(weight, rank)])
    new = LowRankLinear.from_factors(down, up, None)
    _put(at, site, new)
    energy = svd.energies(weight)
    whole, lost = float(energy.sum()), float(energy[rank:].sum())
    at.note(
        "factor", site.name, rank=rank, shape=list(site.shape),
        energy_lost=lost / whole if whole > 0 else 0.0,
    )  # fmt: skip
    return new


def blank(at: Attachment, site: Site, rank: int) -> LowRankLinear:
    """Factors of a checkpoint's size; their numbers come with the model's own state."""
    weight = layouts.matrix(site.module).detach()
    out_features, in_features = weight.shape
    down, up = weight.new_zeros(rank, in_features), weight.new_zeros(out_features, rank)
    new = LowRankLinear.from_factors(down, up, None)
    _put(at, site, new)
    return new


def resize(at: Attachment, module: LowRankLinear, down: Tensor, up: Tensor) -> None:
    """New factors, down (rank, in) and up (out, rank), whose first components are the old ones.

    The optimizer's state of what stays is kept; new components begin without.
    """
    for child, tensor in ((module.down, down), (module.up, up)):
        old, (made,) = child.weight, agreed([tensor.contiguous()])
        new = nn.Parameter(made.to(old.dtype).clone(memory_format=torch.contiguous_format))
        child.weight = new
        child.out_features, child.in_features = new.shape
        replace(at.optimizer, old, new, corner(new.shape))


def shorten(at: Attachment, module: LowRankLinear, rank: int) -> None:
    """Keep the first components."""
    resize(at, module, module.down.weight[:rank], module.up.weight[:, :rank])


def leave(at: Attachment, name: str, module: nn.Module) -> nn.Module:
    """The layer as it is, or the dense one where its factors are not smaller.

    The optimizer then holds the dense weight, without a state; a bias stays the one it was.
    """
    if not isinstance(module, LowRankLinear):
        at.note("finish", name, rank=min(layouts.matrix(module).shape), storage="dense")
        return module
    rows, columns = module.out_features, module.in_features
    dense = module.rank * (rows + columns) >= rows * columns
    at.note("finish", name, rank=module.rank, storage="dense" if dense else "factors")
    if not dense:
        return module
    new = densify(module)
    if module.bias is not None:
        new.bias = module.bias
    replace(at.optimizer, module.up.weight, new.weight)  # type: ignore[arg-type]
    replace(at.optimizer, module.down.weight, [])
    at.set(name, new)
    return new


def _put(at: Attachment, site: Site, new: LowRankLinear) -> None:
    dense = site.module
    bias = dense._parameters.get("bias")
    if bias is not None:
        new.up.bias = bias  # the object itself: its state in the optimizer stays
    replace(at.optimizer, dense.weight, [new.up.weight, new.down.weight])  # type: ignore[arg-type]
    at.put(site, new)


def decay(module: LowRankLinear | nn.Module, strength: float, scale: float = 1.0) -> None:
    """Add the gradient of strength/2 · ‖W‖²: λU(VVᵀ) and λ(UᵀU)V of W = UV, λW of a dense W."""
    if isinstance(module, LowRankLinear | ChannelConv):  # of filters: as matrices
        up, down = module.up.weight, module.down.weight
        left, right = up.flatten(1), down.flatten(1)
        pairs = [
            (up, (left @ (right @ right.T)).view_as(up)),
            (down, ((left.T @ left) @ right).view_as(down)),
        ]
    else:
        pairs = [(w, w) for w in weights_of(module)]
    for weight, gradient in pairs:
        if weight.grad is not None:
            weight.grad.add_(gradient, alpha=strength * scale)
