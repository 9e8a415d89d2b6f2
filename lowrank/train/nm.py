"""N:M sparsity reached by degrees, while gradients still flow to the weights that will be pruned.

"Progressive gradient flow" (arXiv 2402.04744). The N largest of each M consecutive weights along
the inputs are kept; which ones is decided again in every step, and gradients go straight through
to all of them. After `dense` steps of plain training one of these takes `decay` steps, and then the
mask is binary (t counts from the end of the dense phase):

    MdGf, "linear" and "exponential": the others are scaled by β, 1 to 0.01: 1 − η t or exp(−η t)
    SdGf, "stepwise": (M−1):M, M/2:M, M/4:M, …, N:M in equal frames
          "geometric": 8N:8M, 4N:4M, 2N:2M, N:M;   "densify": N:8M, N:4M, N:2M, N:M
    SR-STE, the baseline: N:M at once, and λ w is added to the gradient of the others

Any weight can be trained so, also a factor. Against the authors' code: η follows from the length of
the phase, biases stay dense, convolutions group their input channels, and forward() is untouched:
between steps a module holds the masked weight, and a buffer beside it holds the trained one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import LowrankError, unknown
from ..linalg.nm import nm_bytes, nm_mask
from ..nn import DenseSparseLinear, LowRankLinear, LowRankSparseLinear
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns, find_sites
from .parts.factor_controller import FactorController

Way = Literal["linear", "exponential", "stepwise", "geometric", "densify", "sr-ste"]
Pattern = tuple[int, int]  # N, M
FACTORED = (LowRankLinear, LowRankSparseLinear, DenseSparseLinear)
LAST = 0.01  # β at the end of the decay
LATENT = "_latent"  # ends the name of the buffer beside a weight


class NM(FactorController):
    """N:M sparsity of weights or factors by decaying gradients, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        decay: int,
        dense: int = 0,
        pattern: Pattern = (2, 4),
        way: Way = "exponential",
        rate: float | None = None,
        strength: float = 2e-4,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """Begin the first phase with the chosen layers: dense ones, and factors of factored ones.

        Args:
            decay: steps of the second phase, at least 1; the mask is binary afterwards.
            dense: steps of plain training before it.
            pattern: N and M, 1 ≤ N < M.
            way: one of those above.
            rate: η of MdGf; None: β is 0.01 at the end of the decay.
            strength: λ of SR-STE.

        Raises:
            LowrankError: an option is out of range, no layer can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        _check(decay, dense, pattern, way, rate, strength)
        self.decay, self.dense, self.pattern, self.way = decay, dense, pattern, way
        self.rate, self.strength = rate, strength
        super().__init__(
            model, optimizer, target_modules, exclude_modules,
            find=_sparsifiable_sites, kinds={"linear", "conv"},
        )  # fmt: skip
        for _, module, key in self._weights():
            weight = module.get_parameter(key).detach()
            module.register_buffer(key + LATENT, weight.clone())
        self._holds = False  # whether the modules hold the trained weights, within a step
        self._apply(None)
        self.attachment.resized()

    @property
    def now(self) -> tuple[Pattern, float]:
        """The pattern of the next step, and β, by which all other weights are scaled."""
        return self._phase(self.attachment.step)

    def _phase(self, step: int) -> tuple[Pattern, float]:
        return phase(self.way, self.pattern, step - self.dense, self.decay, self.rate)

    def _weights(self) -> list[tuple[str, nn.Module, str]]:
        """The site of every weight, the module that holds it, and its name there."""
        weights = []
        for name, layer in self.layers.items():
            for key, parameter in layer.named_parameters():
                owner, _, own = key.rpartition(".")
                if parameter.ndim >= 2 and own != "value":  # coefficients are sparse already
                    weights.append((name, layer.get_submodule(owner), own))
        return weights

    def on_gradients(self) -> None:
        """For the length of the step the modules hold the trained weights."""
        penalised = self.way == "sr-ste" and self.attachment.step >= self.dense
        for name, module, key in self._weights():
            weight, latent = module.get_parameter(key), module.get_buffer(key + LATENT)
            if penalised and weight.grad is not None:
                others = ~self._mask(name, latent, self.pattern)
                scale = self.strength * self.attachment.loss_scale()
                weight.grad.add_(latent * others, alpha=scale)
            weight.copy_(latent)
        self._holds = True

    def on_skip(self) -> None:
        if self._holds:
            self._apply(None)

    def on_step(self) -> None:
        before = self._phase(self.attachment.step - 1)
        for _, module, key in self._weights() if self._holds else ():
            module.get_buffer(key + LATENT).copy_(module.get_parameter(key))
        self._apply(before)

    @torch.no_grad()
    def _apply(self, before: tuple[Pattern, float] | None) -> None:
        """Let the modules hold the masked weights of the next step."""
        pattern, share = self.now
        for name, module, key in self._weights():
            latent = module.get_buffer(key + LATENT)
            weight = latent.clone()
            if share < 1:
                weight *= torch.where(self._mask(name, latent, pattern), 1.0, share)
            module.get_parameter(key).copy_(weight)
        self._holds = False
        binary = share == 0 and (before is None or before[1] > 0)
        if before is not None and (before[0] != pattern or binary):
            for name in self.layers:
                self.attachment.note("pattern", name, n=pattern[0], m=pattern[1])

    def _mask(self, name: str, weight: Tensor, pattern: Pattern) -> Tensor:
        """Groups are of consecutive inputs; in a convolution of input channels at one point."""
        if weight.ndim > 2:
            return nm_mask(weight.movedim(1, -1), *pattern).movedim(-1, 1)
        if layouts.layout(self.layers[name]) == "conv1d":
            return nm_mask(weight.T, *pattern).T
        return nm_mask(weight, *pattern)

    def on_finish(self) -> None:
        """N:M, whatever the phase."""
        sizes: dict[str, list[int]] = {name: [0, 0, 0] for name in self.layers}
        for name, module, key in self._weights():
            weight = module.get_parameter(key)
            latent = weight if self._holds else module.get_buffer(key + LATENT)
            mask = self._mask(name, latent, self.pattern)
            weight.copy_(latent * mask)
            bytes_ = nm_bytes(mask, self.pattern[1], weight.element_size())
            both = zip(sizes[name], (weight.numel(), int(mask.sum()), bytes_), strict=True)
            sizes[name] = [a + b for a, b in both]
        for name, (numbers, kept, bytes_) in sizes.items():
            self.attachment.note("finish", name, kept=kept, of=numbers, bytes=bytes_)

    def leave(self, name: str, layer: nn.Module) -> None:
        """The layer as it is: plain, with zeros."""

    def on_close(self) -> None:
        for _, module, key in self._weights():
            delattr(module, key + LATENT)

    def check_state(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            saved, here = state["sites"][name], self.size_of(layer)
            if saved != here:
                raise LowrankError(f"{name} has rank {saved} in this state and {here} here")

    def resize(self, site: Site, size: int | None) -> None:
        """Sizes are fixed."""


def phase(
    way: str, pattern: Pattern, step: int, decay: int, rate: float | None = None
) -> tuple[Pattern, float]:
    """The pattern and β at `step` of the decay; (pattern, 1) before it begins."""
    if step < 0:
        return pattern, 1.0
    if step >= decay or way == "sr-ste":
        return pattern, 0.0
    if way == "linear":
        eta = (1 - LAST) / decay if rate is None else rate
        return pattern, max(0.0, 1 - eta * step)
    if way == "exponential":
        eta = -math.log(LAST) / decay if rate is None else rate
        return pattern, math.exp(-eta * step)
    every = frames(way, pattern)
    return every[step * len(every) // decay], 0.0


def frames(way: str, pattern: Pattern) -> list[Pattern]:
    """The patterns of SdGf, one after the other."""
    n, m = pattern
    if way != "stepwise":
        factors = (8, 4, 2, 1)
        return [(n * f if way == "geometric" else n, m * f) for f in factors]
    kept = [m - 1]
    while kept[-1] > n:
        half = m // 2 ** len(kept)
        kept.append(max(half, n))
    return [(k, m) for k in kept]


def _sparsifiable_sites(root: nn.Module) -> list[Site]:
    """Dense layers, and factored ones whose factors multiply along their inputs."""
    modules = [(name, m) for name, m in root.named_modules() if isinstance(m, FACTORED)]
    return find_sites(root) + [
        Site(name, (name,), "linear", (m,), (m.out_features, m.in_features), m.cost())
        for name, m in modules
    ]


def _check(
    decay: int, dense: int, pattern: Pattern, way: str, rate: float | None, strength: float
) -> None:
    if not isinstance(decay, int) or not isinstance(dense, int) or decay < 1 or dense < 0:
        raise LowrankError(f"need decay >= 1 and dense >= 0 steps, got {decay!r} and {dense!r}")
    whole = len(pattern) == 2 and all(isinstance(number, int) for number in pattern)
    if not whole or not 1 <= pattern[0] < pattern[1]:
        raise LowrankError(f"pattern is (N, M) with 1 <= N < M, such as (2, 4); got {pattern!r}")
    if way not in get_args(Way):
        raise unknown("way", str(way), get_args(Way))
    if rate is not None and (way not in ("linear", "exponential") or not rate > 0):
        raise LowrankError(f"rate > 0 belongs to 'linear' and 'exponential', got {rate} of {way!r}")
    if not strength >= 0:
        raise LowrankError(f"strength must be at least 0, got {strength}")
