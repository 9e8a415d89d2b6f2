"""Gradients block by block: backwards through a chain, each block run again on its stored input.

One block's graph is held, not the whole model's. What comes after the chain
runs alone, a few rows at a time: logits over a large vocabulary are the largest tensor of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg.mapped import kept
from ..types import Site
from .batches import Batch, is_padded, rebatched
from .chain import Chain, NotInBlocks, Recording, bypassed
from .gradients import Gradients, Moments, plain, predicted, sampled_loss
from .observation import Observation, inside
from .running import Unpadded, few_rows, first_tensor, forward


def one_chain(sites: Sequence[Site], observation: Observation) -> Sequence[str]:
    """The chain of blocks that holds all linear sites but those called after it; () if none."""
    order = {name: position for position, name in enumerate(observation.order)}
    for chain in observation.chains:
        inside = [order[name] for name in order if _block_of(name, chain)]
        others = [site for site in sites if not _block_of(site.name, chain)]
        if len(chain) == 1:
            continue
        later = all(order.get(site.name, -1) > max(inside, default=0) for site in others)
        if later and inside and all(s.kind == "linear" and len(s.names) == 1 for s in sites):
            return chain
    return ()


def _block_of(name: str, chain: Sequence[str]) -> str:
    return next((block for block in chain if inside(name, block)), "")


def gradients_by_block(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    recording: Recording,
    generator: torch.Generator,
    progress: bool,
) -> Moments:
    """The same, block by block from the last to the first, each run again on its stored input.

    Raises:
        NotInBlocks: what comes after the chain cannot be run alone, or no gradient flows back.
    """
    from tqdm.auto import tqdm

    if any(is_padded(batch) for batch in batches):
        raise NotInBlocks("padding is followed through the whole model")
    names = recording.names
    inputs: list[list[Tensor]] = []  # by block and batch
    gradients: list[Tensor] = []
    sequences: list[int] = []
    with torch.no_grad():
        try:
            for number, batch in enumerate(batches):
                recording.record(model, number, batch)
            chain = Chain(model, recording, range(len(batches)))
            for index in range(len(names)):
                inputs.append([kept(hidden) for hidden in chain.hidden])
                chain.hidden = chain.outputs(index)
        except LowrankError as error:
            raise NotInBlocks(str(error)) from None
    _check_bypass(model, recording, batches[0], chain.hidden[0])
    later = Gradients([s for s in sites if not _block_of(s.name, names)], Unpadded())
    with later:
        for number, batch in enumerate(batches):
            hidden = chain.hidden[number]
            tail = _tail_gradient(model, recording, number, batch, hidden, generator, later)
            gradients.append(tail[0])
            sequences.append(tail[1])
    found = later.result()
    bar = tqdm(total=len(names), desc="fisher", delay=2, disable=not progress, leave=False)
    with bar:
        for index in reversed(range(len(names))):
            own = [site for site in sites if _block_of(site.name, names) == names[index]]
            gather = Gradients(own, Unpadded())
            with gather, torch.enable_grad():
                for number, hidden in enumerate(inputs.pop()):
                    gather.sequences = sequences[number]
                    leaf = hidden.clone().requires_grad_(hidden.is_floating_point())
                    output = chain.run(index, number, leaf.clone())
                    if output.requires_grad:
                        output.backward(gradients[number])
                    elif index:
                        raise NotInBlocks(f"{names[index]} cuts the gradient")
                    gather.finish()
                    slope = leaf.grad
                    gradients[number] = torch.zeros_like(leaf) if slope is None else slope
            found.update(gather.result())
            bar.update()
    return found


def _check_bypass(model: nn.Module, recording: Recording, batch: Batch, hidden: Tensor) -> None:
    """Raises NotInBlocks unless what comes after the chain gives the same when it runs alone."""
    part, piece = _parts(model, recording, 0, batch, hidden)[0]
    with torch.no_grad():
        expected, _ = predicted(model, forward(model, plain(part)))
        with bypassed(model, recording, 0, piece):
            found, _ = predicted(model, forward(model, plain(part)))
    if found.shape != expected.shape or not torch.allclose(found, expected, 1e-3, 1e-4):
        raise NotInBlocks("the predictions depend on more than the last block's output")


def _parts(
    model: nn.Module, recording: Recording, number: int, batch: Batch, hidden: Tensor
) -> list[tuple[Batch, Tensor]]:
    """A few rows at a time, with their hidden states: the logits of a large vocabulary are the
    largest tensor of all."""
    if recording.whole:
        return [(batch, hidden)]
    rows = few_rows(model, batch)
    parts = rebatched([batch], rows)
    if sum(map(_length, parts)) != len(hidden) or not recording.is_plain(number):
        return [(batch, hidden)]
    return list(zip(parts, hidden.split(rows), strict=True))


def _tail_gradient(
    model: nn.Module,
    recording: Recording,
    number: int,
    batch: Batch,
    hidden: Tensor,
    generator: torch.Generator,
    later: Gradients,
) -> tuple[Tensor, int]:
    """The gradient at the last block's output, and the number of sequences."""
    gradients, total = [], 0
    for part, piece in _parts(model, recording, number, batch, hidden):
        leaf = piece.detach().clone().requires_grad_()
        with torch.enable_grad(), bypassed(model, recording, number, leaf.clone()):
            outputs, classes = predicted(model, forward(model, plain(part)))
            loss, sequences = sampled_loss(outputs, classes, None, generator)
        total += sequences
        later.sequences = sequences
        if loss is not None and not loss.requires_grad:
            raise NotInBlocks("no gradient flows from the predictions to the last block")
        if loss is not None:
            loss.backward()
        later.finish()
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return torch.cat(gradients), total


def _length(batch: Batch) -> int:
    tensor = first_tensor(batch)
    return 0 if tensor is None or not tensor.ndim else len(tensor)
