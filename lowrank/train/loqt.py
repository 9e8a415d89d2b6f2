"""LoQT: low-rank training over a quantised weight, merged now and then (arXiv 2405.16528).

W = q(W) + s·PB. q(W) has one byte per number and is not trained, P is a fixed orthonormal basis on
the smaller side of W, and only B (r, larger side) has a gradient and a state in the optimizer. At
the steps 0, T, T + ψT, … of a layer the sum is merged, P becomes the leading singular vectors of
the full gradient dL/dW of that step, and q and B are fitted again, in turns, so that B makes up for
what quantisation loses.

Against the authors' code: layers take turns, so that only few full gradients are in memory at any
time; the optimizer's moments follow, m ← P′ᵀP m; gaps grow without an absolute cap; steps are
counted where the optimizer steps, not in forward(); q(W) is int8 with one scale per row (there NF4
on a GPU), P is not quantised. In the step that merges a layer, its B does not move.
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
from .parts.base_controller import BaseController
from .parts.distributed import agreed, world
from .parts.optimizer import both_sides, replace_parameter
from .parts.quantised_weight import QuantisedLowRank, from_int8, to_int8


class LoQT(BaseController[QuantisedLowRank]):
    """Low-rank training over quantised weights, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", and what was measured.
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
            rank: r; at most a layer's smaller side.
            strength: s > 0, the scale of the product.
            gap: T, steps from a layer's first merge to its second.
            growth: ψ ≥ 1, the ratio of each gap to the one before.
            rounds: of fitting q and B, at least 1.

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        if min(rank, gap, rounds) < 1:
            raise LowrankError(f"rank, gap and rounds must be >= 1, got {rank}, {gap}, {rounds}")
        if not strength > 0 or not growth >= 1:
            raise LowrankError(f"need strength > 0 and growth >= 1, got {strength} and {growth}")
        self.rank, self.strength, self.rounds = rank, strength, rounds
        self.gap, self.growth = gap, growth
        super().__init__(model, optimizer, target_modules, exclude_modules)
        sites = self.attachment.sites
        self._plain = {site.name: site.module for site in sites}  # for `finish`
        for site in sites:
            self.layers[site.name] = self._quantise(site)
        # The step that merges a layer next, and how often it was merged.
        self._due = {site.name: number * gap // len(sites) for number, site in enumerate(sites)}
        self._merges = {site.name: 0 for site in sites}
        self.attachment.resized()
        self._collect()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of the trained product of every layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def _quantise(self, site: Site) -> QuantisedLowRank:
        """The first basis has the leading directions of what quantisation loses."""
        dense = site.module
        weight = layouts.matrix(dense).detach()
        bias = dense._parameters.get("bias")
        new = QuantisedLowRank(weight, min(self.rank, *weight.shape), self.strength, bias)
        error = weight - from_int8(*to_int8(weight))
        basis = agreed([self._basis(error, new)])[0]
        left = new.put(weight, basis, self.rounds)
        turned = (layouts.layout(dense) == "conv1d") == new.left
        side = both_sides(left=self.strength * basis.T.double())
        carry = (lambda x: side(x.T)) if turned else side
        old: nn.Parameter = dense.weight  # type: ignore[assignment]
        replace_parameter(self.attachment.optimizer, old, new.factor, carry)
        self.attachment.put(site, new)
        dense.weight = nn.Parameter(weight.new_zeros(0), requires_grad=False)  # frees its memory
        noted = {"rank": new.rank, "shape": list(site.shape)}
        self.attachment.note("quantise", site.name, **noted, error=left)
        return new

    def _basis(self, matrix: Tensor, layer: QuantisedLowRank) -> Tensor:
        """Leading singular vectors (side, rank) on the side of the layer's basis."""
        basis = svd.output_basis(matrix if layer.left else matrix.T, layer.rank)
        return basis.to(layer.basis.dtype).contiguous()

    def gradients(self) -> dict[str, Tensor | None]:
        full = {f"{name}.weight": layer.gathered for name, layer in self.layers.items()}
        return super().gradients() | full

    def on_overflow(self) -> None:
        self._collect()

    def on_gradients(self) -> None:
        """Merge the layers whose turn it is."""
        for name, layer in self.layers.items():
            if layer.collecting and layer.gathered is None:
                self._due[name] += 1  # it was not used: with the next step
            elif layer.collecting:
                self._merge(name, layer, _mean(layer.gathered))  # type: ignore[arg-type]

    def _merge(self, name: str, layer: QuantisedLowRank, gradient: Tensor) -> None:
        basis = agreed([self._basis(gradient, layer)])[0]
        turn = basis.double().T @ layer.basis.double()
        error = layer.put(layer.dense_weight(), basis, self.rounds)
        carry = both_sides(left=turn)
        replace_parameter(self.attachment.optimizer, layer.factor, layer.factor, carry)
        layer.factor.grad = None
        layer.collect(False)
        inside = basis.T @ (gradient if layer.left else gradient.T)
        whole, kept = float(gradient.square().sum()), float(inside.square().sum())
        share = kept / whole if whole > 0 else 1.0
        noted = {"rank": layer.rank, "error": error, "gradient_energy": share}
        self.attachment.note("merge", name, **noted)
        self._due[name] += round(self.gap * self.growth ** self._merges[name])
        self._merges[name] += 1

    def on_step(self) -> None:
        self._collect()

    def _collect(self) -> None:
        for name, layer in self.layers.items():
            layer.collect(self._due[name] <= self.attachment.step)

    def leave(self, name: str, layer: QuantisedLowRank) -> None:
        """The layer that was there, with the merged weight; its bias stays the same object."""
        plain, weight = self._plain[name], layer.dense_weight()
        if layouts.layout(plain) == "conv1d":
            weight = weight.T
        plain.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        replace_parameter(self.attachment.optimizer, layer.factor, plain.weight)
        self.attachment.set(name, plain)
        self.attachment.note("finish", name, rank=layer.rank, storage="dense")

    def on_close(self) -> None:
        for layer in self.layers.values():
            layer.collect(False)
        self._plain = {}

    def size_of(self, layer: QuantisedLowRank) -> int:
        return layer.rank

    def check_state(self, state: dict[str, Any]) -> None:
        for name, rank in self.ranks.items():
            if state["sites"][name] != rank:
                raise LowrankError(
                    f"{name} has rank {state['sites'][name]} in this state and {rank} here: "
                    "build LoQT with the rank it was saved with"
                )

    def progress(self) -> dict[str, Any]:
        return {"policy": {"due": dict(self._due), "merges": dict(self._merges)}}

    def resume(self, state: dict[str, Any]) -> None:
        policy = state["policy"]
        self._due, self._merges = dict(policy["due"]), dict(policy["merges"])
        self._collect()


def _mean(gradient: Tensor) -> Tensor:
    """Over all processes, as DDP does with gradients of parameters."""
    if world() > 1:
        torch.distributed.all_reduce(gradient)
        gradient /= world()
    return gradient
