"""STF: dense-sparse layers whose support is trained with the task (DSFormer, arXiv 2312.13211).

W = C · D with s of r coefficients in every row. A decomposition made without the task fixes which
ones; the straight-through factorizer lets them change: a dense latent Z (out, r) is trained, C is Z
with its s largest entries a row, and the gradient dL/dC reaches all of Z. Or W stays the latent and
is coded anew every few steps. After `freeze` steps, for late flips harm, or at `finish`, the latent
goes and the layer is a DenseSparseLinear with exactly s coefficients a row.

Of the paper only the abstract was at hand: the equations, the schedule and the start of Z beyond
its support (what the residual has on those atoms, below every chosen one) are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError, unknown
from ..linalg.gram import full_precision
from ..linalg.sparse import spread
from ..methods.dense_sparse import DENSITY
from ..nn import DenseSparseLinear, remember_layout
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.coding import Size, find, sizes, start
from .parts.distributed import agreed
from .parts.factor_controller import FactorController
from .parts.latent import Latent, LatentCoefficients, LatentWeight
from .parts.optimizer import insert, replace

Kind = Literal["coefficients", "weight"]


class STF(FactorController):
    """Dense-sparse training with a support that follows the task, in the user's own loop.

    Attributes:
        history: one dict an event, with "step", "site", "event", and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        ratio: float | None = None,
        rank: int | None = None,
        density: float = DENSITY,
        latent: Kind = "coefficients",
        every: int = 1,
        freeze: int | None = None,
        decay: float = 0.0,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        seed: int = 0,
    ) -> None:
        """Put a latent in place of the chosen layers, in the model and in the optimizer.

        Layers that are DenseSparseLinear already, as `compress(method=DenseSparse(side="out"))`
        gives, keep their sizes; dense ones are decomposed without data.

        Args:
            ratio: of dense layers: the share of their bytes kept, indices included, in (0, 1).
            rank: or their r, the number of atoms; with neither dense layers are left.
            density: s / r in (0, 1] of dense layers.
            latent: "coefficients" Z (out, r), or "weight" W (out, in), coded anew every `every`
                steps, between which C rests and D alone is trained.
            every: steps between choices of the support, at least 1.
            freeze: after so many steps the support is fixed; None: by `finish`.
            decay: λ ≥ 0; λ z is added to the gradient of entries that are not chosen (SR-STE).
            seed: of atoms that are drawn.

        Raises:
            LowrankError: an option is out of range, nothing can be adapted, or what `Attachment`
                refuses; the model and the optimizer are as they were.
        """
        _check(ratio, rank, density, latent, every, freeze, decay)
        self.every, self.freeze, self.decay, self.seed = every, freeze, decay, seed
        self.latent = latent
        size = sizes(ratio, rank, density)
        super().__init__(
            model, optimizer, target_modules, exclude_modules, find=lambda root: find(root, size)
        )
        self.frozen = False
        self._entered = {site.name: 0 for site in self._at.sites}
        for site in self._at.sites:
            known = isinstance(site.module, DenseSparseLinear)
            self._layers[site.name] = self._enter(site, None if known else size(site))
        self._at.resized()

    @property
    def ranks(self) -> dict[str, int]:
        """r of every layer."""
        return {name: module.rank for name, module in self._coded().items()}

    @property
    def counts(self) -> dict[str, int]:
        """s of every layer, the coefficients in a row."""
        return {name: module.count for name, module in self._coded().items()}

    def _coded(self) -> dict[str, Latent | DenseSparseLinear]:
        kinds = (Latent, DenseSparseLinear)
        return {name: m for name, m in self._layers.items() if isinstance(m, kinds)}

    def _enter(self, site: Site, size: Size | None) -> Latent:
        old = site.module
        bias = old._parameters.get("bias")
        new: Latent
        if isinstance(old, DenseSparseLinear):
            value, index = old.value.detach(), old.index.long()
            atoms: nn.Parameter = old.basis.weight  # type: ignore[assignment]
            rank = old.rank
            if self.latent == "coefficients":
                new = LatentCoefficients(atoms, spread(value, index, rank), old.count, bias)
                replace(self._at.optimizer, old.value, new.latent, lambda x: spread(x, index, rank))
            else:
                weight = nn.Parameter(old.dense_weight().detach())
                new = LatentWeight(atoms, weight, (value, index), bias)
                replace(self._at.optimizer, old.value, new.latent)
        else:
            new = self._decomposed(old, bias, size or (1, 1))
        self._at.put(site, new)
        if isinstance(old, DenseSparseLinear):
            remember_layout(new, old.layout)
        at = {"rank": new.rank, "count": new.count, "shape": list(site.shape)}
        self._at.note("attach", site.name, **at)
        return new

    def _decomposed(self, dense: nn.Module, bias: nn.Parameter | None, size: Size) -> Latent:
        weight = layouts.matrix(dense).detach()
        with full_precision(weight):
            code = linalg.dense_sparse_code(weight, *size, seed=self.seed)
            first = start(weight.to(code.basis), code.coefficients(), code.basis)
        basis, value, first = agreed([t.to(weight).contiguous() for t in (*code[:2], first)])
        (index,) = agreed([code.atoms])
        atoms, old = nn.Parameter(basis), dense.weight
        new: Latent
        if self.latent == "coefficients":
            new = LatentCoefficients(atoms, first, size[1], bias)
            replace(self._at.optimizer, old, [new.latent, atoms])  # type: ignore[arg-type]
            return new
        turned = layouts.layout(dense) == "conv1d"
        latent = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        new = LatentWeight(atoms, latent, (value, index), bias)
        same = (lambda x: x.T) if turned else (lambda x: x)
        replace(self._at.optimizer, old, latent, same)  # type: ignore[arg-type]
        insert(self._at.optimizer, latent, [atoms])
        return new

    def _add(self) -> None:
        if not self.decay:
            return
        strength = self.decay * self._at.loss_scale()
        for module in self._layers.values():
            if isinstance(module, LatentCoefficients) and module.latent.grad is not None:
                module.latent.grad.add_(module.latent * ~module.mask, alpha=strength)

    def _stepped(self) -> None:
        if self.frozen:
            return
        if self._at.step % self.every == 0:
            for name, module in self._layers.items():
                assert isinstance(module, Latent)
                self._entered[name] += module.choose()
        if self._at.step == self.freeze:
            self._freeze()

    def _last(self) -> None:
        if not self.frozen:
            self._freeze()

    def _freeze(self) -> None:
        """Every layer as a DenseSparseLinear; the moments of its coefficients stay."""
        for name, module in self._layers.items():
            assert isinstance(module, Latent)
            value, index = module.code()
            new = DenseSparseLinear.from_code(module.basis.weight, value, index, None)
            new.basis.weight, new.bias = module.basis.weight, module.bias  # the objects themselves
            remember_layout(new, module.layout)
            carry = _gathering(index) if isinstance(module, LatentCoefficients) else None
            replace(self._at.optimizer, module.latent, new.value, carry)
            self._at.set(name, new)
            self._at.claim(name, new)
            self._layers[name] = new
            done = {"rank": new.rank, "count": new.count, "entered": self._entered[name]}
            self._at.note("freeze", name, **done)
        self.frozen = True
        self._at.resized()

    def _leave(self, name: str, module: nn.Module) -> None:
        assert isinstance(module, DenseSparseLinear)
        self._at.note("finish", name, rank=module.rank, count=module.count, storage="dense-sparse")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `FactorController`; the sizes have to be those of the state."""
        self._at.check_state(state, self._layers)
        policy = state["policy"]
        for name, module in self._coded().items():
            got = (state["sites"][name], policy["counts"][name])
            if got != (module.rank, module.count):
                raise LowrankError(
                    f"{name} has the size {got} in this state and {(module.rank, module.count)} "
                    "here: build STF with the sizes it was saved with"
                )
        if policy["latent"] != self.latent:
            raise LowrankError(f"this state was saved with latent={policy['latent']!r}")
        if self.frozen and not policy["frozen"]:
            raise LowrankError(
                "the support is not frozen in this state, but here it is: build STF on a fresh "
                "model, as when the run began"
            )
        super().load_state_dict(state)

    def _resume(self, site: Site, rank: int | None) -> None:
        """Sizes are checked already, and do not change."""

    def _policy(self) -> dict[str, Any]:
        return {
            "frozen": self.frozen, "counts": self.counts, "latent": self.latent,
            "entered": dict(self._entered),
        }  # fmt: skip

    def _take(self, policy: dict[str, Any]) -> None:
        if policy["frozen"] and not self.frozen:
            self._freeze()
        self._entered = dict(policy["entered"])


def _gathering(index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.gather(1, index)


def _check(
    ratio: float | None, rank: int | None, density: float, latent: str, every: int,
    freeze: int | None, decay: float,
) -> None:  # fmt: skip
    if ratio is not None and rank is not None:
        raise LowrankError(f"give ratio or rank, not both; got {ratio} and {rank}")
    if ratio is not None and not 0 < ratio < 1:
        raise LowrankError(f"ratio is the share kept, in (0, 1), got {ratio}")
    if not 0 < density <= 1:
        raise LowrankError(f"density is s / r, in (0, 1], got {density}")
    if latent not in get_args(Kind):
        raise unknown("latent", str(latent), get_args(Kind))
    for name, number in {"rank": rank, "every": every, "freeze": freeze}.items():
        if number is not None and (not isinstance(number, int) or number < 1):
            raise LowrankError(f"{name} must be an integer >= 1, got {number!r}")
    if not decay >= 0:
        raise LowrankError(f"decay must be at least 0, got {decay}")
