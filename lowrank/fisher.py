"""Output gradients: the true Fisher of every layer, with labels drawn from the model itself.

One backward pass over the calibration data. The loss of a position is the cross entropy to a label
drawn from the model's own prediction there, so that E[g gᵀ] is the Fisher information and no labels
are needed. K-FAC (arXiv 1503.05671) takes the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import sites as walk
from .calibrate import Calibration, counted_rows
from .data import Batch, forward, logits_of, mask_of, rebatched
from .errors import LowrankError
from .linalg import gram_sum
from .observe import quiet
from .streams import without_cache
from .types import Site

ROWS = 16  # of a backward pass
FISHER = frozenset({"out_gram", "row_fisher"})  # what methods that need this pass say


def with_fisher(
    model: nn.Module, seen: Calibration, *, seed: int = 0, progress: bool = False
) -> Calibration:
    """The calibration with `out_gram` and `row_fisher` of every linear site that it saw.

    Args:
        seed: of the labels, drawn on the CPU.

    Returns:
        A new Calibration; the same one where the figures are there already.

    Raises:
        LowrankError: the data is a callable, the model gives no logits, or a gradient is not
            finite (its site is named).
    """
    if any(stats.out_gram is not None for stats in seen.statistics.values()):
        return seen
    if callable(seen.batches):
        raise LowrankError("output gradients need batches, not a callable: pass tensors or dicts")
    sites = [
        site
        for site in walk.find(model)
        if site.kind == "linear" and not site.reason and seen.statistics.get(site.name)
        and seen.statistics[site.name].count
    ]  # fmt: skip
    sums = _gather(model, sites, rebatched(seen.batches, ROWS), seed, progress)
    found = dict(seen.statistics)
    for site in sites:
        gram, fisher, sequences = sums[site.name]
        stats = found[site.name]
        found[site.name] = replace(
            stats, out_gram=gram / max(stats.count, 1), row_fisher=fisher / max(sequences, 1)
        )
    return replace(seen, statistics=found)


Sums = dict[str, tuple[Tensor, Tensor, int]]


def _gather(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], seed: int, progress: bool
) -> Sums:
    from tqdm.auto import tqdm

    generator = torch.Generator().manual_seed(seed)
    taps = [_Tap(site) for site in sites]
    with quiet(model), without_cache(model), _differentiable(model), _hooked(taps):
        for batch in tqdm(batches, "fisher", delay=2, disable=not progress, leave=False):
            mask = mask_of(batch)
            with torch.enable_grad():
                loss = _sampled_loss(logits_of(forward(model, batch)), mask, generator)
                outputs = [(tap, out) for tap in taps for _, out in tap.calls]
                gradients = torch.autograd.grad(
                    loss, [out for _, out in outputs], allow_unused=True
                )
            for (tap, out), gradient in zip(outputs, gradients, strict=True):
                tap.add(out, gradient, mask)
            for tap in taps:
                tap.calls.clear()
    return {tap.site.name: (tap.gram, tap.rows, tap.sequences) for tap in taps}


class _Tap:
    """Inputs and outputs of one site in the pass at hand, and its sums."""

    def __init__(self, site: Site) -> None:
        self.site = site
        out = site.shape[0]
        self.gram = torch.zeros(out, out, dtype=torch.float64)
        self.rows = torch.zeros(out, dtype=torch.float64)
        self.sequences = 0
        self.calls: list[tuple[Tensor, Tensor]] = []

    def hook(self, _module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A tensor of its own: the next layer may change the output in place.
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.calls.append((args[0].detach(), output))
        return output.view_as(output)

    def add(self, output: Tensor, gradient: Tensor | None, mask: Tensor | None) -> None:
        x = next(x for x, out in self.calls if out is output)
        if gradient is None:  # nothing that was predicted depends on it
            return
        total = gram_sum(counted_rows(gradient, mask)).cpu()
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise LowrankError(f"{self.site.title}: the gradient of its output holds NaN or Inf")
        self.gram += total
        # Per sequence, as the Fisher of a weight is: the gradient of one sequence, squared.
        g, x = (t.float().reshape(len(t), -1, t.shape[-1]) for t in (gradient, x))
        self.rows += torch.einsum("bto,bti->boi", g, x).double().square().sum((0, 2)).cpu()
        self.sequences += len(g)


def _sampled_loss(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Σ cross entropy to labels drawn from the logits (…, classes) themselves."""
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.to(logits.device)]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)
    return cross_entropy(flat, labels.flatten().to(flat.device), reduction="sum")


@contextmanager
def _hooked(taps: Sequence[_Tap]) -> Iterator[None]:
    handles = [m.register_forward_hook(tap.hook) for tap in taps for m in tap.site.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tap in taps:
            tap.calls.clear()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; flags are put back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
