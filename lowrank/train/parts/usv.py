"""Sites held as U S Vᵀ while they are trained: from dense, through changes of basis, to factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import LowrankError
from ...io.merging import densify
from ...linalg import retract, svd
from ...linalg.gram import full_precision
from ...linalg.spectra import rank_for
from ...nn import LowRankLinear, USVLinear, remember_layout
from ...types import Site
from ...walk import layouts
from .attachment import Attachment, weights_of
from .compressed import held_rank, matrix_of, stored_like
from .distributed import agreed
from .optimizer import both_sides, insert_parameters, replace_parameter, replace_weights

Init = Literal["svd", "random"]


@dataclass(frozen=True)
class Start:
    """How a weight becomes U S Vᵀ.

    Attributes:
        rank: int fixed, float in (0, 1] the share of energy kept, None half of min(out, in); of a
            layer that is factored already at most the rank that it has, which None keeps.
        init: "svd" keeps the weight; "random" draws orthonormal bases and S = diag(|Gaussian|),
            sorted, of the Frobenius norm that the dense weight has.
        seed: of those draws.
    """

    rank: int | float | None = None
    init: Init = "svd"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.init not in ("svd", "random"):
            raise LowrankError(f"init must be 'svd' or 'random', got {self.init!r}")
        share = isinstance(self.rank, float)
        good = 0 < self.rank <= 1 if share else self.rank is None or self.rank >= 1  # type: ignore[operator]
        if isinstance(self.rank, bool) or not good:
            raise LowrankError(
                f"rank must be an int >= 1 or a share of energy in (0, 1], got {self.rank!r}"
            )

    def rank_of(self, weight: Tensor, held: int | None = None) -> int:
        """The rank of a weight (out, in); `held` is that of its factors, None if it is dense."""
        most = min(*weight.shape, *(() if held is None else (held,)))
        if self.rank is None:
            return max(most // 2, 1) if held is None else most
        if isinstance(self.rank, float):
            return min(max(rank_for(self.rank, svd.energies(weight)), 1), most)
        return min(self.rank, most)


def as_usv(attachment: Attachment, site: Site, start: Start, number: int) -> USVLinear:
    """Put U S Vᵀ in place of a dense layer or of plain factors, in model and optimizer; `number`
    seeds the draws.

    A moment m of a dense weight becomes that of the core, UᵀmV; those of factors begin anew.
    """
    old, like = site.module, stored_like(site.module)
    weight = matrix_of(old)
    rank = start.rank_of(weight, held_rank(old))
    random = start.init == "random"
    parts = _drawn(weight, rank, start.seed + number) if random else _cut(weight, rank)
    u, s, v = agreed([factor.to(like).contiguous() for factor in parts])
    new = USVLinear.from_factors(u, s, v, layouts.bias(old))
    turned = layouts.layout(old) == "conv1d"  # its moments are those of the transposed weight
    basis = both_sides(u.double().T, v.double())
    carry = (lambda x: basis(x.T)) if turned else basis
    replace_weights(attachment.optimizer, weights_of(old), new.core.weight, carry)
    bases = [new.up.weight, new.down.weight]
    insert_parameters(attachment.optimizer, new.core.weight, bases)
    attachment.put(site, new)
    whole, kept = float(weight.double().square().sum()), float(s.double().square().sum())
    lost = 0.0 if random or whole == 0 else max(1 - kept / whole, 0.0)
    attachment.note("attach", site.name, rank=rank, shape=list(site.shape), energy_lost=lost)
    return new


def change_factors(
    attachment: Attachment,
    layer: USVLinear,
    factors: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
) -> None:
    """New U, S, V in model and optimizer; the core's state follows by x → left x right."""
    dtype = layer.s.dtype
    u, s, v, left, right = agreed([t.contiguous() for t in (*factors, *maps)])
    old = [layer.core.weight, layer.up.weight, layer.down.weight]
    layer.set_factors(u.to(dtype), s.to(dtype), v.to(dtype))
    optimizer = attachment.optimizer
    replace_parameter(optimizer, old[0], layer.core.weight, both_sides(left, right))
    replace_parameter(optimizer, old[1], layer.up.weight)
    replace_parameter(optimizer, old[2], layer.down.weight)


def truncate_usv(
    attachment: Attachment, layer: USVLinear, p: Tensor, values: Tensor, q: Tensor
) -> None:
    """Keep the leading directions of S = P diag(σ) Qᵀ, as many as there are values σ (r,)."""
    u, s, v, left, right = retract.truncated_usv(layer.u, layer.v, p, values, q, len(values))
    change_factors(attachment, layer, (u, s, v), (left, right))


def resize_usv(attachment: Attachment, layer: USVLinear, rank_out: int, rank_in: int) -> None:
    """The sizes of a checkpoint; numbers are loaded later."""
    u = layer.u.new_zeros(layer.out_features, rank_out)
    v = layer.u.new_zeros(layer.in_features, rank_in)
    left, right = u.new_zeros(rank_out, layer.u.shape[1]), u.new_zeros(layer.v.shape[1], rank_in)
    change_factors(attachment, layer, (u, u.new_zeros(rank_out, rank_in), v), (left, right))


def as_factors(attachment: Attachment, name: str, layer: USVLinear) -> nn.Module:
    """Put plain factors in place of U S Vᵀ, or the dense layer where that is not larger.

    The optimizer then holds the new parameters, without a state; a bias stays the same object.
    """
    rows, columns = layer.out_features, layer.in_features
    p, values, q = retract.core_svd(layer.s)
    dense = len(values) * (rows + columns) >= rows * columns
    new: nn.Module
    if dense:
        new = holder = densify(layer)
    else:
        with full_precision(p):
            up, down = svd.balance(layer.u.to(p) @ (p * values), (layer.v.to(p) @ q).T)
        dtype = layer.s.dtype
        new = LowRankLinear.from_factors(down.to(dtype), up.to(dtype), layer.bias)
        holder = new.up
        remember_layout(new, layer.layout)
    if layer.bias is not None:
        holder.bias = layer.bias  # the object itself: its state in the optimizer stays
    replace_parameter(attachment.optimizer, layer.core.weight, weights_of(new))
    replace_parameter(attachment.optimizer, layer.up.weight, [])
    replace_parameter(attachment.optimizer, layer.down.weight, [])
    attachment.set(name, new)
    storage = "dense" if dense else "factors"
    attachment.note("finish", name, rank=len(values), storage=storage)
    return new


def measures(layer: USVLinear, values: Tensor, kept: Tensor) -> dict[str, Any]:
    """What the history says of a truncated layer.

    Args:
        values: σ (k,) of the core before; kept: those of the core as it is now (r,).
    """
    largest, least = (float(kept[0]), float(kept[-1])) if len(kept) else (0.0, 0.0)
    whole = float(values.double().square().sum())
    lost = float(values[len(kept) :].double().square().sum())
    return {
        "rank": layer.rank,
        "condition": largest / least if least > 0 else None,  # JSON knows no infinity
        "orthonormality": max(map(retract.loss_of_orthonormality, (layer.u, layer.v))),
        "energy_lost": lost / whole if whole > 0 else 0.0,
    }


def gradients_of(layers: Mapping[str, USVLinear]) -> dict[str, Tensor | None]:
    """Gradients of U and V, by the name of the tensor."""
    both = {f"{name}.up.weight": m.up.weight.grad for name, m in layers.items()}
    return both | {f"{name}.down.weight": m.down.weight.grad for name, m in layers.items()}


def _cut(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of the best approximation of this rank."""
    u = svd.output_basis(weight, rank)
    with full_precision(u):
        p, values, q = retract.core_svd(u.T @ weight.to(u))  # (rank, in)
        return retract.orthonormal(u @ p), torch.diag(values), q


def _drawn(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, v = retract.orthonormal(gaussian(rows, rank)), retract.orthonormal(gaussian(columns, rank))
    values = gaussian(rank).abs().sort(descending=True).values
    values = values * (weight.double().norm().cpu() / values.norm())
    return tuple(t.to(weight.device) for t in (u, torch.diag(values), v))  # type: ignore[return-value]
