"""Layers that a model would not call under another class stay dense, and the report says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.calibration.observation import observe
from lowrank.nn import LowRankLinear
from lowrank.walk.sites import find_sites
from lowrank.walk.surgery import StandIn, stood_in
from tests.zoo import unchanged

WIDTH = 24


class Three(nn.Module):
    """Layers a, b and c, called in order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        held = self.b
        self.held, self.call = [held], lambda x: held(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.middle(self.a(x).tanh()).tanh())

    def middle(self, x: Tensor) -> Tensor:
        return self.b(x)


class ByClass(Three):
    def middle(self, x: Tensor) -> Tensor:
        return self.b(x) if isinstance(self.b, nn.Linear) else x


class ByExactClass(Three):
    def middle(self, x: Tensor) -> Tensor:
        assert type(self.b) is nn.Linear
        return self.b(x)


class InAList(Three):
    def middle(self, x: Tensor) -> Tensor:
        return self.held[0](x)


class InAClosure(Three):
    def middle(self, x: Tensor) -> Tensor:
        return self.call(x)


ODD = [ByClass, ByExactClass, InAList, InAClosure]


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("effort", [None, "fast"])
@pytest.mark.parametrize("odd", ODD)
def test_what_cannot_be_replaced_stays_dense(
    odd: Callable[[], Three], effort: str | None, rows: Tensor
) -> None:
    model = odd()
    _, report = lowrank.compress(model, 0.6, data=rows, effort=effort, progress=False)
    assert type(model.b) is nn.Linear
    assert not isinstance(model.a, nn.Linear)
    assert not isinstance(model.c, nn.Linear)
    (note,) = (note for note in report.notes if "cannot be replaced" in note)
    assert note.startswith("1 layers with 576 parameters cannot be replaced (the model asks for")
    assert note.endswith(": b")


def test_the_model_computes_what_its_layers_do(rows: Tensor) -> None:
    """With the class asked for, it would pass over a factored layer, and differ by much."""
    model, dense = ByClass(), ByClass()
    lowrank.compress(model, 0.9, data=rows, progress=False)
    with torch.no_grad():
        expected = dense(rows)
        assert (model(rows) - expected).norm() < 0.5 * expected.norm()


def test_without_data_what_a_list_holds_stays_dense(rows: Tensor) -> None:
    """Whether it is called through the list only data shows, and then it is no guess."""
    model = InAList()
    _, report = lowrank.compress(model, 0.6, data=None)
    assert type(model.b) is nn.Linear
    assert any(note.startswith("1 layers with 576 parameters cannot be") for note in report.notes)
    called = Three()  # by its name, though a list holds it
    lowrank.compress(called, 0.6, data=rows, progress=False)
    assert type(called.b) is LowRankLinear


def test_a_model_of_which_nothing_can_be_replaced(rows: Tensor) -> None:
    class Loop(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x) if isinstance(layer, nn.Linear) else x
            return x

    model = Loop(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    with unchanged(model), pytest.raises(LowrankError, match="all 2 targets cannot be replaced"):
        lowrank.compress(model, 0.6, data=rows, progress=False)


@pytest.mark.parametrize(("odd", "count"), [(Three, 1), (InAClosure, 7), (ByExactClass, 7)])
def test_only_odd_models_are_run_more_often(odd: Callable[[], Three], count: int, rows) -> None:
    """Once without stand-ins, with all, with a alone, with b and c, and with either."""
    model, runs = odd(), []

    def run() -> None:
        runs.append(1)
        model(rows)

    with unchanged(model):
        seen = observe(model, find_sites(model), run)
    assert len(runs) == count
    assert seen.irreplaceable == (() if odd is Three else ("b",))
    assert seen.order == ("a", "b", "c")
    assert seen.bypassed == ()
    assert not any(isinstance(module, StandIn) for module in model.modules())


def test_a_model_that_raises_is_as_it_was(rows: Tensor) -> None:
    model = Three()
    with unchanged(model), pytest.raises(LowrankError, match="Three does not run on the data: Ru"):
        lowrank.calibrate(model, rows[:, :5], progress=False)
    with pytest.raises(KeyboardInterrupt), stood_in(model, find_sites(model)):
        raise KeyboardInterrupt
    assert type(model.a) is nn.Linear


def test_a_stand_in_answers_as_the_layer() -> None:
    layer = LowRankLinear(WIDTH, WIDTH, 3)
    one = StandIn(layer)
    assert (one.in_features, one.rank, one.training) == (WIDTH, 3, True)
    assert one.bias is layer.bias
    with pytest.raises(AttributeError, match="nothing"):
        _ = one.nothing


def test_a_calibration_in_a_file_keeps_it(rows: Tensor, tmp_path) -> None:
    model = InAList()
    calibration = lowrank.calibrate(model, rows, progress=False)
    lowrank.save_calibration(calibration, tmp_path / "seen.safetensors", model)
    again = lowrank.load_calibration(tmp_path / "seen.safetensors", model)
    assert again.observation.irreplaceable == ("b",)
