"""Gradients block by block: backwards through a chain, each block run again on its stored input.

One block's graph is held, not the whole model's. What comes after the chain
runs alone, a few rows at a time: logits over a large vocabulary are the largest tensor of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg.mapped import give_back, kept
from ..plans.progress import steps
from ..types import Site
from .batches import Batch, is_padded, rebatched
from .chain import Chain, NotInBlocks, Recording, bypassed
from .gradients import Draws, Gradients, Moments, Turns, plain, predicted, sampled_loss
from .observation import Observation, inside
from .processes import in_step, mine
from .running import Unpadded, few_rows, first_tensor, forward

LOSS = 1 << 25  # bytes of logits whose loss is computed at once: its gradients take several times


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
    *,
    needs: frozenset[str],
    progress: bool,
) -> Moments:
    """The same, block by block from the last to the first, each run again on its stored input.

    Raises:
        NotInBlocks: what comes after the chain cannot be run alone, or no gradient flows back.
    """
    if any(is_padded(batch) for batch in batches):
        raise NotInBlocks("padding is followed through the whole model")
    share = _Share(model, batches, sites, recording, needs)
    in_step(share.record)
    turns = Turns(generator, share.draws)
    in_step(lambda: share.run(turns, progress))
    found: Moments = {}
    for gathered in share.gathered:
        found.update(gathered.result())
    return found


class _Share:
    """This process's share of the batches: forwards once, then backwards block by block.

    Attributes:
        gathered: the sums of what comes after the chain, and of each block from the last one on.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        sites: Sequence[Site],
        recording: Recording,
        needs: frozenset[str],
    ) -> None:
        self.model, self.sites, self.recording, self.needs = model, sites, recording, needs
        self.numbers = mine(range(len(batches)))
        self.batches = [batches[number] for number in self.numbers]
        # By block and batch; the last ones are the chain's outputs.
        self.inputs: list[list[Tensor]] = [[] for _ in (*recording.names, "")]
        self.gathered: list[Gradients] = []

    @torch.no_grad()
    def record(self) -> None:
        """Run all batches, and keep each block's inputs."""
        try:
            for number, batch in zip(self.numbers, self.batches, strict=True):
                self.recording.record(self.model, number, batch, self._keep)
            self.chain = Chain(self.model, self.recording, self.numbers)
            self.chain.hidden = self.inputs.pop()
        except LowrankError as error:
            raise NotInBlocks(str(error)) from None
        if self.batches:
            _check_bypass(self.model, self.recording, self.numbers[0], *self._states()[0][1:])

    def _keep(self, index: int, hidden: Tensor) -> None:
        own = kept(hidden)
        # A block may change its input in place.
        self.inputs[index].append(hidden.clone() if own is hidden else own)
        give_back()

    def _states(self) -> list[tuple[int, Batch, Tensor]]:
        """The batches by number, with the last block's outputs."""
        return list(zip(self.numbers, self.batches, self.chain.hidden, strict=True))

    @torch.no_grad()
    def draws(self) -> dict[int, Draws]:
        """The random numbers that each batch takes."""
        found: dict[int, Draws] = {}
        for number, batch, hidden in self._states():
            labels = signs = 0
            for part, piece in _parts(self.model, self.recording, number, batch, hidden):
                with bypassed(self.model, self.recording, number, piece):
                    outputs, classes = predicted(self.model, forward(self.model, plain(part)))
                draws = Draws.of(outputs, classes, None)
                labels, signs = labels + draws.labels, signs + draws.signs
            found[number] = Draws(labels, signs)
        return found

    def run(self, turns: Turns, progress: bool) -> None:
        """Gather the gradients after the chain, then those of its blocks."""
        names = self.recording.names
        others = [site for site in self.sites if not _block_of(site.name, names)]
        later = Gradients(others, Unpadded(), self.needs)
        gradients: list[Tensor] = []
        sequences: list[int] = []
        with later:
            for number, batch, hidden in self._states():
                generator = turns.come(number)
                tail = _tail_gradient(
                    self.model, self.recording, number, batch, hidden, generator, later
                )
                gradients.append(kept(tail[0]))
                sequences.append(tail[1])
        self.gathered.append(later)
        for index in steps(range(len(names))[::-1], "block", progress):
            self._run_block(index, gradients, sequences)

    def _run_block(self, index: int, gradients: list[Tensor], sequences: list[int]) -> None:
        """Gather the gradients of one block's layers, and replace `gradients`, those at its
        outputs, by those at its inputs."""
        names = self.recording.names
        own = [site for site in self.sites if _block_of(site.name, names) == names[index]]
        gather = Gradients(own, Unpadded(), self.needs)
        with gather, torch.enable_grad():
            for place, hidden in enumerate(self.inputs.pop()):
                gather.sequences = sequences[place]
                leaf = hidden.clone().requires_grad_(hidden.is_floating_point())
                output = self.chain.run(index, place, leaf.clone())
                if output.requires_grad:
                    output.backward(gradients[place])
                elif index:
                    raise NotInBlocks(f"{names[index]} cuts the gradient")
                gather.finish()
                slope = leaf.grad
                gradients[place] = kept(torch.zeros_like(leaf) if slope is None else slope)
                give_back()
        self.gathered.append(gather)


def _check_bypass(
    model: nn.Module, recording: Recording, number: int, batch: Batch, hidden: Tensor
) -> None:
    """Raises NotInBlocks unless what comes after the chain gives the same when it runs alone."""
    part, piece = _parts(model, recording, number, batch, hidden)[0]
    with torch.no_grad():
        expected, _ = predicted(model, forward(model, plain(part)))
        with bypassed(model, recording, number, piece):
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
    rows = few_rows(model, batch, LOSS)
    parts, pieces = rebatched([batch], rows), hidden.split(rows)
    if list(map(_length, parts)) != list(map(len, pieces)) or not recording.is_plain(number):
        return [(batch, hidden)]
    return list(zip(parts, pieces, strict=True))


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
