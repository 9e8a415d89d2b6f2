"""Mixtures of experts through the verbs: every family is reached, and comes back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.nn import is_factored

from ..mixtures import FAMILIES, mixture
from ..zoo import VOCABULARY, unchanged

DRAW = torch.Generator().manual_seed(0)
DATA = torch.randint(0, VOCABULARY, (32, 24), generator=DRAW)


def _logits(model: Any, ids: Tensor = DATA) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def _matrices(model: Any) -> int:
    """Numbers in matrices other than the embedding and the output head."""
    ends = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    inner = [p for p in model.parameters() if id(p) not in ends]
    return sum(p.numel() for p in inner if sum(side > 1 for side in p.shape) > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_nearly_all_of_a_mixture_is_reached_and_comes_back(family: str, tmp_path: Path) -> None:
    dense = mixture(family)
    with unchanged(dense):
        small, report = lowrank.compress(dense, 0.5, data=[DATA], copy=True, progress=False)
    reached = sum(entry.dense.params for entry in report.plan.entries if entry.target)
    assert reached >= 0.95 * _matrices(dense)
    assert report.achieved <= 0.5
    small.save_pretrained(tmp_path)
    loaded = lowrank.from_pretrained(tmp_path)
    assert torch.equal(_logits(loaded), _logits(small))
    merged = lowrank.to_dense(loaded)
    assert list(merged.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(_logits(merged), _logits(small), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "JetMoe"])
def test_from_folder_to_folder_it_is_the_same(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    model.save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"data": [DATA], "effort": "fast", "progress": False}
    loaded = lowrank.from_pretrained(tmp_path / "dense")
    small, _ = lowrank.compress(loaded, 0.6, **options)
    lowrank.compress(str(tmp_path / "dense"), 0.6, out=tmp_path / "out", **options)
    streamed = lowrank.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(streamed), _logits(small), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("effort", ["fast", lowrank.Recovery(block_steps=30)])
def test_efforts_lower_the_loss(effort: str | lowrank.Recovery) -> None:
    dense = mixture("Mixtral")
    plain, _ = lowrank.compress(dense, 0.5, data=None, copy=True, progress=False)
    small, report = lowrank.compress(
        dense, 0.5, data=[DATA], effort=effort, copy=True, progress=False
    )
    assert lowrank.kl(dense, small, [DATA]) < lowrank.kl(dense, plain, [DATA])
    assert any("refitted in closed form" in note for note in report.notes)


def test_half_precision_and_training() -> None:
    model = mixture("Qwen3Moe").to(torch.bfloat16)
    small, _ = lowrank.compress(model, 0.5, data=[DATA], effort="fast", progress=False)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    small.train()
    small(DATA, labels=DATA).loss.backward()
    experts = [p for n, p in small.named_parameters() if "experts" in n]
    assert all(p.grad is not None for p in experts)


def test_verbs_that_only_look_leave_the_weights_fused() -> None:
    model = mixture("Olmoe")
    with unchanged(model):
        calibration = lowrank.calibrate(model, [DATA], progress=False)
        calibration = lowrank.with_fisher(model, calibration, progress=False)
        plan = lowrank.plan(model, 0.5, data=calibration, progress=False)
        lowrank.inspect(model, timing=False, progress=False)
        lowrank.sensitivity(model, [DATA[:4]], ratios=[0.5], method="svd", progress=False)
        lowrank.sweep(model, [0.7, 0.5], data=[DATA], progress=False)
    names = {entry.name for entry in plan.entries}
    assert "model.layers.0.mlp.experts.down_proj.3" in names
    assert calibration.statistics["model.layers.0.mlp.experts.down_proj.3"].out_gram is not None
    small, _ = lowrank.apply(model, plan, data=calibration, progress=False)
    assert is_factored(small.get_submodule("model.layers.0.mlp.experts.down_proj.3"))


def _never_to(model: Any, expert: int) -> None:
    """Let no router choose this expert."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[expert] = 0
            layer.mlp.gate.weight[0] = 0.0
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(_without(expert))


def _without(expert: int) -> Any:
    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        logits, shares, chosen = output
        return logits, shares, torch.where(chosen == expert, (chosen + 1) % 4, chosen)

    return hook


@pytest.mark.parametrize("on_missing", ["dense", "data-free"])
def test_an_expert_that_is_never_routed(on_missing: Any) -> None:
    model = mixture("Mixtral")
    _never_to(model, 2)
    small, report = lowrank.compress(
        model, 0.5, data=[DATA], effort="fast", on_missing=on_missing, progress=False
    )
    unseen = [e for e in report.plan.entries if e.name.endswith(("up_proj.2", "down_proj.2"))]
    assert len(unseen) == 4
    if on_missing == "dense":
        assert all("0 tokens" in entry.reason for entry in unseen)
        assert not is_factored(small.get_submodule(unseen[0].name))
    else:
        assert all(entry.size for entry in unseen)
    assert torch.isfinite(_logits(small)).all()


def test_an_expert_with_three_tokens() -> None:
    """Its few rows do not make the fit fall apart."""
    model = mixture("Mixtral")

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        logits, shares, chosen = output
        chosen = torch.where(chosen == 2, (chosen + 1) % 4, chosen)
        if chosen.shape[0] > 24:
            chosen[:3, 0] = 2
        return logits, shares, chosen

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(hook)
    calibration = lowrank.calibrate(model, [DATA], progress=False)
    names = [f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(4)]
    counts = [calibration.statistics[name].count for name in names]
    assert 3 <= counts[2] <= 6
    gram = calibration.statistics[names[0]].gram
    assert gram is not None
    dense = [
        model.get_parameter(n.rpartition(".")[0])[e].detach().double() for e, n in enumerate(names)
    ]
    small, _ = lowrank.compress(
        model, 0.5, data=[DATA], effort="fast", policy="uniform", copy=True, progress=False
    )
    lost = []
    for name, weight in zip(names, dense, strict=True):
        new: Any = small.get_submodule(name)
        difference = new.dense_weight(torch.float64).detach() - weight
        error, whole = ((d @ gram * d).sum() for d in (difference, weight))
        lost.append(float(error / whole))
    assert lost[2] < 1.25 * max(lost[0], lost[1], lost[3])


class Routed(nn.Module):
    """Experts in a list, whose router is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = self.router(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(rows[chosen == index])
        return x + out.view_as(x)


def test_a_router_that_is_itself_a_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(Routed() for _ in range(3)), nn.Linear(16, 8)).eval()
    data = torch.randn(64, 5, 16)
    small, report = lowrank.compress(net, 0.7, data=[data], effort="fast", progress=False)
    reasons = {entry.name: entry.reason for entry in report.plan.entries}
    assert "0.router" in reasons
    assert is_factored(small.get_submodule("1.experts.0.0"))


def test_experts_that_share_one_weight() -> None:
    model = mixture("Mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with unchanged(model):
        small, report = lowrank.compress(model, 0.5, data=[DATA], copy=True, progress=False)
    tied = [e for e in report.plan.entries if len(e.sites) > 1]
    assert len(tied) == 4
    layers = [small.get_submodule(name) for name in tied[0].sites]
    assert layers[0] is layers[1]
