"""Plans change nothing, tell why every site stays dense, and follow on_missing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Calibration, LowrankError, Plan
from lowrank.methods import SVD, Whitened
from lowrank.types import Curve, Option, Site, Statistics
from lowrank.walk import layouts
from lowrank.walk.parts import separate_parts
from tests.zoo import Custom, calibration, example, make, mlp, said, tokens, unchanged


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "opt", "vit", "mixtral"])
def test_a_plan_changes_nothing(kind: str) -> None:
    model = make(kind).train()
    with unchanged(model):
        made = lowrank.plan(model, 0.6, data=[example(kind)], progress=False)
    assert made.method == "whitened"
    assert any(entry.size for entry in made.entries)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mixtral"])
def test_every_site_is_in_the_plan_with_a_reason_if_it_stays_dense(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = make(kind)
    made = lowrank.plan(model, 0.6, data=None, exclude_modules=[_some(model)])
    with separate_parts(model):
        kinds = nn.Linear | Conv1D | nn.Embedding
        considered = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    assert {name for entry in made.entries for name in entry.sites} == considered
    for entry in made.entries:
        assert (entry.size is None) == bool(entry.reason)
    assert sum(bool(entry.reason) for entry in made.entries) >= 2


def _some(model: nn.Module) -> str:
    return next(n for n, module in model.named_modules() if layouts.kind(module) == "linear")


def test_planned_errors_are_those_of_numpys_svd() -> None:
    model = mlp(24, 40, 24)
    x = torch.randn(200, 24)
    hidden = model[1](model[0](x)).detach()
    plain = lowrank.plan(model, 0.5)
    whitened = lowrank.plan(model, 0.5, data=x, progress=False)
    for index, inputs in ((0, x), (1, hidden)):
        weight = model[2 * index].weight.detach().double().numpy()
        rows = inputs.double().numpy()
        root = np.linalg.cholesky(rows.T @ rows / len(rows) + 1e-12 * np.eye(rows.shape[1]))
        for made, matrix in ((plain, weight), (whitened, weight @ root)):
            entry = made.entries[index]
            values = np.linalg.svd(matrix, compute_uv=False) ** 2
            assert entry.error == pytest.approx(values[entry.size[0] :].sum(), rel=1e-5)
            assert entry.total == pytest.approx(values.sum(), rel=1e-5)
            rcond = (values[-1] / values[0]) ** 0.5
            assert entry.rcond == pytest.approx(rcond, rel=1e-3, abs=1e-6)
    assert [entry.norm for entry in plain.entries] == ["weight", "weight"]
    assert [entry.norm for entry in whitened.entries] == ["output", "output"]


def test_a_singular_problem_says_so() -> None:
    model = mlp(8, 6)
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[2]
    assert lowrank.plan(model, rank=2).entries[0].rcond < 1e-7
    with torch.no_grad():
        model[0].weight.zero_()
    assert lowrank.plan(model, rank=2).entries[0].rcond == 0


# Methods


def test_the_method_follows_from_the_data_unless_it_is_named() -> None:
    model, x = mlp(16, 16), torch.randn(9, 16)
    assert lowrank.plan(model, 0.5).method == "svd"
    assert lowrank.plan(model, 0.5, data=None).method == "svd"
    assert lowrank.plan(model, 0.5, data=x).method == "whitened"
    assert lowrank.plan(model, 0.5, data=x, method="svd").method == "svd"
    assert lowrank.plan(model, 0.5, method="random").method == "random"
    assert lowrank.plan(model, 0.5, data=x, method=Whitened(seed=3)).method == "whitened"


def test_a_method_that_needs_data_says_so() -> None:
    for method in ("whitened", Whitened()):
        with pytest.raises(LowrankError, match="needs calibration data") as caught:
            lowrank.plan(mlp(16, 16), 0.5, method=method)
        said(caught)


class Picky:
    """A method for another kind of site."""

    kinds = frozenset({"conv", "embedding"})
    needs = frozenset[str]()

    def curve(self, site: Site, stats: Statistics) -> Curve:
        raise AssertionError("it was asked for a site that it does not take")

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        raise AssertionError


def test_sites_of_a_kind_that_the_method_does_not_take() -> None:
    with pytest.raises(LowrankError, match="the method takes conv, embedding layers, but no"):
        lowrank.plan(mlp(16, 16), 0.5, method=Picky())


# Missing data


class Branches(nn.Module):
    """`left` sees rows that begin above zero, `right` the others."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = x[:, 0] > 0
        return torch.cat([self.left(x[up]), self.right(x[~up])])


def branches(left: int, right: int, min_tokens: int = 1) -> tuple[Branches, Calibration]:
    model = Branches()
    x = torch.randn(left + right, 16)
    x[:, 0] = torch.tensor([1.0] * left + [-1.0] * right)
    return model, calibration(model, x, min_tokens=min_tokens)


def test_an_unseen_site_stays_dense_and_is_no_target() -> None:
    """The others do not pay for it, and it is told."""
    model, found = branches(9, 0)
    made = lowrank.plan(model, 0.7, data=found, align=1)
    left, right = made.entries
    assert right.size is None
    assert right.reason == "the calibration data gave it 0 tokens, fewer than 1"
    assert not right.target
    assert left.size == (5,)  # 5 · 32 ≤ 0.7 · 256
    assert made.kept() == left.cost.params / 256 <= 0.7
    (note,) = made.notes
    told = "1 layers with 256 parameters were not reached by the data and stay dense"
    assert note.startswith(told)
    assert note.endswith(": right")
    assert told in str(made)
    again = Plan.from_json(made.to_json())
    assert again.notes == made.notes
    _, report = lowrank.apply(model, again, data=found, progress=False)
    assert note in report.notes
    assert report.achieved == made.kept()


def test_of_the_model_the_others_pay_for_what_is_unseen() -> None:
    """The size of the model was asked for; that some of it cannot shrink is told."""
    model, found = branches(9, 0)
    made = lowrank.plan(model, 0.75, of="model", data=found, align=1)
    assert made.entries[0].size == (3,)  # 3 · 32 + 256 + 32 ≤ 0.75 · 544
    assert made.kept_of_model() <= 0.75
    assert len(made.notes) == 1


def test_a_kind_that_the_method_does_not_take_is_no_target() -> None:
    class Linears(SVD):
        kinds = frozenset({"linear"})

    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 32))
    made = lowrank.plan(model, 0.5, method=Linears(), align=1)
    assert [entry.target for entry in made.entries] == [False, True, True]
    assert [entry.size for entry in made.entries] == [None, (8,), (8,)]
    assert made.notes[0].startswith(
        "1 layers with 576 parameters are of a kind that the method does not take and stay dense"
    )


def test_notes_of_a_plan_are_texts() -> None:
    model, found = branches(9, 0)
    body = json.loads(lowrank.plan(model, 0.7, data=found).to_json())
    body["settings"]["notes"] = [3]
    with pytest.raises(LowrankError, match="notes"):
        Plan.from_json(json.dumps(body))
    assert lowrank.plan(mlp(16, 16), 0.5).notes == ()


def test_too_few_tokens_are_as_none() -> None:
    model, found = branches(9, 4, min_tokens=5)
    made = lowrank.plan(model, 0.7, data=found)
    assert made.entries[1].reason == "the calibration data gave it 4 tokens, fewer than 5"
    assert "were given fewer than 5 tokens by the data" in made.notes[0]


def test_a_layer_whose_weight_alone_is_read_is_told_from_one_that_no_data_reaches() -> None:
    """Some models multiply by the weight of a layer that they never call."""
    layers = {name: nn.Linear(16, 16) for name in ("called", "read", "unused")}

    def call(self: Any, x: Tensor) -> Tensor:
        dtype = self.unused.weight.dtype  # which is no use of it
        return nn.functional.linear(torch.relu(self.called(x)), self.read.weight).to(dtype)

    model = Custom(call, **layers)
    made = lowrank.plan(model, 0.6, data=[torch.randn(64, 16)], method="whitened", progress=False)
    reasons = {entry.name: entry.reason for entry in made.entries}
    assert reasons["read"] == "its weight is read without calling the layer: no data reaches it"
    assert reasons["unused"] == "the calibration data gave it 0 tokens, fewer than 1"
    (said,) = (note for note in made.notes if "only their weights are read" in note)
    assert said.startswith("1 layers with 256 parameters are never called")
    assert said.endswith(": read")
    model, found = branches(9, 4, min_tokens=4)
    assert lowrank.plan(model, 0.7, data=found).entries[1].size is not None


def test_data_free_takes_the_plain_svd_there() -> None:
    model, found = branches(9, 0)
    left, right = lowrank.plan(model, 0.5, data=found, on_missing="data-free").entries
    assert (left.method, left.norm) == ("whitened", "output")
    assert (right.method, right.norm) == ("svd", "weight")
    assert lowrank.plan(model, 0.5, data=found, on_missing="data-free").method == "whitened"
    plain = lowrank.plan(model, 0.5).entries[1]
    assert (right.size, right.error) == (plain.size, plain.error)


def test_errors_of_two_norms_are_not_added() -> None:
    model, found = branches(9, 0)
    with pytest.raises(LowrankError, match="norms"):
        lowrank.plan(model, 0.5, data=found, on_missing="data-free", policy="spectrum")


def test_error_names_what_is_missing() -> None:
    model, found = branches(9, 0)
    with pytest.raises(
        LowrankError, match="gave 1 layers too few tokens: right; on_missing"
    ) as caught:
        lowrank.plan(model, 0.7, data=found, on_missing="error")
    said(caught)


def test_a_data_free_method_misses_nothing() -> None:
    model, found = branches(9, 0)
    made = lowrank.plan(model, 0.5, data=found, method="svd", on_missing="error")
    assert all(entry.size for entry in made.entries)


def test_no_target_was_reached() -> None:
    model, found = branches(9, 0)
    with pytest.raises(LowrankError, match="reached none of the 1 targets: right") as caught:
        lowrank.plan(model, 0.5, data=found, target_modules=["right"])
    said(caught)


def test_a_calibration_of_another_model() -> None:
    found = calibration(mlp(16, 12, 16), torch.randn(9, 16))
    with pytest.raises(LowrankError) as caught:
        lowrank.plan(mlp(16, 24, 16), 0.5, data=found)
    assert said(caught) == (
        "2: the calibration saw inputs of width 12, the layer reads 24: "
        "it was made for another model"
    )


def test_a_calibration_serves_many_plans_and_runs_the_model_no_more() -> None:
    model = make("llama")
    found = calibration(model, tokens(4, 16))
    calls: list[Any] = []
    handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    direct = lowrank.plan(model, 0.6, data=found)
    assert calls == []
    handle.remove()
    assert direct == lowrank.plan(model, 0.6, data=tokens(4, 16), progress=False)


@pytest.mark.parametrize("options", [{}, {"data": tokens(4, 16)}, {"method": "random"}], ids=str)
def test_the_same_twice(options: dict[str, Any]) -> None:
    made = [lowrank.plan(make("llama"), 0.6, progress=False, **options) for _ in range(2)]
    assert made[0].to_json() == made[1].to_json()


def test_objects_of_registered_methods_are_called_by_their_names() -> None:
    made = lowrank.plan(mlp(16, 16), 0.5, method=SVD(seed=5))
    assert made.method == "svd"
