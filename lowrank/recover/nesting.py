"""Distillation over sampled ranks: factors of which every truncation is a good model.

Each step runs the compressed model with a ratio drawn from a range, by masks on the inputs of `up`,
so that the first components serve all smaller models too: ordered dropout (Maestro, arXiv
2308.14929) of a weight-shared super-model (AutoDistil, arXiv 2201.12507). What is minimised is the
mean over ratios of the logarithm of the loss: at small ratios losses are many times larger, and
their plain mean would leave large ratios to themselves. Ratios are drawn by a sequence that covers
the range evenly in few steps, and steps are half as long as those for one size, which what serves
the largest ratio would not survive (benchmarks/nested.py). The logarithm, the range and both of
these are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .components import Components
from .training import Loss

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TINY = 1e-30  # below any loss: its logarithm is finite
JUDGED = 3  # ratios that states are compared at
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, leave no gap for long
SLOWER = 0.5  # of the rate of distillation for one size


class Nesting:
    """Cuts the layers of a model while it is trained, to ratios between two.

    Attributes:
        ratios: those that states are compared at: the least, the most, and in between.
    """

    def __init__(self, model: nn.Module, least: float, *, left: int = 0, seed: int = 0) -> None:
        """
        Args:
            least: the least ratio; the most is what the model holds.
            left: see `Components.of`.

        Raises:
            LowrankError: no layer can be cut, or the model cannot be cut to the least ratio.
        """
        self._parts = Components.of(model, left)
        self._parts.ranks(least)
        most = float(self._parts.held)
        steps = range(JUDGED)
        self.ratios = [least + (most - least) * step / (JUDGED - 1) for step in steps]
        generator = torch.Generator().manual_seed(seed)
        self._span, self._drawn = (least, most), float(torch.rand((), generator=generator))
        self._widths = [torch.tensor(stack.rank) for stack in self._parts.stacks]

    def __str__(self) -> str:
        return f"mean over ratios {', '.join(f'{ratio:.2g}' for ratio in self.ratios)}"

    @contextmanager
    def over(self, loss: Loss) -> Iterator[Loss]:
        """A context with a loss over ratios in place of one at the ranks that the layers have:
        with gradients the logarithm at one that is drawn, else the geometric mean of those judged.
        """
        least, most = self._span

        def nested(batch: int) -> Tensor:
            if torch.is_grad_enabled():
                self._drawn = (self._drawn + GOLDEN) % 1
                self._cut_to(least + (most - least) * (1 - math.cos(math.pi * self._drawn)) / 2)
                return loss(batch).clamp_min(TINY).log()
            return torch.tensor(self._mean(lambda: float(loss(batch))))

        with self._hooked():
            yield nested

    def mean_of(self, measured: Callable[[], float]) -> float:
        """The geometric mean of a measure of the model, over the ratios."""
        with self._hooked():
            return self._mean(measured)

    def _mean(self, measured: Callable[[], float]) -> float:
        logs = []
        for ratio in self.ratios:
            self._cut_to(ratio)
            logs.append(math.log(max(measured(), TINY)))
        return math.exp(sum(logs) / len(logs))

    def _cut_to(self, ratio: float) -> None:
        ranks = self._parts.most if ratio >= self._span[1] else self._parts.ranks(ratio)
        for width, rank in zip(self._widths, ranks, strict=True):
            width.fill_(rank)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """A context in which the layers have the ranks that were set last."""
        hooks = [
            layer._modules["up"].register_forward_pre_hook(_hiding(width, stack.rank))  # type: ignore[union-attr]
            for stack, width in zip(self._parts.stacks, self._widths, strict=True)
            for layer in stack.layers.values()
            if "up" in layer._modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _hiding(width: Tensor, rank: int) -> Callable[[nn.Module, Any], Any]:
    """A hook that hides the components beyond a width from `up`.

    Args:
        rank: number of components, of each group of a convolution.
    """

    def hide(up: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (inner,) = inputs  # (..., rank), or (..., groups · rank, *space)
        space = len(up.kernel_size) if isinstance(up, CONVS) else 0
        places = torch.arange(inner.shape[-1 - space], device=inner.device) % rank
        kept = (places < width.to(inner.device)).view(-1, *[1] * space)
        return (inner * kept.to(inner.dtype),)

    return hide
