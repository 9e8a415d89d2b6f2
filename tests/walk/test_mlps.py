"""MLPs are found by what they compute, whatever they are called; others are told why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.errors import LowrankError
from lowrank.nn import RoutedMLP
from lowrank.walk.mlps import NOT_SEEN, check_replaces, find_mlps


class Gated(nn.Module):
    def __init__(self, act: Any = nn.functional.silu, *, square: bool = False) -> None:
        super().__init__()
        width = 6 if square else 10
        self.b, self.z = nn.Linear(6, width), nn.Linear(6, width)  # z is the gate
        self.a = nn.Linear(width, 6)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.b(x) * self.act(self.z(x)))
        return y


class Twice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * super().forward(x)


class Added(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class InARow(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.b(x)) + self.a(self.z(x))
        return y


def found_in(model: nn.Module, x: Tensor) -> tuple[dict[str, tuple[Any, ...]], Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        mlps, skipped = find_mlps(model, lambda: model(x))
    return {mlp.name: (mlp.layers, mlp.activation, mlp.neurons) for mlp in mlps}, skipped


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (nn.functional.silu, "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu-tanh"),
        (torch.relu, "relu"),
        (lambda x: torch.relu(x) ** 2, "relu-squared"),
        (lambda x: x, "identity"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_and_its_activation_are_found(act: Any, said: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(Gated(act), nn.Linear(6, 3)).to(dtype)
    (mlp,) = found_in(model, torch.randn(2, 5, 6).to(dtype))[0].values()
    assert mlp[1:] == (said, 10)
    assert mlp[0][-1] == "a"
    assert said == "identity" or mlp[0] == ("z", "b", "a")


def test_layers_that_are_all_square_are_told_apart() -> None:
    assert found_in(Gated(square=True), torch.randn(5, 6))[0] == {"": (("z", "b", "a"), "silu", 6)}


def test_two_layers_with_an_activation_and_dropout_are_an_mlp() -> None:
    inner = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 6))
    model = nn.Sequential(inner, nn.Linear(6, 3)).eval()
    found, skipped = found_in(model, torch.randn(4, 6))
    assert found == {"0": (("0", "3"), "gelu", 8)}
    assert not skipped


def test_a_bottleneck_is_none() -> None:
    found, skipped = found_in(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), torch.randn(4, 6))
    assert not found
    assert "no known activation" in skipped["(root)"]


def test_what_is_none_is_said_with_the_reason() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.added, self.in_a_row = Twice(), Added(), InARow()
            self.odd, self.unused, self.hooked = Gated(torch.sin), Gated(), Gated()
            self.hooked.b.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            for part in (self.twice, self.added, self.in_a_row, self.odd, self.hooked):
                x = part(x)
            return x

    found, skipped = found_in(Whole(), torch.randn(4, 6))
    assert not found
    said = {
        "twice": "each of its layers once", "added": "its last layer's output",
        "in_a_row": "each of its layers once", "odd": "no known activation",
        "unused": NOT_SEEN, "hooked": "b: it has hooks",
    }  # fmt: skip
    assert skipped.keys() == said.keys()
    for name, reason in said.items():
        assert reason in skipped[name]


def test_no_hook_stays() -> None:
    model = Gated()
    found_in(model, torch.randn(4, 6))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_mlp_of_other_layers_is_refused() -> None:
    mlp = Gated()
    order = torch.arange(10)
    routed = RoutedMLP.split({"z": mlp.z, "b": mlp.b, "a": mlp.a}, "silu", order, 2)
    check_replaces(mlp, routed, "mlp")
    with pytest.raises(LowrankError, match=r"mlp.z: stored as \(out, in, bias\) = \(10, 6, True\)"):
        check_replaces(Gated(square=True), routed, "mlp")
    with pytest.raises(LowrankError, match=r"mlp: stored as an MLP with a layer z, but Linear has"):
        check_replaces(nn.Linear(2, 2), routed, "mlp")
