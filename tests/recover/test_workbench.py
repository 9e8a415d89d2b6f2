"""Blocks run one at a time give what the whole model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.calibration.running import forward
from lowrank.nn import LowRankLinear
from lowrank.recover.workbench import Workbench
from lowrank.walk.sites import find_sites
from lowrank.walk.surgery import put, twin
from tests import zoo


def bench_of(model: torch.nn.Module, batch: Any) -> Workbench:
    return Workbench(model, lowrank.calibrate(model, [batch], progress=False))


@pytest.mark.parametrize("rows", [8, 16, 50])
def test_batches_hold_the_rows_that_were_asked_for(rows: int) -> None:
    """A calibration that holds rows out has them in batches of 16."""
    model, x = zoo.mlp(4, 6, 3), torch.randn(160, 4)
    bench = Workbench(model, lowrank.calibrate(model, x, hold_out=1 / 4, progress=False), rows)
    sizes = [len(batch) for batch in bench.batches]
    assert sizes[: bench.fitted] == [len(part) for part in x[:120].split(rows)]
    assert sizes[bench.fitted :] == [len(part) for part in x[120:].split(rows)]
    assert torch.equal(torch.cat(bench.batches), x)


@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2, zoo.opt, zoo.bert])
def test_a_chain_run_block_by_block_is_the_chain(make) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(0, 60, (3, 9))
    bench = bench_of(model, ids)
    (names,) = bench.calibration.observation.chains
    found: list[torch.Tensor] = []
    last = model.get_submodule(names[-1])
    handle = last.register_forward_hook(
        lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        forward(model, ids)
    handle.remove()
    chain = bench.dense_chain(names, [0])
    for index in range(len(names)):
        chain.hidden = chain.outputs(index)
    assert torch.equal(chain.hidden[0], found[0])


def test_two_chains_and_what_passes_between_them() -> None:
    torch.manual_seed(0)
    model = zoo.t5().eval()
    batch = {"input_ids": torch.randint(0, 60, (2, 7)), "labels": torch.randint(0, 60, (2, 5))}
    bench = bench_of(model, batch)
    chains = bench.calibration.observation.chains
    assert len(chains) == 2
    for names in chains:
        chain = bench.dense_chain(names, [0])
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


def test_blocks_that_are_no_chain_are_refused() -> None:
    bench = bench_of(zoo.llama().eval(), torch.arange(6)[None])
    with pytest.raises(LowrankError, match="called out of chain order"):
        bench.dense_chain(["model.layers.1", "model.layers.0"], [0])


def test_the_dense_model_is_run_once_for_all_that_is_tried() -> None:
    """A twin that is still dense is given what the dense model was; one that differs is run."""
    model = zoo.llama().eval()
    rows = torch.randint(0, 60, (40, 9))
    calibration = lowrank.calibrate(model, [rows], hold_out=0.2, progress=False)
    bench = Workbench(model, calibration)
    assert [len(batch) for batch in bench.batches] == [16, 16, 8]
    assert bench.numbers() == ([0, 1, 2], 2)
    assert bench.numbers(most=1) == ([0, 2], 1)
    runs: list[torch.nn.Module] = []
    for student in (model, other := twin(model)):
        student.register_forward_pre_hook(lambda module, _: runs.append(module))
    (names,) = calibration.observation.chains
    for _ in range(2):
        bench.dense_chain(names, [0, 2])
        chain = bench.chain(other, names, [0, 2])
        for index in range(len(names)):
            chain.hidden = chain.outputs(index)
    assert runs == [model] * 2
    site = next(s for s in find_sites(model) if s.name.endswith("0.mlp.up_proj"))
    weight = site.module.weight
    put(other, site, LowRankLinear.from_factors(weight[:2], weight[:, :2], None))
    bench.dense_chain(names, [0, 1, 2])
    bench.chain(other, names, [0, 1, 2])
    assert runs == [model] * 3 + [other] * 3
    first, again = bench.judge.kl(other), bench.judge.kl(other)
    assert first == again > 0
    assert runs == [model] * 3 + [other] * 3 + [model] + [other] * 2


def test_without_rows_held_out_the_last_ones_judge() -> None:
    model = zoo.llama().eval()
    rows = torch.randint(0, 60, (40, 9))
    bench = Workbench(model, lowrank.calibrate(model, [rows], progress=False))
    assert bench.judged_on_seen
    assert torch.equal(bench.judge.batches[0], rows[32:])
    with pytest.raises(LowrankError, match="pass them as data=…"):
        Workbench(model, lowrank.calibrate(model, lambda m: m(rows), progress=False))
