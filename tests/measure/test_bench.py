"""lowrank.bench: counted exactly where it counts, in pairs where it times, and nothing is left."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, benchmark


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 16))


class Watched(nn.Module):
    """Notes the modes of every call, and who was called."""

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.name, self.log = name, log if log is not None else []
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        self.log.append(self.name)
        return self.linear(x)


def test_macs_of_an_mlp_are_exact() -> None:
    found = benchmark(mlp(), torch.randn(7, 24), repeats=1)
    assert found.macs == 7 * (24 * 32 + 32 * 16)
    assert found.positions == 7


def test_macs_of_a_factored_model_are_its_ranks() -> None:
    dense = mlp()
    model, report = lowrank.compress(
        dense, 0.5, target_modules="all", copy=True, align=1, progress=False
    )
    found = benchmark(model, torch.randn(7, 24), dense, repeats=1)
    ranks = [entry.size[0] for entry in report.plan.entries if entry.size]
    assert found.macs == 7 * (ranks[0] * (24 + 32) + ranks[1] * (32 + 16))
    assert found.reference is not None
    assert found.macs < found.reference.macs == 7 * (24 * 32 + 32 * 16)
    assert (found.params, found.bytes) == (report.params_after, report.bytes_after)
    assert (found.reference.params, found.reference.bytes) == (
        report.params_before,
        report.bytes_before,
    )


def test_attention_counts_as_two_full_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    heads, tokens, width = 2, 16, 8
    found = benchmark(Attention(), torch.randn(1, heads, tokens, width), repeats=1)
    assert found.macs == 2 * heads * tokens * tokens * width


def test_every_tensor_counts_once_and_buffers_are_bytes_only() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    found = benchmark(model, torch.randn(3, 6), repeats=1)
    params = 6 * 6 + 2 * 6 + 6
    assert found.params == params
    assert found.bytes == 4 * (params + 2 * 6) + 8  # running mean and variance, batches seen
    half = benchmark(mlp().bfloat16(), torch.randn(3, 24).bfloat16(), repeats=1)
    assert half.bytes == 2 * half.params


def test_peak_counts_what_is_alive_at_one_time() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.ReLU(), nn.Linear(32, 16))
    found = benchmark(model, torch.randn(10, 24), repeats=1)
    # Two hidden tensors: the third is made when the first is gone, and so is the output.
    assert found.peak_bytes - found.bytes == 2 * 10 * 32 * 4
    inplace = nn.Sequential(nn.Linear(24, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))
    found = benchmark(inplace, torch.randn(10, 24), repeats=1)
    assert found.peak_bytes - found.bytes == 10 * (32 + 16) * 4


def test_runs_in_evaluation_mode_and_leaves_modes_gradients_and_threads() -> None:
    model, reference, threads = Watched(), Watched(), torch.get_num_threads()
    model.train()
    model.linear.eval()
    reference.eval()
    benchmark(model, torch.randn(3, 4), reference, repeats=1)
    assert model.modes == reference.modes == {(False, False)}
    assert (model.training, model.linear.training, reference.training) == (True, False, False)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_modes_are_restored_when_the_model_fails() -> None:
    model = Watched().train()
    with pytest.raises(LowrankError, match=r"RuntimeError: .*shape"):
        benchmark(model, torch.randn(3, 5), repeats=1)
    assert model.training


def test_two_models_take_turns() -> None:
    log: list[str] = []
    found = benchmark(Watched("A", log), torch.randn(2, 4), Watched("B", log), repeats=4)
    turns = "".join(name for name, _ in groupby(log))
    assert "ABABABAB" in turns
    assert found.repeats == 4
    assert found.reference is not None
    assert found.reference.reference is None


def test_the_ratio_is_the_median_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = {"A": [1.0, 1.0, 8.0, 9.0], "B": [1.0, 2.0, 4.0, 10.0]}  # the first only warms up

    class Timer:
        def __init__(self, _statement: str, globals: dict[str, Any], num_threads: int) -> None:
            self.times = iter(planned[globals["model"].name])
            assert num_threads == torch.get_num_threads()

        def timeit(self, _number: int) -> SimpleNamespace:
            return SimpleNamespace(median=next(self.times))

    monkeypatch.setattr("torch.utils.benchmark.Timer", Timer)
    found = benchmark(Watched("A"), torch.randn(2, 4), Watched("B"), repeats=3)
    assert found.time_ratio == pytest.approx(0.9)  # of 0.5, 2 and 0.9; of the medians it is 2
    assert found.latency_ms == pytest.approx(8000)
    assert found.iqr_ms == pytest.approx((8.5 - 4.5) * 1000)
    assert found.tokens_per_s == pytest.approx(2 / 8)
    ratios = {row["per forward pass"]: row["ratio"] for row in found.rows()}
    assert ratios["latency, ms (median)"] == "0.900"
    assert ratios["tokens/s"] == "1.111"


def test_a_dict_goes_in_as_keywords_without_labels() -> None:
    class Keyed(nn.Module):
        def forward(self, *, x: torch.Tensor, scale: float) -> dict[str, Any]:
            return {"logits": x * scale}

    example = {"x": torch.randn(2, 5, 3), "scale": 2.0, "labels": torch.zeros(2)}
    assert benchmark(Keyed(), example, repeats=1).positions == 10
    assert "labels" in example


def test_prints_what_it_measured() -> None:
    alone = benchmark(mlp(), torch.randn(7, 24), repeats=1)
    assert f"7 positions on cpu, {torch.get_num_threads()} thread" in str(alone)
    assert "8,960" in str(alone)  # MACs
    assert "reference" not in str(alone)
    both = benchmark(mlp(), torch.randn(7, 24), mlp(), repeats=1)
    row = next(row for row in both.rows() if row["per forward pass"] == "MACs")
    assert row == {
        "per forward pass": "MACs", "model": "8,960", "reference": "8,960", "ratio": "1.000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("example", "repeats", "said"),
    [
        ([torch.zeros(2, 24)], 1, "a tensor or a dict of keyword arguments, got list"),
        ("text", 1, "got str"),
        (torch.zeros(2, 24), 0, "repeats must be a positive integer, got 0"),
        (torch.zeros(2, 24), True, "got True"),
    ],
)
def test_bad_arguments(example: Any, repeats: Any, said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        benchmark(mlp(), example, repeats=repeats)
