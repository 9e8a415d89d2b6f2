"""Block refit: train a block's factors, norms and biases to match the dense block's output.

The block reads the compressed stream, and its target is the dense block's output on the dense
stream, so that it also corrects the error of earlier blocks: the block reconstruction objective of
AA-SVD. A block whose held-out loss does not fall is left unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.chain import Chain
from ..calibration.running import forward, predictions_of, quiet
from ..measure.eval import Reference, divergence
from ..nn.few_shapes import even_ranks
from .budget import fit_within
from .images import changed
from .nesting import SLOWER, Nesting
from .optimizer import ADAMW, MUON
from .training import Trained, Training, mean_of, split

RATES = {MUON: 0.008, ADAMW: 0.01}  # of distillation, from far away and in large batches
PREDICTIONS = 4096  # of such a batch: 16 rows of 256 tokens
NEAR = 0.2  # distance from the dense model below which Muon's rate falls no further


def refit_block(
    lean: Chain,
    index: int,
    targets: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    masks: Sequence[Tensor | None],
    options: Training,
    fitted: int | None = None,
    seconds: float | None = None,
) -> Trained:
    """Train one block of the compressed chain.

    Args:
        targets: the dense block's outputs, one tensor per batch, shaped like the hidden states.
        parameters: those to train, all in the block.
        masks: True at the positions that count, one per batch, or None.
        fitted: see `split`.
        seconds: see `fit_within`.
    """
    scale = _scale(targets)

    def loss(batch: int) -> Tensor:
        residual = lean.run(index, batch, lean.hidden[batch]) - targets[batch]
        squares = residual.float().square() / scale
        mask = masks[batch]
        if mask is not None and squares.shape[:-1] == mask.shape:
            squares = squares[mask.to(squares.device)]
        return squares.mean()

    with quiet(lean.block(index)), even_ranks(lean.block(index)):
        return fit_within(parameters, loss, *split(len(targets), fitted), options, seconds)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    options: Training,
    fitted: int | None = None,
    seconds: float | None = None,
    nesting: Nesting | None = None,
) -> Trained:
    """Distil the dense model into the compressed one: minimise mean KL(dense ‖ compressed), or
    the relative squared error of what is no logits.

    The teacher's logits are cached up to a memory limit; on further batches, and on images that
    vary, it runs at every step. Without a rate in `options` it is `usual_rate`. `fitted`: see
    `split`; `seconds`: see `fit_within`; `nesting`: over sampled ranks.
    """
    predicted = Reference(teacher, batches)
    trained_on, held_out = split(len(batches), fitted)
    usual = sum(predictions(predicted, batch) for batch in held_out) / len(held_out) or 1.0
    generator = torch.Generator().manual_seed(options.seed)

    def loss(batch: int) -> Tensor:
        if options.vary and torch.is_grad_enabled():
            return _apart(teacher, student, changed(batches[batch], generator), predicted.measure)
        outputs, _ = predictions_of(student, forward(student, batches[batch]))
        mask = predicted.mask(batch)
        losses = divergence(predicted.outputs(batch), outputs, mask, predicted.measure)
        # Held out, each prediction counts the same, in a short batch too.
        return losses.mean() if torch.is_grad_enabled() else losses.sum() / usual

    with quiet(teacher), quiet(student), even_ranks(student):
        over = nullcontext(loss) if nesting is None else nesting.over(loss)
        with over as wanted:
            before = mean_of(wanted, held_out)
            if options.rate is None:
                rate = usual_rate(before, predictions(predicted, 0), options.optimizer)
                options = replace(options, rate=rate * (1.0 if nesting is None else SLOWER))
            return fit_within(
                parameters, wanted, trained_on, held_out, options, seconds, known=before
            )


def _apart(teacher: nn.Module, student: nn.Module, batch: Batch, measure: str) -> Tensor:
    """How far a student is from its teacher on a batch that comes but once."""
    with torch.no_grad():
        expected, _ = predictions_of(teacher, forward(teacher, batch))
    outputs, _ = predictions_of(student, forward(student, batch))
    return divergence(expected, outputs, measure=measure).mean()


def usual_rate(away: float, held: int, optimizer: str) -> float:
    """The rate of distillation.

    It falls with the root of the predictions that a batch holds, a classifier's one a row, as the
    noise of a step rises with it (arXiv 2205.10287). All steps of Muon are equally long, and so it
    also falls with the distance left, or they would lead past what is near (benchmarks/best.py).

    Args:
        away: KL or relative squared error to the dense model before.
        held: predictions of a batch, without padding.
        optimizer: "muon" or "adamw".
    """
    share = min(max(away, NEAR), 1.0) if optimizer == MUON else 1.0
    return RATES[optimizer] * share * min(math.sqrt(held / PREDICTIONS), 1.0)


def predictions(predicted: Reference, number: int) -> int:
    """The predictions of a batch, without padding."""
    shape, mask = predicted.outputs(number).shape[:-1], predicted.mask(number)
    return shape.numel() if mask is None or mask.shape != shape else int(mask.sum())


def _scale(targets: Sequence[Tensor]) -> Tensor:
    """Mean square of each channel (width,), floored: large channels must not dominate the loss."""
    square = torch.stack([t.detach().float().flatten(0, -2).square().mean(0) for t in targets])
    power = square.mean(0)
    return power.clamp(min=1e-3 * float(power.mean()) + 1e-12)
