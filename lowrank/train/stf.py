"""STF: dense-sparse layers whose support is trained with the task (DSFormer, arXiv 2312.13211).

W = C · D with s of r coefficients in every row. A decomposition made without the task fixes which
ones; the straight-through factorizer lets them change: a dense latent Z (out, r) is trained, C has
the s largest entries of every row of Z, and the gradient dL/dC reaches all of Z. Or W stays the
latent and is coded again every few steps. After `freeze` steps, because late flips harm, or at
`finish` the latent goes, and the layer is a DenseSparseLinear with exactly s coefficients per row.

The idea is the paper's; the equations, the schedule and the start of Z outside of its support (the
residual's coefficients on those atoms, kept below every chosen one) are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from .. import linalg
from ..errors import LowrankError, unknown
from ..linalg.gram import full_precision
from ..linalg.sparse import spread
from ..methods.dense_sparse import DENSITY
from ..nn import DenseSparseLinear, remember_layout
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.base_controller import BaseController
from .parts.coding import CodeSize, coded_sites, first_latent, size_rule
from .parts.distributed import agreed
from .parts.latent import Latent, LatentCoefficients, LatentWeight
from .parts.optimizer import Carry, insert_parameters, replace_parameter

Kind = Literal["coefficients", "weight"]


class STF(BaseController[Latent | DenseSparseLinear]):
    """Dense-sparse training with a support that follows the task, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", and what was measured.
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
        makes them, keep their sizes; dense ones are decomposed without data.

        Args:
            ratio: of dense layers: the share of their bytes kept, indices included, in (0, 1).
            rank: or their r, the number of atoms; with neither, dense layers stay as they are.
            density: s / r in (0, 1] of dense layers.
            latent: "coefficients" Z (out, r), or "weight" W (out, in), coded again every `every`
                steps, between which C rests and D alone is trained.
            every: steps between choices of the support, at least 1.
            freeze: after so many steps the support is fixed; None: by `finish`.
            decay: λ ≥ 0; λ z is added to the gradient of entries that are not chosen (SR-STE).
            seed: of the atoms that a decomposition draws.

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        _check(ratio, rank, density, latent, every, freeze, decay)
        self.every, self.freeze, self.decay, self.seed = every, freeze, decay, seed
        self.latent = latent
        size = size_rule(ratio, rank, density)
        super().__init__(
            model, optimizer, target_modules, exclude_modules,
            find=lambda root: coded_sites(root, size),
        )  # fmt: skip
        self.frozen = False
        self._entered = {site.name: 0 for site in self.attachment.sites}
        for site in self.attachment.sites:
            self.layers[site.name] = self._thaw(site, size)
        self.attachment.resized()

    @property
    def ranks(self) -> dict[str, int]:
        """r of every layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def counts(self) -> dict[str, int]:
        """s of every layer, the coefficients in a row."""
        return {name: layer.count for name, layer in self.layers.items()}

    def _thaw(self, site: Site, size: Callable[[Site], CodeSize | None]) -> Latent:
        """Put a latent in place of a layer."""
        old = site.module
        if isinstance(old, DenseSparseLinear):
            new = self._latent_of_code(old)
            self.attachment.put(site, new)
            remember_layout(new, old.layout)
        else:
            new = self._latent_of_dense(old, size(site) or (1, 1))
            self.attachment.put(site, new)
        noted = {"rank": new.rank, "count": new.count, "shape": list(site.shape)}
        self.attachment.note("attach", site.name, **noted)
        return new

    def _latent_of_code(self, old: DenseSparseLinear) -> Latent:
        value, index, rank = old.value.detach(), old.index.long(), old.rank
        atoms: nn.Parameter = old.basis.weight  # type: ignore[assignment]
        bias: nn.Parameter | None = old._parameters.get("bias")
        new: Latent
        carry: Carry | None = None
        if self.latent == "coefficients":
            new = LatentCoefficients(atoms, spread(value, index, rank), old.count, bias)
            carry = partial(spread, index=index, rank=rank)
        else:
            weight = nn.Parameter(old.dense_weight().detach())
            new = LatentWeight(atoms, weight, (value, index), bias)
        replace_parameter(self.attachment.optimizer, old.value, new.latent, carry)
        return new

    def _latent_of_dense(self, dense: nn.Module, size: CodeSize) -> Latent:
        weight = layouts.matrix(dense).detach()
        with full_precision(weight):
            code = linalg.dense_sparse_code(weight, *size, seed=self.seed)
            first = first_latent(weight.to(code.basis), code.coefficients(), code.basis)
        basis, value, first = agreed([t.to(weight).contiguous() for t in (*code[:2], first)])
        (index,) = agreed([code.atoms])
        atoms, optimizer = nn.Parameter(basis), self.attachment.optimizer
        old: nn.Parameter = dense.weight  # type: ignore[assignment]
        bias = dense._parameters.get("bias")
        new: Latent
        if self.latent == "coefficients":
            new = LatentCoefficients(atoms, first, size[1], bias)
            replace_parameter(optimizer, old, [new.latent, atoms])
            return new
        latent = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        new = LatentWeight(atoms, latent, (value, index), bias)
        turned = layouts.layout(dense) == "conv1d"
        replace_parameter(optimizer, old, latent, (lambda x: x.T) if turned else (lambda x: x))
        insert_parameters(optimizer, latent, [atoms])
        return new

    def on_gradients(self) -> None:
        strength = self.decay * self.attachment.loss_scale()
        for layer in self.layers.values() if self.decay else ():
            if isinstance(layer, LatentCoefficients) and layer.latent.grad is not None:
                layer.latent.grad.add_(layer.latent * ~layer.mask, alpha=strength)

    def on_step(self) -> None:
        if self.frozen:
            return
        if self.attachment.step % self.every == 0:
            for name, layer in self.layers.items():
                assert isinstance(layer, Latent)
                self._entered[name] += layer.choose()
        if self.attachment.step == self.freeze:
            self._freeze()

    def on_finish(self) -> None:
        if not self.frozen:
            self._freeze()

    def _freeze(self) -> None:
        """Every layer as a DenseSparseLinear; the moments of its coefficients stay."""
        for name, layer in self.layers.items():
            assert isinstance(layer, Latent)
            value, index = layer.code()
            new = DenseSparseLinear.from_code(layer.basis.weight, value, index, None)
            new.basis.weight, new.bias = layer.basis.weight, layer.bias  # the objects themselves
            remember_layout(new, layer.layout)
            coefficients = isinstance(layer, LatentCoefficients)
            carry = partial(torch.gather, dim=1, index=index) if coefficients else None
            replace_parameter(self.attachment.optimizer, layer.latent, new.value, carry)
            self.attachment.set(name, new)
            self.attachment.claim(name, new)
            self.layers[name] = new
            noted = {"rank": new.rank, "count": new.count, "entered": self._entered[name]}
            self.attachment.note("freeze", name, **noted)
        self.frozen = True
        self.attachment.resized()

    def leave(self, name: str, layer: Latent | DenseSparseLinear) -> None:
        noted = {"rank": layer.rank, "count": layer.count, "storage": "dense-sparse"}
        self.attachment.note("finish", name, **noted)

    def size_of(self, layer: Latent | DenseSparseLinear) -> int:
        return layer.rank

    def check_state(self, state: dict[str, Any]) -> None:
        policy = state["policy"]
        for name, layer in self.layers.items():
            saved, here = (state["sites"][name], policy["counts"][name]), (layer.rank, layer.count)
            if saved != here:
                raise LowrankError(
                    f"{name} has the size {saved} in this state and {here} here: build STF with "
                    "the sizes it was saved with"
                )
        if policy["latent"] != self.latent:
            raise LowrankError(f"this state was saved with latent={policy['latent']!r}")
        if self.frozen and not policy["frozen"]:
            raise LowrankError(
                "the support is not frozen in this state, but here it is: build STF on a fresh "
                "model, as when the run began"
            )

    def progress(self) -> dict[str, Any]:
        policy = {"frozen": self.frozen, "counts": self.counts, "latent": self.latent}
        return {"policy": {**policy, "entered": dict(self._entered)}}

    def resume(self, state: dict[str, Any]) -> None:
        if state["policy"]["frozen"] and not self.frozen:
            self._freeze()
        self._entered = dict(state["policy"]["entered"])


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
