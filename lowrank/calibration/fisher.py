"""The true Fisher at the layers' outputs: gradients for labels sampled from the model.

For a model with predictions p(y | x), the curvature of its KL to itself is E_{y ~ p}[∇L ∇Lᵀ], L the
cross entropy to the sampled label (Martens, arXiv 1412.1193); labels from the data would give the
"empirical" Fisher, a different matrix. One backward pass per batch, gathered by hooks: G = E[g gᵀ]
per token, and for FWSVD (arXiv 2207.00112) the squared weight gradients of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..plans.progress import steps
from ..types import Site
from ..walk.parts import parts_apart
from ..walk.sites import find_sites, select_sites
from .batches import Batch, Forward, rebatched
from .by_block import gradients_by_block, one_chain
from .chain import NotInBlocks, Recording, Recordings
from .gradients import (
    FISHER,
    Draws,
    Gradients,
    Moments,
    Turns,
    plain,
    predicted,
    sampled_loss,
)
from .observation import Observation
from .padding import Padding
from .processes import in_step, is_main, mine
from .rare import routed, shrink
from .running import Unpadded, forward, quiet
from .statistics import Calibration, followed

ROWS = 16  # rows per backward pass


@parts_apart
def with_fisher(
    model: nn.Module,
    calibration: Calibration,
    sites: Sequence[Site] | None = None,
    *,
    needs: frozenset[str] = FISHER,
    seed: int = 0,
    progress: bool = False,
    recordings: Recordings | None = None,
) -> Calibration:
    """The calibration with `out_gram` and `row_fisher` of the linear and conv sites that it saw.

    Sites that have them already are skipped; if all have, the calibration is returned as it is. A
    `gram` of the inputs stays one tensor for the sites that share it.

    Args:
        sites: None: every linear layer but the output head, whose `out_gram` would be vocabulary ×
            vocabulary; `compress` passes its targets.
        needs: which of the two to gather; `row_fisher` costs a backward pass to the weights.
        seed: of the labels, sampled on the CPU.
        recordings: to be filled with those of the model's chain, whose batches have `ROWS` rows;
            with several processes of this one's share.

    Raises:
        LowrankError: as `gradient_moments`.
    """
    chosen = select_sites(find_sites(model), model) if sites is None else sites
    known = calibration.statistics
    wanted = [
        site
        for site in chosen
        if not site.reason and site.kind in ("linear", "conv") and site.name in known
        if known[site.name].count
        if any(getattr(known[site.name], need) is None for need in needs & FISHER)
    ]
    if not wanted:
        return calibration
    fishers = gradient_moments(
        model, calibration.batches, wanted, calibration.observation,
        needs=needs & FISHER, seed=seed, progress=progress, recordings=recordings,
        whole=calibration.whole,
    )  # fmt: skip
    added = {
        name: replace(known[name], **{k: v for k, v in found._asdict().items() if v is not None})
        for name, found in fishers.items()
    }
    counts = {name: stats.count for name, stats in added.items()}
    shrink(added, routed(counts, calibration.observation.chains), "out_gram")
    for site in wanted:
        gram = added[site.name].out_gram if site.name in added else None
        share = known[site.name].count / calibration.tokens
        if gram is not None and site.kind == "linear" and share < 1:
            gram.mul_(share)
    return replace(calibration, statistics={**known, **added})


def gradient_moments(
    model: nn.Module,
    batches: list[Batch] | Forward,
    sites: Sequence[Site],
    observation: Observation | None = None,
    *,
    needs: frozenset[str] = FISHER,
    seed: int = 0,
    progress: bool = False,
    recordings: Recordings | None = None,
    whole: bool = False,
) -> Moments:
    """G = E[g gᵀ] (out, out) and the rows' Fisher (out,), both float64, by names of sites.

    g is the gradient, at one token's output, of the cross entropies *summed* over all predictions;
    the row's Fisher is Σ_j (∂L/∂W_ij)², L the loss of one sequence (the first axis of the logits),
    averaged over sequences. If a layer's tokens are not a multiple of the sequences, each token
    counts as one. Labels are sampled at every position of the logits (…, classes) from their
    softmax; padded positions are left out. A layer that was never called is missing; one that the
    logits do not depend on has zeros.

    The model runs in evaluation mode, its parameters frozen: flags, gradients, modes and random
    states are restored. `no_grad` and `inference_mode` around the call do not matter, unless the
    parameters were created in inference mode.

    Args:
        batches: from `materialise`; at most `ROWS` rows are run at a time.
        observation: of the model, if known. Where the sites lie in one chain of blocks, or after
            it, gradients flow back block by block, in the memory of one block; they are the same.
        needs: which of the two to gather; the other is None.
        seed: of the labels, sampled on the CPU.
        whole: rows are not independent, and batches are run as they are.

    Raises:
        LowrankError: the data is a callable; the model gives no logits, or fewer than two classes,
            or no gradient to any of the sites; or a gradient is NaN or Inf (its site is named).
    """
    if callable(batches):
        raise LowrankError(
            "output gradients need batches, not a callable: pass tensors, dicts or a loader"
        )
    progress = progress and is_main()
    rows = list(batches) if whole else rebatched(batches, ROWS)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), quiet(model), _frozen(model):
        names = () if observation is None else one_chain(sites, observation)
        if names:
            with suppress(NotInBlocks):
                recording = Recording(tuple(names), whole)
                found = gradients_by_block(
                    model, rows, sites, recording, generator, needs=needs, progress=progress
                )
                if recordings is not None:
                    recordings[recording.names] = recording
                return found
            generator.manual_seed(seed)
        padding, rows = followed(model, rows, whole=whole)
        return _by_whole_passes(
            model, rows, padding, sites, generator, needs=needs, progress=progress
        )


def _by_whole_passes(
    model: nn.Module,
    batches: Sequence[Batch],
    padding: Padding | Unpadded,
    sites: Sequence[Site],
    generator: torch.Generator,
    *,
    needs: frozenset[str],
    progress: bool,
) -> Moments:
    """One backward pass through the whole model per batch."""
    numbers = mine(range(len(batches)))

    def outputs_of(number: int) -> tuple[Tensor, bool]:
        padding.start(batches[number])
        return predicted(model, forward(model, plain(batches[number])))

    def draws() -> dict[int, Draws]:
        with padding, torch.no_grad():
            found = ((number, outputs_of(number)) for number in numbers)
            return {n: Draws.of(*given, padding.predicted(given[0])) for n, given in found}

    turns = Turns(generator, draws)
    gather = Gradients(sites, padding, needs)

    def run() -> bool:
        reached = not sites
        with padding, gather:
            for number in steps(numbers, "batch", progress):
                with torch.enable_grad():
                    outputs, classes = outputs_of(number)
                    mask = padding.predicted(outputs)
                    loss, sequences = sampled_loss(outputs, classes, mask, turns.come(number))
                gather.sequences = sequences
                if loss is not None and loss.requires_grad:
                    reached = True
                    loss.backward()
                gather.finish()
        return reached

    if not any(in_step(run)):
        raise LowrankError(
            f"no gradient flows from the predictions to any of {len(sites)} layers: does the "
            "model run under no_grad, or did the data not reach them?"
        )
    return gather.result()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter gets a gradient; the flags are restored."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
