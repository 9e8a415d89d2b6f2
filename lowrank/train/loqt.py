"""LoQT: low-rank training over a quantised weight, merged now and then (arXiv 2405.16528).

W = q(W) + s·PB. q(W) has one byte a number and is not trained, P is a fixed orthonormal basis on
the smaller side of W, and only B (r, larger side) has a gradient and a state in the optimizer. At
the steps 0, T, T + ψT, … of a layer the sum is merged, P becomes the leading singular vectors of
the full gradient dL/dW of that step, and q and B are fitted anew, in turns, so that B makes up for
what quantisation loses.

Against the authors' code: layers take turns, so that the full gradient of only few of them is there
at any time; the optimizer's moments follow, m ← P′ᵀP m; gaps grow without an absolute cap; steps
are counted where the optimizer steps, not in forward(); q(W) is int8 with a scale a row (there NF4
on a GPU), P is not quantised. In the step that merges a layer, its B is not stepped on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg import svd
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.distributed import agreed, world
from .parts.factor_controller import FactorController
from .parts.optimizer import replace, two_sided
from .parts.quantised_weight import QuantisedLowRank, quantised, restored


class LoQT(FactorController):
    """Low-rank training over quantised weights, in the user's own loop.

    Attributes:
        history: one dict an event, with "step", "site", "event", and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        rank: int = 128,
        strength: float = 0.5,
        gap: int = 100,
        growth: float = 1.2,
        rounds: int = 5,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """Quantise the chosen layers, in the model and in the optimizer.

        Args:
            rank: r; where a layer's smaller side is less, that.
            strength: s > 0, of the product.
            gap: T, steps from a layer's first merge to its second.
            growth: ψ ≥ 1: what each gap is to the one before.
            rounds: of the fit of q and B, at least 1.

        Raises:
            LowrankError: an option is out of range, nothing can be adapted, or what `Attachment`
                refuses; the model and the optimizer are as they were.
        """
        if min(rank, gap, rounds) < 1:
            raise LowrankError(f"rank, gap and rounds must be >= 1, got {rank}, {gap}, {rounds}")
        if not strength > 0 or not growth >= 1:
            raise LowrankError(f"need strength > 0 and growth >= 1, got {strength} and {growth}")
        self.rank, self.strength, self.rounds = rank, strength, rounds
        self.gap, self.growth = gap, growth
        super().__init__(model, optimizer, target_modules, exclude_modules)
        self._plain: dict[str, nn.Module] = {}
        self._due: dict[str, int] = {}  # the step that merges a layer next
        self._merges: dict[str, int] = {}
        for number, site in enumerate(self._at.sites):
            self._plain[site.name] = site.module
            self._layers[site.name] = self._enter(site)
            self._due[site.name] = number * gap // len(self._at.sites)
            self._merges[site.name] = 0
        self._at.resized()
        self._collect()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of what is trained of every layer."""
        return {name: module.rank for name, module in self._quantised().items()}

    def _enter(self, site: Site) -> QuantisedLowRank:
        """The first basis are the leading directions of what quantisation loses."""
        dense = site.module
        weight = layouts.matrix(dense).detach()
        bias = dense._parameters.get("bias")
        new = QuantisedLowRank(weight, min(self.rank, *weight.shape), self.strength, bias)
        error = weight - restored(*quantised(weight))
        basis = agreed([self._basis(error, new)])[0]
        left = new.put(weight, basis, self.rounds)
        turned = (layouts.layout(dense) == "conv1d") == new.left
        side = two_sided(left=self.strength * basis.T.double())
        old: nn.Parameter = dense.weight  # type: ignore[assignment]
        replace(self._at.optimizer, old, new.factor, lambda x: side(x.T if turned else x))
        self._at.put(site, new)
        dense.weight = nn.Parameter(weight.new_zeros(0), requires_grad=False)  # frees its memory
        self._at.note("quantise", site.name, rank=new.rank, shape=list(site.shape), error=left)
        return new

    def _basis(self, matrix: Tensor, layer: QuantisedLowRank) -> Tensor:
        """Leading singular vectors (side, rank) on the side of the layer's basis."""
        found = svd.output_basis(matrix if layer.left else matrix.T, layer.rank)
        return found.to(layer.basis.dtype).contiguous()

    def _gradients(self) -> dict[str, Tensor | None]:
        full = {f"{name}.weight": layer.gathered for name, layer in self._quantised().items()}
        return super()._gradients() | full

    def _spoilt(self) -> None:
        self._collect()

    def _add(self) -> None:
        """Merge the layers whose turn it is."""
        for name, layer in self._quantised().items():
            if layer.collecting and layer.gathered is None:
                self._due[name] += 1  # it was not used: with the next step
            elif layer.collecting:
                self._merge(name, layer, _mean(layer.gathered))  # type: ignore[arg-type]

    def _merge(self, name: str, layer: QuantisedLowRank, gradient: Tensor) -> None:
        basis = agreed([self._basis(gradient, layer)])[0]
        turn = basis.double().T @ layer.basis.double()
        error = layer.put(layer.dense_weight(), basis, self.rounds)
        replace(self._at.optimizer, layer.factor, layer.factor, two_sided(left=turn))
        layer.factor.grad = None
        layer.collect(False)
        inside = basis.T @ (gradient if layer.left else gradient.T)
        whole, kept = float(gradient.square().sum()), float(inside.square().sum())
        share = kept / whole if whole > 0 else 1.0
        self._at.note("merge", name, rank=layer.rank, error=error, gradient_energy=share)
        self._due[name] += round(self.gap * self.growth ** self._merges[name])
        self._merges[name] += 1

    def _stepped(self) -> None:
        self._collect()

    def _collect(self) -> None:
        for name, layer in self._quantised().items():
            layer.collect(self._due[name] <= self._at.step)

    def _quantised(self) -> dict[str, QuantisedLowRank]:
        return {n: m for n, m in self._layers.items() if isinstance(m, QuantisedLowRank)}

    def _leave(self, name: str, module: nn.Module) -> None:
        """The layer that was there, with the merged weight; its bias stays the one it was."""
        assert isinstance(module, QuantisedLowRank)
        plain, weight = self._plain[name], module.dense_weight()
        if layouts.layout(plain) == "conv1d":
            weight = weight.T
        plain.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        replace(self._at.optimizer, module.factor, plain.weight)
        self._at.set(name, plain)
        self._at.note("finish", name, rank=module.rank, storage="dense")

    def _close(self) -> nn.Module:
        for layer in self._quantised().values():
            layer.collect(False)
        self._plain = {}
        return super()._close()

    def _resume(self, site: Site, rank: int | None) -> None:
        if rank != self.ranks[site.name]:
            raise LowrankError(
                f"{site.name} has rank {rank} in this state and {self.ranks[site.name]} here: "
                "build LoQT with the rank it was saved with"
            )

    def _policy(self) -> dict[str, Any]:
        return {"due": dict(self._due), "merges": dict(self._merges)}

    def _take(self, policy: dict[str, Any]) -> None:
        self._due, self._merges = dict(policy["due"]), dict(policy["merges"])
        self._collect()


def _mean(gradient: Tensor) -> Tensor:
    """Over all processes, as DDP does with gradients of parameters."""
    if world() > 1:
        torch.distributed.all_reduce(gradient)
        gradient /= world()
    return gradient
