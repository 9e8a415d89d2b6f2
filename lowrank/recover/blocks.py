"""Block refit: a block's factors, norms and biases are trained to the dense block's output.

The block reads the compressed stream and is compared with what the dense block gives on the dense
stream, so that it also corrects what the blocks before it lost: the objective of AA-SVD (block
reconstruction). A held-out share of the rows decides; a block that did not improve stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.running import forward, logits_of, mask_of, quiet, without_cache
from ..measure.eval import Reference, divergence
from .chain import Chain
from .training import Trained, Training, fit, split


def refit_block(
    lean: Chain,
    index: int,
    targets: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    masks: Sequence[Tensor | None],
    options: Training,
    fitted: int | None = None,
) -> Trained:
    """Train one block of the compressed chain.

    Args:
        targets: the dense block's outputs, one tensor a batch, shaped as the hidden states.
        parameters: what is trained; each is in the block.
        masks: positions that count, one a batch, or None.
        fitted: see `split`.
    """
    scale = _scale(targets)

    def loss(batch: int) -> Tensor:
        off = lean.run(index, batch, lean.hidden[batch]) - targets[batch]
        each = off.float().square() / scale
        mask = masks[batch]
        if mask is not None and each.shape[:-1] == mask.shape:
            each = each[mask.to(each.device)]
        return each.mean()

    with quiet(lean.block(index)):
        return fit(parameters, loss, *split(len(targets), fitted), options)


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    options: Training,
    fitted: int | None = None,
) -> Trained:
    """Train the compressed model to the dense one's predictions: mean KL(dense ‖ compressed).

    The teacher's predictions are kept as far as memory allows; for the other batches, of a large
    vocabulary, the teacher runs along. `fitted`: see `split`.
    """
    predicted = Reference(teacher, batches)

    def loss(batch: int) -> Tensor:
        got = logits_of(forward(student, batches[batch]))
        return divergence(predicted.logits(batch), got, mask_of(batches[batch])).mean()

    with quiet(teacher), quiet(student), without_cache(teacher), without_cache(student):
        return fit(parameters, loss, *split(len(batches), fitted), options)


def _scale(targets: Sequence[Tensor]) -> Tensor:
    """Mean square of every channel (width,), floored: loud channels must not drown the others."""
    square = torch.stack([t.detach().float().flatten(0, -2).square().mean(0) for t in targets])
    power = square.mean(0)
    return power.clamp(min=1e-3 * float(power.mean()) + 1e-12)
