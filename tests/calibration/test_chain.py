"""Chains of blocks: what comes after them runs alone, and gradients flow back through them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration import by_block, fisher
from lowrank.calibration.chain import Chain, NotInBlocks, Recording, bypassed
from lowrank.calibration.running import quiet
from lowrank.walk.sites import find_sites, select_sites
from tests import zoo

KINDS = ("llama", "gpt2", "bert", "vit", "t5", "qwen3")


def moments(kind: str, patch: pytest.MonkeyPatch) -> tuple[Any, Any, int]:
    """Gradient moments of a model by whole passes and by blocks, and how often blocks did it."""
    model = zoo.make(kind)
    data = lowrank.calibrate(model, [zoo.example(kind)] * 2, progress=False)
    every = select_sites(find_sites(model), model)
    sites = [site for site in every if not site.reason and site.kind == "linear"]
    whole = fisher.gradient_moments(model, data.batches, sites)
    done = []
    plain = fisher.gradients_by_block

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        done.append(result)
        return result

    patch.setattr(fisher, "gradients_by_block", watched)
    parts = fisher.gradient_moments(model, data.batches, sites, data.observation)
    return whole, parts, len(done)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_back_block_by_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, done = moments(kind, monkeypatch)
    assert done == 1
    assert whole.keys() == parts.keys()
    for name, (gram, rows) in whole.items():
        torch.testing.assert_close(parts[name][0], gram, rtol=1e-5, atol=1e-5 * float(gram.max()))
        torch.testing.assert_close(parts[name][1], rows, rtol=1e-5, atol=1e-5 * float(rows.max()))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_few_rows_at_a_time_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary's logits are held for one row at a time."""
    monkeypatch.setattr("lowrank.calibration.running.LOGITS", 1)
    whole, parts, done = moments(kind, monkeypatch)
    assert done == 1
    for name, (gram, rows) in whole.items():
        torch.testing.assert_close(parts[name][0], gram, rtol=1e-5, atol=1e-5 * float(gram.max()))
        torch.testing.assert_close(parts[name][1], rows, rtol=1e-5, atol=1e-5 * float(rows.max()))


def test_what_comes_after_the_chain_runs_alone() -> None:
    model, batch = zoo.make("gpt2"), zoo.tokens()
    recording = Recording(tuple(f"transformer.h.{i}" for i in range(2)))
    with quiet(model):
        recording.record(model, 0, batch)
        chain = Chain(model, recording, [0])
        for index in range(2):
            chain.hidden = chain.outputs(index)
        expected = model(batch).logits
        with bypassed(model, recording, 0, chain.hidden[0]):
            torch.testing.assert_close(model(batch).logits, expected)
        with bypassed(model, recording, 0, 0 * chain.hidden[0]):
            assert not torch.allclose(model(batch).logits, expected)
        assert torch.equal(model(batch).logits, expected)  # nothing is left behind


class Doubling(nn.Module):
    """A block that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return torch.tanh(self.layer(x))


def test_blocks_may_change_their_input_in_place() -> None:
    """What is stored of a block's input is what it read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), *(Doubling() for _ in range(3)), nn.Linear(12, 5))
    recording = Recording(("1", "2", "3"))
    read: list[Tensor] = []
    for block in list(model)[1:4]:
        block.register_forward_pre_hook(lambda _, args: read.append(args[0].clone()))
    kept: dict[int, Tensor] = {}
    share = by_block._Share(model, [torch.randn(8, 12)], [], recording, frozenset())
    with torch.no_grad():
        recording.record(model, 0, share.batches[0], share._keep)
    kept = {index: inputs[0] for index, inputs in enumerate(share.inputs)}
    assert all(torch.equal(kept[1 + index], read[1 + index]) for index in range(2))


@pytest.mark.parametrize("batch", [torch.ones(40), torch.eye(40, 12).to_sparse()], ids=str)
def test_batches_that_cannot_be_cut_are_run_whole(batch: Tensor) -> None:
    """Of one axis, or sparse: their hidden states have rows all the same."""
    parts = by_block._parts(nn.Linear(12, 12), Recording(("0",)), 0, batch, torch.zeros(40, 12))
    assert [part is batch and len(hidden) == 40 for part, hidden in parts] == [True]


class State(NamedTuple):
    """What blocks hand on."""

    step: int
    hidden: Tensor


def test_blocks_may_hand_on_named_tuples() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, state: State) -> State:
            return State(state.step + 1, self.fc(state.hidden).tanh())

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(State(0, x)).hidden)

    torch.manual_seed(0)
    model = Named()
    data = lowrank.calibrate(model, torch.randn(16, 12), progress=False)
    assert data.observation.chains == (("blocks.0", "blocks.1"),)
    _, report = lowrank.compress(model, 0.6, data=data, effort="fast", progress=False)
    assert any(note.startswith("refitted in closed form") for note in report.notes)


class Twice(nn.Module):
    """Its predictions also read the first block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(zoo.mlp(12, 24, 12) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            first = x if index == 0 else first
        found: Tensor = self.head(x + first)
        return found


def test_predictions_that_read_other_blocks_take_whole_passes() -> None:
    torch.manual_seed(0)
    model, batches = Twice().eval(), [torch.randn(8, 12), torch.randn(8, 12)]
    data = lowrank.calibrate(model, batches, progress=False)
    sites = [site for site in find_sites(model) if site.name != "head"]
    recording = Recording(tuple(f"blocks.{i}" for i in range(3)))
    with pytest.raises(NotInBlocks, match="more than the last block"):
        fisher.gradients_by_block(
            model, batches, sites, recording, torch.Generator(),
            needs=fisher.FISHER, progress=False,
        )  # fmt: skip
    whole = fisher.gradient_moments(model, batches, sites)
    parts = fisher.gradient_moments(model, batches, sites, data.observation)
    for name, (gram, _) in whole.items():
        assert torch.equal(parts[name][0], gram)
