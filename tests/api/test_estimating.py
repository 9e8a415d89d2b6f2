"""Estimates against what compression then does: its stages, sizes, products and files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from lowrank import LowrankError, Recovery
from lowrank.api import estimating
from lowrank.api.footprint import scratch_bytes
from lowrank.api.jobs import Job, job_of
from lowrank.api.request import Request
from lowrank.calibration.outline import outlined
from lowrank.measure.rates import Rates
from lowrank.plans import stages
from lowrank.walk.sites import find_sites, select_sites
from tests.zoo import make, mlp, tokens

ROWS, LENGTH = 64, 32


@pytest.fixture(autouse=True)
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed: nothing is measured."""
    monkeypatch.setattr(estimating, "measured_rates", lambda *_: Rates(1e9, 1e9, 1e9, 1e9, 1e9))


def llama(blocks: int = 3, width: int = 64, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
        attn_implementation="eager", **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def data() -> list[torch.Tensor]:
    drawn = torch.randint(2, 61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return list(drawn.split(16))


def names(result: Any) -> list[str]:
    return [stage.name for stage in result.stages]


def a_job(model: nn.Module, request: Request, rows: int = ROWS, share: float = 0.6) -> Job:
    sites = find_sites(model)
    outline = outlined(model, [s for s in sites if s.kind != "embedding"], LENGTH)
    targets = [site for site in select_sites(sites, model) if not site.reason]
    return job_of(model, targets, outline, request, rows, LENGTH, share, files=False)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A context in which torch counts the products of every stage."""
    found: dict[str, float] = {}
    entered = stages._Recording.stage

    @contextmanager
    def stage(self: Any, name: str) -> Iterator[None]:
        outer = not self._running
        with entered(self, name), FlopCounterMode(display=False) as counter:
            yield
        if outer:
            found[name] = counter.get_total_flops()

    with monkeypatch.context() as patch:
        patch.setattr(stages._Recording, "stage", stage)
        yield found


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "fast"},
        {"effort": Recovery(block_steps=1, distill_steps=1)},
        {"method": "whitened"},
        {"method": "svd", "effort": Recovery()},
        {"method": "two-sided", "policy": "lossaware"},
        {"method": "blast"},
    ],
)
def test_stages_are_those_of_the_report(options: dict[str, Any]) -> None:
    model = make("llama")
    rows, length = 24, 16
    expected = lowrank.estimate(model, 0.6, rows=rows, length=length, **options)
    few = tokens(rows, length).split(8)
    _, report = lowrank.compress(model, 0.6, data=list(few), progress=False, **options)
    assert names(expected) == names(report)
    assert all(f"\n{name} " in f"{expected}\n" for name in names(expected))


def test_stages_without_data_and_from_a_folder(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "dense")
    expected = lowrank.estimate(tmp_path / "dense", 0.6, method="svd")
    report = lowrank.compress(str(tmp_path / "dense"), 0.6, method="svd", out=tmp_path / "out")
    assert names(expected) == names(report)
    assert expected.rows == report.tokens == 0
    unknown = {stage.name for stage in expected.stages if stage.seconds is None}
    assert unknown == {"loading", "writing"}
    assert "without loading, writing" in str(expected)


def test_batch_norms_and_convolutions_are_named_but_not_estimated() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = lowrank.estimate(net, 0.7, effort="fast", rows=32, length=1)
    _, report = lowrank.compress(
        net, 0.7, effort="fast", data=list(images.split(8)), progress=False
    )
    assert names(expected) == names(report)
    seconds = {stage.name: stage.seconds for stage in expected.stages}
    assert seconds["batch norms"] is seconds["factoring"] is None
    assert "could not be followed" in str(expected)
    assert "its work is not known" in str(expected)


def test_products_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenproblems aside, and with factored layers counted as dense ones."""
    options = {"effort": "fast", "policy": "uniform"}
    expected = {s.name: s.flops for s in lowrank.estimate(
        llama(), 0.9, rows=ROWS, length=LENGTH, **options).stages}  # fmt: skip
    with counted(monkeypatch) as found:
        lowrank.compress(llama(), 0.9, data=data(), progress=False, **options)
    assert expected["calibration"] == pytest.approx(found["calibration"], rel=0.1)
    assert expected["gradients"] == pytest.approx(found["gradients"], rel=0.1)
    assert expected["refit by block"] == pytest.approx(found["refit by block"], rel=0.25)
    assert expected["judging"] == pytest.approx(found["judging"], rel=0.25)
    assert expected["choosing ranks"] == 0


def test_candidates_are_made_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lowrank.estimate(llama(), 0.7, effort="fast", rows=ROWS, length=LENGTH)
    (stage,) = [each for each in expected.stages if each.name == "choosing ranks"]
    with counted(monkeypatch) as found:
        lowrank.compress(llama(), 0.7, data=data(), effort="fast", progress=False)
    assert stage.flops == pytest.approx(found["choosing ranks"], rel=0.35)


def test_block_training_is_steps_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(steps: int) -> float:
        effort = Recovery(refit=False, block_steps=steps)
        options = {"effort": effort, "policy": "uniform"}
        stage = lowrank.estimate(llama(), 0.9, rows=ROWS, length=LENGTH, **options).stages[-3]
        with counted(monkeypatch) as found:
            lowrank.compress(llama(), 0.9, data=data(), progress=False, **options)
        assert stage.name == "refit by block"
        counts.append(found["refit by block"])
        return stage.flops or 0.0

    counts: list[float] = []
    first, second = of(6), of(24)
    assert second - first == pytest.approx(counts[1] - counts[0], rel=0.3)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_kept_is_what_is_stored_afterwards(storage: Any) -> None:
    options: dict[str, Any] = {"method": "svd", "align": 1, "data": None, "storage": storage}
    asked = {"method": "svd", "storage": storage}
    for sizes in ({"ratio": 0.6}, {"rank": 5}, {"ratio": 0.7, "of": "model"}):
        expected = lowrank.estimate(llama(), **sizes, **asked)  # type: ignore[arg-type]
        _, report = lowrank.compress(llama(), **sizes, **options)  # type: ignore[arg-type]
        assert expected.params == report.params_before
        assert expected.layers == len(report.sites)
        assert expected.kept == pytest.approx(report.params_after, rel=0.03)
        assert expected.output == pytest.approx(report.bytes_after, rel=0.03)
        if "rank" in sizes:
            assert expected.kept == report.params_after
    targeted = sum(entry.dense.params for entry in report.plan.entries if entry.target)
    assert expected.targeted == targeted


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_ranks_are_those_of_a_uniform_share(storage: Any) -> None:
    request = Request(0.6, method="svd", storage=storage)
    plan = lowrank.plan(llama(), 0.6, method="svd", data=None, storage=storage, align=1)
    found = [entry.size[0] for entry in plan.entries if entry.size]
    layers = a_job(llama(), request, rows=0).layers
    assert all(0 <= layer.rank - rank <= 1 for layer, rank in zip(layers, found, strict=True))


def test_statistics_take_what_is_foretold() -> None:
    model, rows = llama(), data()
    request = Request(0.6, method="two-sided", policy="uniform")
    seen = lowrank.with_fisher(model, lowrank.calibrate(model, rows, progress=False))
    own = [stats.gram for stats in seen.statistics.values()]
    own += [stats.out_gram for stats in seen.statistics.values()]
    unique = {id(each): each for each in own if each is not None}
    head = 8 * model.config.hidden_size**2  # only `compress` leaves the head out
    job = a_job(model, request)
    factors = sum(layer.rank * (layer.outputs + layer.inputs) for layer in job.layers)
    states = (3 + 2) * ROWS * LENGTH * model.config.hidden_size
    foretold = scratch_bytes(job) - 4 * factors - 4 * states
    assert foretold == sum(each.nbytes for each in unique.values()) - head


def test_memory_does_not_grow_with_depth_from_disk() -> None:
    """What does grow is in memory the statistics of every layer."""
    shallow, middle, deep = (
        lowrank.estimate(llama(blocks, 128), 0.6, effort="fast", rows=ROWS, length=LENGTH)
        for blocks in (2, 4, 6)
    )
    added = deep.scratch - shallow.scratch
    assert added == pytest.approx(2 * (middle.scratch - shallow.scratch), rel=0.01)
    base = abs(deep.from_disk - shallow.from_disk)
    assert base < 0.1 * added
    grown = deep.in_memory - shallow.in_memory
    assert 0.4 * added < grown + base < 1.1 * added
    assert deep.in_memory > deep.from_disk


def test_memory_follows_the_largest_layer_and_the_logits() -> None:
    request = Request(0.6, effort="fast")
    job = a_job(llama(), request)
    wide = [replace(layer, inputs=8 * layer.inputs) for layer in job.layers]
    reads = [replace(read, inputs=8 * read.inputs) for read in job.groups]
    vocabulary = replace(job.outline, predictions=100 * job.outline.predictions)
    peak = [
        estimating.peak_bytes(each, 0)[0]
        for each in (
            job,
            replace(job, layers=tuple(wide), groups=tuple(reads)),
            replace(job, outline=vocabulary),
        )
    ]
    assert peak[1] > 3 * peak[0]
    assert peak[2] > 3 * peak[0]
    assert estimating.peak_bytes(job, 1000)[0] == peak[0] + 1000


def test_a_config_is_enough(tmp_path: Path) -> None:
    model = llama(dtype="bfloat16").bfloat16()
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "dense" / "config.json", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {}})
    )
    options: dict[str, Any] = {"effort": "fast", "rows": ROWS, "length": LENGTH}
    bare = lowrank.estimate(tmp_path / "bare", 0.6, **options)
    whole = lowrank.estimate(tmp_path / "dense", 0.6, **options)
    held = lowrank.estimate(model, 0.6, **options)
    assert bare.output == whole.output == held.output < 2 * bare.params
    assert [s.flops for s in bare.stages] == [s.flops for s in whole.stages]
    assert [s.flops for s in bare.stages[1:-1]] == [s.flops for s in held.stages]
    assert (bare.params, bare.scratch) == (held.params, held.scratch)


def test_time_is_work_over_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"effort": "fast", "rows": ROWS, "length": LENGTH}
    slow = lowrank.estimate(llama(), 0.6, **options)
    monkeypatch.setattr(estimating, "measured_rates", lambda *_: Rates(2e9, 2e9, 2e9, 2e9, 2e9))
    fast = lowrank.estimate(llama(), 0.6, **options)
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    assert slow.seconds == sum(stage.seconds for stage in slow.stages)
    (calibration,) = [s for s in slow.stages if s.name == "calibration"]
    assert calibration.seconds == pytest.approx(calibration.flops / 1e9)


def test_defaults_are_those_of_compress() -> None:
    expected = lowrank.estimate(llama(), 0.6)
    assert (expected.rows, expected.length) == (192, 64)  # self-written, the model's limit
    assert expected.notes == (
        "the time to write the text, which the model does itself, is not estimated",
    )
    assert lowrank.estimate(llama(), 0.6, rows=192).notes == ()
    assert lowrank.estimate(llama(), 0.6, method="svd").rows == 0
    assert lowrank.estimate(mlp(24, 40, 24), 0.5).rows == 0


def test_what_cannot_be_estimated(tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="no target size"):
        lowrank.estimate(llama())
    with pytest.raises(LowrankError, match="rows must be an integer >= 0, got -1"):
        lowrank.estimate(llama(), 0.6, rows=-1)
    with pytest.raises(LowrankError, match="length must be an integer >= 1, got 0"):
        lowrank.estimate(llama(), 0.6, length=0)
    with pytest.raises(LowrankError, match=r"needs calibration data \(gram\).*rows="):
        lowrank.estimate(mlp(24, 40), 0.6, method="whitened")
    with pytest.raises(LowrankError, match=r"ratio 0\.01 of the model cannot be reached"):
        lowrank.estimate(llama(), 0.01, of="model")
    with pytest.raises(LowrankError, match="no layer can be factored"):
        lowrank.estimate(nn.ReLU(), 0.5)
    with pytest.raises(LowrankError, match=r"expected a torch\.nn\.Module, got int"):
        lowrank.estimate(3, 0.5)  # type: ignore[arg-type]
    with pytest.raises(LowrankError, match="is no folder of a transformers model"):
        lowrank.estimate(tmp_path, 0.5)
    lowrank.compress(llama(), 0.5, data=None)[0].save_pretrained(tmp_path / "factored")
    with pytest.raises(LowrankError, match="is quantized or factored already"):
        lowrank.estimate(tmp_path / "factored", 0.5)
