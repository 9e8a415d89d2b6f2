"""GBLR: structured matrices learned with their budget (arXiv 2310.18882, "Gaudi").

W = Σ_k (m_k ∘ u_k)(m'_k ∘ v_k)ᵀ: rank-one blocks, each mask a run of rows or columns with a width
and a start. Low rank, block-diagonal and block low-rank matrices are special cases. The masks are
written in the frequency domain, where widths and starts have gradients (linalg/gaudi.py); u and v
are trained by the user's optimizer, widths and starts by Adam with β₁ = 0, and after every step the
widths of all layers are soft-thresholded,

    w ← clip(w − τ, 0, 1),

which moves numbers from blocks, and layers, that earn little to those that earn more. After `steps`
the blocks are fixed, and u and v train on.

Here τ is the least that keeps all layers together within a budget, which falls on a straight line
to `ratio`; in the paper it is `strength` · `rate` until a mean width is reached. Against the
authors' code: the start is closed form and holds the weight as well as low rank of that size does
(there a greedy search and a thousand steps); off its block a term begins with what would fit the
weight if the block grew (there whatever it held); widths are rounded with the size of their own
side (there columns use that of rows); and what is left are the blocks alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import LowrankError
from ..io.merging import densify
from ..linalg import BlockTerms, beyond_runs, block_terms, shrunk, svd, whole_widths
from ..nn import BlockLowRankLinear, LowRankLinear, remember_layout
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.attachment import weights_of
from .parts.base_controller import BaseController
from .parts.budget import least_tolerance
from .parts.compressed import PLAIN, held_rank, matrix_of, stored_like
from .parts.distributed import agreed
from .parts.gaudi_form import GaudiLinear
from .parts.optimizer import replace_parameter, replace_weights

LEAST = 2  # numbers of the smallest block
SHARP = 100.0  # σ at the end of the smoothing


class GBLR(BaseController[GaudiLinear]):
    """Training of sums of rank-one blocks, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", rank and numbers of the blocks.
    """

    TAKES = (*PLAIN, BlockLowRankLinear)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        ratio: float = 0.5,
        steps: int = 1000,
        start: float | None = None,
        rate: float = 1e-3,
        strength: float | None = None,
        sigma: float | None = None,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """Replace the chosen layers by rank-one blocks, in the model and in the optimizer.

        The optimizer holds widths and starts too, and never steps on them. Clipping by the norm of
        all gradients sees theirs.

        Args:
            ratio: keep at most this share of the numbers that the chosen weights have, or would
                have dense, in (0, 1).
            steps: in which the blocks are found; after them, or in `finish`, they are fixed within
                the budget.
            start: the share that every weight has at the start, at least `ratio`; None is that.
                Factors and blocks that are there already begin as they are.
            rate: of Adam on widths and starts, in fractions of a side.
            strength: λ of the paper, τ = λ · rate while the budget is exceeded; None: by the line.
            sigma: σ of the masks at the first step, which rises to 100 by the last one; None
                switches the smoothing off. The paper uses 1 from scratch, and none for fine-tuning.

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        if not 0 < ratio < 1:
            raise LowrankError(f"ratio must be in (0, 1), got {ratio}")
        if start is not None and not ratio <= start <= 2:
            raise LowrankError(f"start must be in [ratio, 2], got {start} for ratio {ratio}")
        if steps < 1:
            raise LowrankError(f"steps must be at least 1, got {steps}")
        if not 0 <= rate < 1:
            raise LowrankError(f"rate is in fractions of a side, in [0, 1), got {rate}")
        if strength is not None and not strength > 0:
            raise LowrankError(f"strength must be above 0, got {strength}")
        if sigma is not None and not 0 < sigma <= SHARP:
            raise LowrankError(f"sigma must be in (0, {SHARP:g}], got {sigma}")
        self.ratio, self.steps, self.rate = ratio, steps, rate
        self.start, self.strength, self.sigma = start or ratio, strength, sigma
        super().__init__(model, optimizer, target_modules, exclude_modules)
        for site in list(self.attachment.sites):
            self.layers[site.name] = self._as_blocks(site)
        self._began, self._fixed = self.numbers, False
        self.attachment.resized()

    @property
    def ranks(self) -> dict[str, int]:
        """The number of blocks of every adapted layer now."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def numbers(self) -> int:
        """Numbers within the blocks of all layers now."""
        return sum(layer.numbers for layer in self.layers.values())

    def check_sites(self) -> None:
        self._whole = sum(math.prod(site.shape) for site in self.attachment.sites)
        smallest = LEAST * len(self.attachment.sites)
        if smallest > self.ratio * self._whole:
            raise LowrankError(
                f"ratio {self.ratio} cannot be reached: with one number a side the chosen layers "
                f"keep {smallest / self._whole:.4f}; choose other layers"
            )

    def _as_blocks(self, site: Site) -> GaudiLinear:
        old, like = site.module, stored_like(site.module)
        weight = matrix_of(old)
        terms = held_terms(old)
        if terms is None:
            found = block_terms(weight, int(self.start * weight.numel()))
            up, down = beyond_runs(weight, found)
            terms = found._replace(up=up, down=down)
        terms = BlockTerms(*agreed([t.to(like.device).contiguous() for t in terms]))
        terms = terms._replace(up=terms.up.to(like), down=terms.down.to(like))
        new = GaudiLinear.of(terms, layouts.bias(old), self.sigma or math.inf)  # type: ignore[arg-type]
        parts = [new.up, new.down, new.widths, new.starts]
        replace_weights(self.attachment.optimizer, weights_of(old), parts)
        self.attachment.put(site, new)
        left = weight - new.eval().dense_weight(weight.dtype).detach()
        new.train(old.training)
        whole, lost = (float(t.double().square().sum()) for t in (weight, left))
        self.attachment.note(
            "attach", site.name, rank=new.rank, shape=list(site.shape), numbers=new.numbers,
            energy_lost=lost / whole if whole > 0 else 0.0,
        )  # fmt: skip
        return new

    def on_gradients(self) -> None:
        if not self._fixed:
            for layer in self.layers.values():
                layer.gather(self.attachment.loss_scale())

    def on_overflow(self) -> None:
        for layer in self.layers.values():
            layer.forget()

    def on_skip(self) -> None:
        self.on_overflow()

    def on_step(self) -> None:
        if self._fixed:
            return
        step = self.attachment.step
        for layer in self.layers.values():
            layer.descend(self.rate, step)
        self._shrink(self._threshold(min(step / self.steps, 1)))
        if self.sigma is not None:
            risen = self.sigma * (SHARP / self.sigma) ** (step / self.steps)
            for layer in self.layers.values():
                layer.sigma.fill_(risen)
        if step >= self.steps:
            self._fix()

    def _threshold(self, share: float) -> float:
        """τ of this step, after this share of all."""
        limit = self.ratio * self._whole
        if self.strength is not None:
            return self.strength * self.rate if self.numbers > limit else 0.0
        return self._least(max(limit, self._began + (limit - self._began) * share))

    def _least(self, limit: float) -> float:
        """The least threshold at which all layers are within the limit."""
        layers = list(self.layers.values())  # on the CPU: their devices may differ
        widths = torch.cat([layer.widths.detach().cpu() for layer in layers], 1)
        sizes = torch.cat([layer.sizes.cpu().expand_as(layer.widths) for layer in layers], 1)
        owner = torch.arange(len(layers)).repeat_interleave(torch.tensor([m.terms for m in layers]))

        def size(threshold: float) -> int:
            each = whole_widths(shrunk(widths, threshold), sizes).sum(0)
            every = each.new_zeros(len(layers)).index_add(0, owner, each)
            return int(every.clamp(min=LEAST).sum())  # an empty layer keeps a zero

        return least_tolerance(size, 0.0, limit)

    def _shrink(self, threshold: float) -> None:
        for layer in self.layers.values() if threshold else ():
            layer.shrink(threshold)

    def _fix(self) -> None:
        """Bring all layers within the budget, and drop empty blocks: they are final."""
        threshold = self._least(self.ratio * self._whole)
        self._shrink(threshold)
        self._fixed = True
        for name, layer in self.layers.items():
            terms = layer.whole_terms()
            self._set(layer, terms)
            self.attachment.note(
                "fix", name, rank=layer.rank, numbers=layer.numbers, threshold=threshold
            )
        self.attachment.resized()

    def _set(self, layer: GaudiLinear, terms: BlockTerms) -> None:
        """Fixed blocks, in model and optimizer; moments of u and v follow their terms."""
        alive = (layer.whole > 0).all(0).nonzero()[:, 0]
        alive = alive if len(alive) else alive.new_zeros(1)
        old = [layer.up, layer.down, layer.widths, layer.starts]
        widths, starts = (whole / layer.sizes for whole in (terms.widths, terms.starts))
        layer.set_terms(terms.up, terms.down, widths, starts, layer.squares[..., alive])
        optimizer = self.attachment.optimizer
        replace_parameter(optimizer, old[0], layer.up, lambda x: x[:, alive.to(x.device)])
        replace_parameter(optimizer, old[1], layer.down, lambda x: x[alive.to(x.device)])
        replace_parameter(optimizer, old[2], layer.widths)
        replace_parameter(optimizer, old[3], layer.starts)
        _hold(layer)

    def on_epoch(self) -> None:
        for name, layer in self.layers.items():
            self.attachment.note("epoch", name, rank=layer.rank, numbers=layer.numbers)

    def on_finish(self) -> None:
        if not self._fixed:
            self._fix()

    def leave(self, name: str, layer: GaudiLinear) -> None:
        """The blocks; plain factors where all are whole, the dense layer where it is not larger."""
        terms, optimizer = layer.whole_terms(), self.attachment.optimizer
        new: Any = BlockLowRankLinear.from_terms(*terms, None)
        holder, storage = new, "block-lowrank"
        if bool((terms.widths == layer.sizes).all()):
            new, storage = LowRankLinear.from_factors(terms.down, terms.up, None), "factors"
            holder = new.up
        remember_layout(new, layer.layout)
        if terms.numbers >= layer.in_features * layer.out_features:
            new = holder = densify(new)
            storage = "dense"
        holder.bias = layer.bias  # the object itself: its state in the optimizer stays
        replace_parameter(optimizer, layer.up, weights_of(new))
        for part in (layer.down, layer.widths, layer.starts):
            replace_parameter(optimizer, part, [])
        self.attachment.set(name, new)
        self.attachment.note(
            "finish", name, rank=terms.widths.shape[1], numbers=terms.numbers, storage=storage
        )

    def size_of(self, layer: GaudiLinear) -> int:
        return layer.terms

    def resize(self, site: Site, size: int) -> None:
        layer = self.layers[site.name]
        old = [layer.up, layer.down, layer.widths, layer.starts]
        zeros = layer.widths.new_zeros
        layer.set_terms(
            zeros(layer.out_features, size), zeros(size, layer.in_features), zeros(2, size),
            zeros(2, size), zeros(2, 2, size),
        )  # fmt: skip
        new = [layer.up, layer.down, layer.widths, layer.starts]
        for before, after in zip(old, new, strict=True):
            replace_parameter(self.attachment.optimizer, before, after)

    def progress(self) -> dict[str, Any]:
        return {"policy": {"began": self._began, "fixed": self._fixed}}

    def resume(self, state: dict[str, Any]) -> None:
        self._began, self._fixed = state["policy"]["began"], state["policy"]["fixed"]
        for layer in self.layers.values() if self._fixed else ():
            _hold(layer)


def held_terms(layer: nn.Module) -> BlockTerms | None:
    """The blocks of a layer that is factored already, exactly; None if it is dense."""
    if isinstance(layer, BlockLowRankLinear):
        places = torch.stack([layer.up.place, layer.down.place.to(layer.up.place)]).long()
        starts, widths = places.unbind(2)  # (2, K) each
        return BlockTerms(layer.up.dense().T.detach(), layer.down.dense().detach(), starts, widths)
    rank = held_rank(layer)
    if rank is None:
        return None
    up, down = svd.factor(matrix_of(layer), rank)
    starts = torch.zeros(2, up.shape[1], dtype=torch.int64, device=up.device)
    sizes = starts.new_tensor([[len(up)], [down.shape[1]]])
    return BlockTerms(up, down, starts, sizes.expand_as(starts))


def _hold(layer: GaudiLinear) -> None:
    layer.widths.requires_grad_(False)
    layer.starts.requires_grad_(False)
    layer.sigma.fill_(math.inf)
