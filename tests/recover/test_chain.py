"""Blocks run one at a time give what the whole model gives."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.calibration.running import forward, without_cache
from lowrank.recover.chain import Chain
from lowrank.walk.surgery import twin
from tests import zoo


@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2, zoo.opt, zoo.bert])
def test_a_chain_run_block_by_block_is_the_chain(make) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(0, 60, (3, 9))
    seen = lowrank.calibrate(model, [ids], progress=False)
    (names,) = seen.seen.chains
    found: list[torch.Tensor] = []
    last = model.get_submodule(names[-1])
    handle = last.register_forward_hook(
        lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        forward(model, ids)
    handle.remove()
    chain = Chain(model, names, [ids])
    for index in range(len(names)):
        chain.hidden = chain.outputs(index)
    assert torch.equal(chain.hidden[0], found[0])


def test_two_chains_and_what_passes_between_them() -> None:
    torch.manual_seed(0)
    model = zoo.t5().eval()
    batch = {"input_ids": torch.randint(0, 60, (2, 7)), "labels": torch.randint(0, 60, (2, 5))}
    seen = lowrank.calibrate(model, [batch], progress=False)
    assert len(seen.seen.chains) == 2
    for names in seen.seen.chains:
        chain = Chain(model, names, [batch])
        first = chain.hidden[0]
        for index in range(len(names)):
            chain.hidden = chain.outputs(index)
        assert chain.hidden[0].shape == first.shape
        assert not torch.equal(chain.hidden[0], first)


def test_a_twin_shares_tensors_and_not_modules() -> None:
    model = zoo.llama()
    copy = twin(model)
    ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    assert all(ours[name] is theirs[name] for name in ours)
    copy.model.layers[0].mlp.up_proj = torch.nn.Identity()
    assert not isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Identity)


def test_the_cache_is_off_inside_and_on_again() -> None:
    model = zoo.llama()
    assert model.config.use_cache
    with without_cache(model):
        assert not model.config.use_cache
    assert model.config.use_cache


def test_blocks_that_are_no_chain_are_refused() -> None:
    model = zoo.llama().eval()
    with pytest.raises(LowrankError):
        Chain(model, ["model.layers.1", "model.layers.0"], [torch.arange(6)[None]])
