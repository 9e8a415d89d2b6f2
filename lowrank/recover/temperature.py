"""The temperature of a compressed model's predictions (Guo et al., arXiv 1706.04599).

What compression adds to the logits is noise to a large part, so the model is too sure of itself
where its errors are large. One factor of the logits corrects that: the one of least held-out KL,
which is convex in it. It is multiplied into the weight of the norm that the output head reads, so
that nothing is added to the model. No architecture is assumed: whether a norm's weight scales the
logits is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..calibration.processes import from_first, in_step, mine, summed
from ..calibration.running import forward, predictions_of, quiet
from ..measure.eval import KL, Reference, divergence
from ..nn import is_factored
from ..nn.few_shapes import even_ranks
from .copies import Pairs, own_vectors

STEP = 0.1
FACTORS = tuple(round(0.5 + STEP * step, 2) for step in range(8))  # 0.5 to 1.2
LEAST = 0.002  # of the KL; smaller gains change nothing
TRIED = 3  # of the model's last norms
OFF = 0.25  # of the largest change; 16-bit models round


def temper(model: nn.Module, judge: Reference, pairs: Pairs) -> tuple[float, float]:
    """Scale a compressed model's logits by the factor of least KL on the judge's batches.

    Args:
        model: gets copies of its own of the parameters of the last norms.
        pairs: the copies; see `own_vectors`.

    Returns:
        The factor, 1 if nothing was changed: the outputs are no logits, the KL does not fall, or no
        norm scales them; and the KL before, NaN of what are no logits.
    """
    if not judge.can_judge() or judge.measure != KL:
        return 1.0, math.nan
    factor, before = best_factor(model, judge)
    if factor == 1.0:
        return 1.0, before
    for norm in _last_norms(model):
        own = own_vectors(norm, pairs)
        if _scales(model, norm, own, judge, factor):
            from_first(own)
            return factor, before
    return 1.0, before


def best_factor(model: nn.Module, judge: Reference) -> tuple[float, float]:
    """The factor of the logits of least mean KL to the reference, 1 if the KL hardly falls; and the
    KL without it."""
    device = next((p.device for p in model.parameters()), None)
    sums = torch.zeros(len(FACTORS) + 1, dtype=torch.float64, device=device)  # KL; positions

    def run() -> None:
        with quiet(model), even_ranks(model):
            for number in mine(range(len(judge.batches))):
                expected = judge.outputs(number)
                logits = predictions_of(model, forward(model, judge.batches[number]))[0].float()
                for index, factor in enumerate(FACTORS):
                    mask = judge.mask(number)
                    losses = divergence(expected, factor * logits.to(expected.device), mask)
                    sums[index] += losses.double().sum().to(sums.device)
                sums[-1] += losses.numel()

    in_step(run)
    summed(sums)
    means = (sums[:-1] / sums[-1]).tolist()
    least = min(range(len(FACTORS)), key=means.__getitem__)
    before = means[FACTORS.index(1.0)]
    if not means[least] < (1 - LEAST) * before:
        return 1.0, before
    return _between(least, means), before


def _between(least: int, means: Sequence[float]) -> float:
    """The lowest point of the parabola through the least of the means and its neighbours."""
    if not 0 < least < len(FACTORS) - 1:
        return FACTORS[least]
    before, at, after = means[least - 1 : least + 2]
    bend = before - 2 * at + after
    return FACTORS[least] + STEP * (before - after) / (2 * bend) if bend > 0 else FACTORS[least]


def _last_norms(model: nn.Module) -> Iterator[nn.Module]:
    """The last few modules that hold vectors alone, from the last one."""
    plain = [
        module
        for module in model.modules()
        if not is_factored(module)
        and next(module.children(), None) is None
        and (vectors := list(module.parameters()))
        and all(p.ndim == 1 and p.is_floating_point() for p in vectors)
    ]
    yield from plain[: -TRIED - 1 : -1]


def _scales(
    model: nn.Module, norm: nn.Module, own: Sequence[nn.Parameter], judge: Reference, factor: float
) -> bool:
    """Scale a norm's weight w, or 1 + w, and its bias, if that scales the logits."""
    batch = judge.batches[0]  # whole: a model may be made for batches of one size
    weight = norm._parameters.get("weight")
    with quiet(model), even_ranks(model), torch.no_grad():
        wanted = factor * predictions_of(model, forward(model, batch))[0]
        most = OFF * abs(1 - 1 / factor) * float(wanted.abs().max())
        before = [vector.clone() for vector in own]
        for more in (0.0, factor - 1):
            for vector, value in zip(own, before, strict=True):
                vector.copy_(factor * value + (more if vector is weight else 0.0))
            off = predictions_of(model, forward(model, batch))[0] - wanted
            if float(off.abs().max()) <= most:
                return True
        for vector, value in zip(own, before, strict=True):
            vector.copy_(value)
    return False
