"""InRank: ranks that grow with what training explains (arXiv 2306.11250, "InRank-Efficient").

W = UV starts with a few components and a buffer of further ones. Every `every` steps the singular
values s of UV are taken; the smallest k whose leading values explain enough of their variance,

    1 − var(s − s_k) / var(s) > share,   s_k = s with zeros after the k-th,

becomes the rank, if it is above the present one, and the buffer moves behind it. At the end, or
after `steps`, UV is cut to its rank by an SVD.

Against the authors' code: the rank is decided outside of forward(), factors have their true sizes,
and the buffer grows without changing UV (its new columns of U are zero; there the untrained end of
the first initialisation is switched on).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg import svd
from ..linalg.gram import full_precision
from ..nn import LowRankLinear
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.compressed import PLAIN, held_rank
from .parts.factor_controller import FactorController
from .parts.factors import resize
from .parts.wrappers import inner_optimizer


class InRank(FactorController):
    """Low-rank training whose ranks only grow, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", rank, and what was measured.
    """

    TAKES = PLAIN

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        rank: int = 2,
        buffer: int = 100,
        share: float = 0.9,
        warmup: int = 200,
        every: int = 25,
        steps: int | None = None,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        seed: int = 0,
    ) -> None:
        """Replace the chosen layers by factors of rank `rank + buffer`, of the weight's SVD.

        Args:
            rank: at the start; of a layer that is factored already it is the rank that it has.
            buffer: components that train beyond the rank; no layer gets more than half of
                min(out, in) in all, as in the paper.
            share: of the variance of singular values, in (0, 1).
            warmup: steps before the first decision.
            every: steps between decisions.
            steps: after these the ranks are final and the buffers are cut; None: by `finish`.

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        if not 0 < share < 1:
            raise LowrankError(f"share of explained variance must be in (0, 1), got {share}")
        if rank < 1 or buffer < 1 or every < 1 or warmup < 0:
            got = f"{rank}, {buffer}, {every} and {warmup}"
            raise LowrankError(f"need rank, buffer, every >= 1 and warmup >= 0, got {got}")
        if steps is not None and steps < 1:
            raise LowrankError(f"steps must be at least 1, got {steps}")
        self.buffer, self.share, self.warmup, self.every = buffer, share, warmup, every
        self.steps, self.seed = steps, seed
        super().__init__(model, optimizer, target_modules, exclude_modules)
        most = {site.name: max(min(site.shape) // 2, 1) for site in self.attachment.sites}
        ranks = {site.name: held_rank(site.module) for site in self.attachment.sites}
        had = {name: held for name, held in ranks.items() if held is not None}
        self._explained = {name: min(rank, limit) for name, limit in most.items()} | had
        self.factor({name: min(rank + buffer, limit) for name, limit in most.items()} | had)
        for name in had:  # the SVD of factors has nothing beyond their rank
            self._widen(name, self.factored[name])
        self.attachment.resized()
        self._final = False

    @property
    def explained(self) -> dict[str, int]:
        """The rank decided so far, by layer; the layer itself is wider by its buffer."""
        return dict(self._explained)

    def on_step(self) -> None:
        step = self.attachment.step
        if self._final:
            return
        if step > self.warmup and (step - self.warmup) % self.every == 0:
            for name, module in self.factored.items():
                self._decide(name, module)
            self.attachment.resized()
        if step == self.steps:
            self._cut()
            self.attachment.resized()

    def _decide(self, name: str, module: LowRankLinear) -> None:
        values = svd.energies(module.dense_weight(torch.float64))[: module.rank].sqrt()
        old = self._explained[name]
        self._explained[name] = max(old, min(explaining(values, self.share), module.rank))
        self._widen(name, module)
        if self._explained[name] != old:
            self.attachment.note("grow", name, rank=self._explained[name], width=module.rank)

    def _widen(self, name: str, module: LowRankLinear) -> None:
        """The buffer behind the rank, where there is room for it."""
        most = max(min(module.out_features, module.in_features) // 2, 1)
        wide = min(self._explained[name] + self.buffer, most)
        if wide > module.rank:
            self._grow(name, module, wide)

    def _grow(self, name: str, module: LowRankLinear, width: int) -> None:
        """More components: rows of V as nn.Linear draws them, columns of U zero."""
        up, down = module.up.weight, module.down.weight
        more = width - module.rank
        number = list(self.layers).index(name)
        seed = (self.seed * 1_000_003 + self.attachment.step) * 1_009 + number
        generator = torch.Generator().manual_seed(seed % 2**63)
        drawn = torch.rand(more, down.shape[1], generator=generator, dtype=torch.float64) * 2 - 1
        rows = (drawn / math.sqrt(down.shape[1])).to(down)
        columns = up.new_zeros(up.shape[0], more)
        resize(self.attachment, module, torch.cat([down, rows]), torch.cat([up, columns], 1))

    def on_finish(self) -> None:
        if not self._final:
            self._cut()

    def _cut(self) -> None:
        """Every layer to its rank: the ranks are final."""
        self._final = True
        for name, module in self.factored.items():
            rank = self._explained[name]
            if rank < module.rank:
                with full_precision(module.up.weight):
                    up, down = svd.factor(module.dense_weight(torch.float64), rank)
                resize(self.attachment, module, down, up)
                self._forget(module)
            self.attachment.note("cut", name, rank=rank)

    def _forget(self, module: LowRankLinear) -> None:
        """Drop the moments of components that the SVD has mixed."""
        for weight in (module.up.weight, module.down.weight):
            inner_optimizer(self.attachment.optimizer).state.pop(weight, None)

    def progress(self) -> dict[str, Any]:
        return {"policy": {"explained": self.explained, "final": self._final}}

    def resume(self, state: dict[str, Any]) -> None:
        self._explained = dict(state["policy"]["explained"])
        self._final = state["policy"]["final"]


def explaining(values: Tensor, share: float) -> int:
    """The smallest k whose leading values leave less than 1 − share of the variance of all."""
    variance = float(values.var(correction=0))
    if variance == 0:  # one value, or all alike: none stands out
        return len(values)
    for rank in range(1, len(values)):
        rest = values.clone()
        rest[:rank] = 0
        if 1 - float(rest.var(correction=0)) / variance > share:
            return rank
    return len(values)
