"""Sites held as U S Vᵀ while they are trained: from dense, through changes of basis, to factors."""

from __future__ import annotations

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
from .attachment import Attachment
from .distributed import agreed
from .optimizer import insert, replace, two_sided

Init = Literal["svd", "random"]


@dataclass(frozen=True)
class Start:
    """How a dense weight becomes U S Vᵀ.

    Attributes:
        rank: int fixed, float in (0, 1] the share of energy kept, None half of min(out, in).
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

    def rank_of(self, weight: Tensor) -> int:
        side = min(weight.shape)
        if self.rank is None:
            return max(side // 2, 1)
        if isinstance(self.rank, float):
            return max(rank_for(self.rank, svd.energies(weight)), 1)
        return min(self.rank, side)


def enter(at: Attachment, site: Site, start: Start, number: int) -> USVLinear:
    """Put U S Vᵀ in place of a dense layer, in model and optimizer; `number` seeds the draws.

    A moment of the weight becomes that of the core, UᵀmV.
    """
    dense = site.module
    weight = layouts.matrix(dense).detach()
    rank = start.rank_of(weight)
    random = start.init == "random"
    made = _drawn(weight, rank, start.seed + number) if random else _cut(weight, rank)
    u, s, v = agreed([factor.to(weight).contiguous() for factor in made])
    new = USVLinear.from_factors(u, s, v, dense._parameters.get("bias"))
    turned = layouts.layout(dense) == "conv1d"  # its moments are those of the transposed weight
    basis = two_sided(u.double().T, v.double())
    old: nn.Parameter = dense.weight  # type: ignore[assignment]
    replace(at.optimizer, old, new.core.weight, (lambda x: basis(x.T)) if turned else basis)
    insert(at.optimizer, new.core.weight, [new.up.weight, new.down.weight])
    at.put(site, new)
    whole, kept = float(weight.double().square().sum()), float(s.double().square().sum())
    lost = 0.0 if random or whole == 0 else max(1 - kept / whole, 0.0)
    at.note("attach", site.name, rank=rank, shape=list(site.shape), energy_lost=lost)
    return new


def change(
    at: Attachment,
    module: USVLinear,
    factors: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Tensor, Tensor],
) -> None:
    """New U, S, V in model and optimizer; the core's state follows by x → left x right."""
    dtype = module.s.dtype
    u, s, v, left, right = agreed([t.contiguous() for t in (*factors, *maps)])
    old = [module.core.weight, module.up.weight, module.down.weight]
    carry = two_sided(left, right)
    module.set_factors(u.to(dtype), s.to(dtype), v.to(dtype))
    replace(at.optimizer, old[0], module.core.weight, carry)
    replace(at.optimizer, old[1], module.up.weight)
    replace(at.optimizer, old[2], module.down.weight)


def blank(at: Attachment, module: USVLinear, rank_out: int, rank_in: int) -> None:
    """The sizes of a checkpoint; numbers come with the model's and the optimizer's own states."""
    u = module.u.new_zeros(module.out_features, rank_out)
    v = module.u.new_zeros(module.in_features, rank_in)
    left, right = u.new_zeros(rank_out, module.u.shape[1]), u.new_zeros(module.v.shape[1], rank_in)
    change(at, module, (u, u.new_zeros(rank_out, rank_in), v), (left, right))


def leave(at: Attachment, name: str, module: USVLinear) -> nn.Module:
    """Plain factors in place of U S Vᵀ, or the dense layer where that is not larger.

    The optimizer then holds the new parameters, without a state; a bias stays the one it was.
    """
    rows, columns = module.out_features, module.in_features
    p, values, q = retract.core_svd(module.s)
    new: nn.Module
    if len(values) * (rows + columns) >= rows * columns:
        new, storage = densify(module), "dense"
    else:
        with full_precision(p):
            up, down = svd.balance(module.u.to(p) @ (p * values), (module.v.to(p) @ q).T)
        new, storage = (
            LowRankLinear.from_factors(*_stored(down, up, module), module.bias),
            "factors",
        )
        remember_layout(new, module.layout)
    holder = new.up if isinstance(new, LowRankLinear) else new
    if module.bias is not None:
        holder.bias = module.bias  # the object itself: its state in the optimizer stays
    weights = [p for key, p in new.named_parameters() if not key.endswith("bias")]
    replace(at.optimizer, module.core.weight, weights)
    replace(at.optimizer, module.up.weight, [])
    replace(at.optimizer, module.down.weight, [])
    at.set(name, new)
    at.note("finish", name, rank=len(values), storage=storage)
    return new


def measures(module: USVLinear, values: Tensor) -> dict[str, Any]:
    """What the history says of a site: rank, condition of the weight, orthonormality."""
    least = float(values[-1]) if len(values) else 0.0
    both = (retract.loss_of_orthonormality(module.u), retract.loss_of_orthonormality(module.v))
    condition = float(values[0]) / least if least > 0 else None  # JSON knows no infinity
    return {"rank": module.rank, "condition": condition, "orthonormality": max(both)}


def gradients(modules: dict[str, USVLinear]) -> dict[str, Tensor | None]:
    """Gradients of U and V, by the name of the tensor."""
    both = {f"{name}.up.weight": m.up.weight.grad for name, m in modules.items()}
    return both | {f"{name}.down.weight": m.down.weight.grad for name, m in modules.items()}


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


def _stored(down: Tensor, up: Tensor, module: USVLinear) -> tuple[Tensor, Tensor]:
    return down.to(module.s.dtype), up.to(module.s.dtype)
