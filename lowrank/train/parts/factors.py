"""Sites held as two factors while they are trained: from dense, through changes of rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...io.merging import densify
from ...linalg import svd
from ...nn import LowRankLinear
from ...types import Site
from ...walk import layouts
from .attachment import Attachment, weights_of
from .compressed import matrix_of, stored_like
from .distributed import agreed
from .optimizer import corner, replace_parameter, replace_weights


def factor_site(attachment: Attachment, site: Site, rank: int) -> LowRankLinear:
    """Put the best factors of this rank, balanced, in place of a dense layer, or of a factored one
    whose rank is not less.

    The optimizer starts them without a state: a moment of the weight is no linear function of one
    of its factors.
    """
    weight, like = matrix_of(site.module), stored_like(site.module)
    up, down = agreed([t.to(like).contiguous() for t in svd.factor(weight, rank)])
    new = LowRankLinear.from_factors(down, up, None)
    _put(attachment, site, new)
    energy = svd.energies(weight)
    whole, lost = float(energy.sum()), float(energy[rank:].sum())
    attachment.note(
        "factor", site.name, rank=rank, shape=list(site.shape),
        energy_lost=lost / whole if whole > 0 else 0.0,
    )  # fmt: skip
    return new


def empty_factors(attachment: Attachment, site: Site, rank: int) -> LowRankLinear:
    """Put factors of a checkpoint's size in place of a dense layer; numbers are loaded later."""
    weight = stored_like(site.module)
    out_features, in_features = site.shape
    down, up = weight.new_zeros(rank, in_features), weight.new_zeros(out_features, rank)
    new = LowRankLinear.from_factors(down, up, None)
    _put(attachment, site, new)
    return new


def resize(attachment: Attachment, module: LowRankLinear, down: Tensor, up: Tensor) -> None:
    """New factors, down (rank, in) and up (out, rank), whose first components are the old ones.

    The optimizer keeps the state of what stays; new components start without one.
    """
    for child, tensor in ((module.down, down), (module.up, up)):
        old, (same,) = child.weight, agreed([tensor.contiguous()])
        new = nn.Parameter(same.to(old.dtype).clone(memory_format=torch.contiguous_format))
        child.weight = new
        child.out_features, child.in_features = new.shape
        replace_parameter(attachment.optimizer, old, new, corner(new.shape))


def resize_to(attachment: Attachment, module: LowRankLinear, rank: int) -> None:
    """Factors of a checkpoint's size; numbers are loaded later."""
    down, up = module.down.weight, module.up.weight
    empty = down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)
    resize(attachment, module, *empty)


def shorten(attachment: Attachment, module: LowRankLinear, rank: int) -> None:
    """Keep the first components."""
    resize(attachment, module, module.down.weight[:rank], module.up.weight[:, :rank])


def keep_smaller(attachment: Attachment, name: str, module: nn.Module) -> nn.Module:
    """The layer as it is, or the dense one where its factors are not smaller.

    The optimizer then holds the dense weight, without a state; a bias stays the same object.
    """
    if not isinstance(module, LowRankLinear):
        attachment.note("finish", name, rank=min(layouts.matrix(module).shape), storage="dense")
        return module
    rows, columns = module.out_features, module.in_features
    dense = module.rank * (rows + columns) >= rows * columns
    attachment.note("finish", name, rank=module.rank, storage="dense" if dense else "factors")
    if not dense:
        return module
    new = densify(module)
    if module.bias is not None:
        new.bias = module.bias
    replace_parameter(attachment.optimizer, module.up.weight, new.weight)  # type: ignore[arg-type]
    replace_parameter(attachment.optimizer, module.down.weight, [])
    attachment.set(name, new)
    return new


def _put(attachment: Attachment, site: Site, new: LowRankLinear) -> None:
    old, bias = site.module, layouts.bias(site.module)
    if bias is not None:
        new.up.bias = bias  # type: ignore[assignment]  # the object: its optimizer state stays
    factors = [new.up.weight, new.down.weight]
    replace_weights(attachment.optimizer, weights_of(old), factors)
    attachment.put(site, new)
