"""DSL: a sparse model trained from the start, whose entries move to where they are needed.

Dynamic Sparse Learning (arXiv 2402.02855): a fixed number of weights counts at any time. Every few
steps the least of them are dropped and as many are taken up elsewhere, at the largest gradients, in
whichever layer these are, so that density moves between layers. The share that moves falls by a
cosine, α/2 (1 + cos π t/T), and is zero from step T on.

The rules are those of RigL (arXiv 1911.11134): least |w| in each layer, largest |dL/dw| of one
batch among all weights that do not count, new ones from zero. The start and α are ours. Training
gets no faster: gradients are dense. `finish` leaves `LowRankMaskedLinear` with rank one of zeros,
which the budget counts: it stores the numbers that count, and a bit for every weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..nn import LowRankMaskedLinear, low_rank_masked_cost, remember_layout
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.factor_controller import FactorController
from .parts.optimizer import insert_parameters, replace_parameter

KEPT = "weight_kept"  # the buffer beside a weight: which of its entries count


class DSL(FactorController):
    """Linear layers of few entries that move during training, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        ratio: float,
        steps: int,
        every: int = 20,
        share: float = 0.3,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """Set all but the largest entries of the chosen layers to zero, at one density.

        Args:
            ratio: share of the layers' numbers that are stored at the end, factors of zeros
                included, in (0, 1).
            steps: T, after which nothing moves any more.
            every: steps between two moves.
            share: α, of the entries of a layer that the first move drops, in (0, 1).

        Raises:
            LowrankError: an option is out of range, the ratio cannot be reached, no layer can be
                adapted, or `Attachment` refuses the model; model and optimizer are unchanged then.
        """
        _check(ratio, steps, every, share)
        self.ratio, self.steps, self.every, self.share = ratio, steps, every, share
        super().__init__(model, optimizer, target_modules, exclude_modules)
        self._slopes: dict[str, Tensor] = {}  # |dL/dw| of the batch before a move
        sites = self.attachment.sites
        density = entries_of(sites, ratio) / sum(math.prod(site.shape) for site in sites)
        for name, layer in self.layers.items():
            size = layer.get_parameter("weight").detach().abs()
            count = max(int(density * size.numel()), 1)
            layer.register_buffer(KEPT, linalg.largest(count)(size))
            self.attachment.note("attach", name, kept=count, of=size.numel())
        with torch.no_grad():
            self._hide()
        self.attachment.resized()

    @property
    def counts(self) -> dict[str, int]:
        """How many entries of every layer count."""
        return {name: int(kept.sum()) for name, _, kept in self._weights()}

    def check_sites(self) -> None:
        entries_of(self.attachment.sites, self.ratio)

    def _weights(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Name, weight as the layer holds it, and which of its entries count."""
        return [
            (name, layer.get_parameter("weight"), layer.get_buffer(KEPT))
            for name, layer in self.layers.items()
        ]

    def _share(self, step: int) -> float:
        """What moves after this step."""
        return moving(step, self.steps, self.every, self.share)

    def on_gradients(self) -> None:
        self._slopes = {}
        looks = self._share(self.attachment.step + 1) > 0
        for name, weight, kept in self._weights():
            if weight.grad is not None:
                if looks:
                    self._slopes[name] = weight.grad.abs()
                weight.grad.mul_(kept)

    def on_overflow(self) -> None:
        self._slopes = {}

    def on_skip(self) -> None:
        self._slopes = {}

    def on_step(self) -> None:
        self._hide()  # momentum goes on moving what was dropped
        share, slopes = self._share(self.attachment.step), self._slopes
        self._slopes = {}
        if share > 0 and slopes:
            self._move(share, slopes)

    def _hide(self) -> None:
        for _, weight, kept in self._weights():
            weight.mul_(kept)

    def _move(self, share: float, slopes: dict[str, Tensor]) -> None:
        """Drop entries in every layer, and take up as many at the largest gradients of all."""
        weights = [parts for parts in self._weights() if parts[0] in slopes]
        before, scores = self.counts, []
        for name, weight, kept in weights:
            count = max(before[name] - round(share * before[name]), 1)
            size = weight.abs().masked_fill(~kept, -1.0)  # zeros that count stay before others
            kept.copy_(linalg.largest(count)(size))
            scores.append(slopes[name].masked_fill(kept, -1.0).flatten())
        freed = sum(before[name] - int(kept.sum()) for name, _, kept in weights)
        taken = linalg.largest(freed)(torch.cat(scores))
        for (name, weight, kept), mine in zip(
            weights, taken.split([len(score) for score in scores]), strict=True
        ):
            left = int(kept.sum())
            kept |= mine.view_as(kept)
            weight.mul_(kept)
            count = int(kept.sum())
            moved = {"kept": count, "dropped": before[name] - left, "grown": count - left}
            self.attachment.note("move", name, **moved)

    def leave(self, name: str, layer: nn.Module) -> None:
        """The entries that count and a bit for each, or the dense layer where that is smaller."""
        matrix = layouts.matrix(layer).detach()
        turned = layouts.layout(layer) == "conv1d"
        kept = layer.get_buffer(KEPT).T if turned else layer.get_buffer(KEPT)
        (outs, ins), count = matrix.shape, int(kept.sum())
        small = low_rank_masked_cost(outs, ins, 1, count, itemsize=matrix.dtype.itemsize)
        dense = layouts.dense_cost(layer)
        if small.params >= dense.params or small.bytes >= dense.bytes:
            self.attachment.note("finish", name, kept=count, of=matrix.numel(), storage="dense")
            return
        down, up = matrix.new_zeros(1, ins), matrix.new_zeros(outs, 1)
        new = LowRankMaskedLinear.from_parts(down, up, matrix, kept, None)
        new.up.bias = layer._parameters.get("bias")  # type: ignore[assignment]  # the object
        remember_layout(new, layouts.layout(layer))
        optimizer, old = self.attachment.optimizer, layer.get_parameter("weight")
        replace_parameter(optimizer, old, new.sparse.weight)
        insert_parameters(optimizer, new.sparse.weight, [new.down.weight, new.up.weight])
        self.attachment.set(name, new)
        self.attachment.note(
            "finish", name, kept=count, of=matrix.numel(), storage=LowRankMaskedLinear.STORAGE
        )

    def on_close(self) -> None:
        for layer in self.layers.values():
            delattr(layer, KEPT)

    def check_state(self, state: dict[str, Any]) -> None:
        saved, here = state["policy"]["entries"], sum(self.counts.values())
        if saved != here:
            raise LowrankError(
                f"{saved} entries count in this state and {here} here: build DSL with the ratio "
                "it was saved with"
            )

    def size_of(self, layer: nn.Module) -> None:
        """Sizes are in the model's buffers."""

    def resize(self, site: Site, size: int | None) -> None:
        """Sizes are in the model's buffers."""

    def progress(self) -> dict[str, Any]:
        return {"policy": {"entries": sum(self.counts.values())}}


def moving(step: int, steps: int, every: int, share: float) -> float:
    """α/2 (1 + cos π t/T) at every so many steps t < T, else 0."""
    if step % every or step >= steps:
        return 0.0
    return share / 2 * (1 + math.cos(math.pi * step / steps))


def entries_of(sites: Sequence[Site], ratio: float) -> int:
    """The entries that a ratio leaves beside factors of rank one.

    Raises:
        LowrankError: fewer than one a layer.
    """
    whole = sum(math.prod(site.shape) for site in sites)
    factors = sum(sum(site.shape) for site in sites)
    entries = int(ratio * whole) - factors
    if entries < len(sites):
        least = (factors + len(sites)) / whole
        raise LowrankError(
            f"ratio {ratio} cannot be reached: factors of rank one and an entry a layer keep "
            f"{least:.4f}"
        )
    return entries


def _check(ratio: float, steps: int, every: int, share: float) -> None:
    if not 0 < ratio < 1:
        raise LowrankError(f"ratio is the share kept, in (0, 1), got {ratio}")
    for name, number in {"steps": steps, "every": every}.items():
        if not isinstance(number, int) or number < 1:
            raise LowrankError(f"{name} must be an integer >= 1, got {number!r}")
    if not 0 < share < 1:
        raise LowrankError(f"share is of a layer's entries, in (0, 1), got {share}")
