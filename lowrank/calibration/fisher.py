"""The true Fisher at the layers' outputs: gradients for labels that the model itself draws.

For a model with predictions p(y | x), the curvature of its KL to itself is E_{y ~ p}[∇L ∇Lᵀ], L the
cross entropy to the drawn label (Martens, arXiv 1412.1193); labels from the data would give the
"empirical" Fisher, which is another matrix. One backward pass a batch, gathered by hooks:
G = E[g gᵀ] per token, and for FWSVD (arXiv 2207.00112) the squared weight gradients of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import LowrankError
from ..linalg.precision import full_precision
from ..types import Site
from ..walk.sites import find_sites, select_sites
from .batches import Batch, Forward, rebatched
from .gradients import Found, Gradients
from .running import forward, logits_of, mask_of, quiet, without_cache
from .statistics import Calibration

FISHER = frozenset({"out_gram", "row_fisher"})  # what methods that need this pass say
ROWS = 16  # of a backward pass
POSITIONS = 1024  # whose labels are drawn at once


def with_fisher(
    model: nn.Module,
    seen: Calibration,
    sites: Sequence[Site] | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """The calibration with `out_gram` and `row_fisher` of linear sites that it saw.

    Sites that have them already are passed over; where all have, the calibration is returned as it
    is. The inputs' `gram` stays one tensor of the sites that share it.

    Args:
        sites: None: every linear layer but the output head, whose `out_gram` would hold as many
            numbers as the vocabulary squared; `compress` passes its targets.
        seed: of the labels, drawn on the CPU.

    Raises:
        LowrankError: as `fisher`.
    """
    chosen = select_sites(find_sites(model), model) if sites is None else sites
    had = seen.statistics
    wanted = [
        site
        for site in chosen
        if not site.reason and site.kind in ("linear", "conv") and site.name in had
        if had[site.name].count and had[site.name].out_gram is None
    ]
    found = fisher(model, seen.batches, wanted, seed=seed, progress=progress) if wanted else {}
    if not found:
        return seen
    added = {
        name: replace(had[name], out_gram=gram, row_fisher=rows)
        for name, (gram, rows) in found.items()
    }
    return replace(seen, statistics={**had, **added})


def fisher(
    model: nn.Module,
    batches: list[Batch] | Forward,
    sites: Sequence[Site],
    *,
    seed: int = 0,
    progress: bool = False,
) -> Found:
    """G = E[g gᵀ] (out, out) and the rows' Fisher (out,), both float64, by names of linear sites.

    g is the gradient, at one token's output, of the cross entropies *summed* over all predictions;
    the row's Fisher is Σ_j (∂L/∂W_ij)², L the loss of one sequence (the first axis of the logits),
    averaged over sequences. Where a layer's tokens are no multiple of the sequences, each counts
    as one by itself. Labels are drawn at every position of the logits (…, classes) from their own
    softmax; positions that the attention mask pads are left out. A layer that was never called is
    missing; one that the logits do not depend on has zeros.

    The model runs in evaluation mode, its parameters frozen: flags, gradients, modes and random
    states are as before afterwards. `no_grad` and `inference_mode` around the call do no harm,
    unless the parameters themselves were made in inference mode.

    Args:
        batches: as `materialise` gives them; at most `ROWS` rows go at a time.
        seed: of the labels; drawn on the CPU.

    Raises:
        LowrankError: the data is a callable; the model gives no logits, or fewer than two classes,
            or no gradient to any of the sites; or a gradient is NaN or Inf (its site is named).
    """
    if callable(batches):
        raise LowrankError(
            "output gradients need batches, not a callable: pass tensors, dicts or a loader"
        )
    from tqdm.auto import tqdm

    gather = Gradients(sites)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(rebatched(batches, ROWS), "fisher", delay=2, disable=not progress, leave=False)
    reached = not sites
    with torch.inference_mode(False), quiet(model), without_cache(model), _frozen(model), gather:
        for batch in bar:
            gather.start(mask_of(batch))
            with torch.enable_grad():
                logits = _predictions(forward(model, _plain(batch)))
                loss, sequences = _loss(logits, batch, generator)
            gather.sequences = sequences
            if loss is not None and loss.requires_grad:
                reached = True
                loss.backward()
            gather.finish()
        if not reached:
            raise LowrankError(
                f"no gradient leads from a prediction to any of {len(sites)} layers: does the "
                "model run under no_grad, or did the data not reach them?"
            )
        return gather.found()


def _predictions(output: object) -> Tensor:
    try:
        return logits_of(output)
    except LowrankError as error:
        raise LowrankError(
            f"the Fisher is of the model's predictions: {error}; method='whitened' with "
            "policy='uniform' does without"
        ) from None


def _loss(logits: Tensor, batch: Batch, generator: torch.Generator) -> tuple[Tensor | None, int]:
    """Summed cross entropy to drawn labels, None where all is padding; and the sequences."""
    classes = logits.shape[-1] if logits.ndim else 1
    if classes < 2:
        raise LowrankError(
            f"the Fisher draws labels from the logits; of shape {tuple(logits.shape)} they hold "
            "fewer than two classes"
        )
    mask, flat = mask_of(batch), logits.reshape(-1, classes)
    if mask is not None and mask.shape == logits.shape[:-1]:
        flat = flat[mask.flatten().to(flat.device)]
    wide = flat if flat.dtype == torch.float64 else flat.float()
    sequences = len(logits) if logits.ndim > 1 else 1
    if not len(wide):
        return None, sequences
    with full_precision(wide):
        loss = cross_entropy(wide, _drawn(wide.detach(), generator), reduction="sum")
    if not bool(torch.isfinite(loss.detach())):
        raise LowrankError(
            "the model's logits hold NaN or Inf: look at its last layers and at the data; float16 "
            "overflows where float32 and bfloat16 do not"
        )
    return loss, sequences


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label for each row (positions, classes) from its softmax, (positions,) int64.

    By the inverse of the distribution function, so that every device draws the same labels.
    """
    labels = []
    for rows in logits.split(POSITIONS):
        reached = rows.double().softmax(-1).cumsum(-1)
        chance = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
        found = torch.searchsorted(reached, chance.to(rows.device) * reached[:, -1:], right=True)
        labels.append(found[:, 0].clamp(max=rows.shape[-1] - 1))
    return torch.cat(labels)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter is given a gradient; the flags are restored."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _plain(batch: Batch) -> Batch:
    """Without inference tensors, which no backward pass can keep."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    return {name: _plain(v) if isinstance(v, Tensor) else v for name, v in batch.items()}
