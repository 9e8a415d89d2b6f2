"""What counts as a matrix, and every reason why a layer stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune, weight_norm

from lowrank.walk import layouts


def conv1d(out_features: int = 6, in_features: int = 4) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out_features, in_features)


def hooked(kind: str) -> nn.Linear:
    layer = nn.Linear(4, 6)
    getattr(layer, f"register_{kind}")(lambda *_: None)
    return layer


def patched() -> nn.Linear:
    layer = nn.Linear(4, 6)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def offloaded() -> nn.Linear:
    layer = nn.Linear(4, 6)
    layer._hf_hook = object()
    return layer


def stored_as(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Odd(torch.Tensor):
    """A tensor that may mean something else, as quantized ones do."""


def odd() -> nn.Linear:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.randn(6, 4).as_subclass(Odd))
    return layer


def subclass_of_conv1d() -> nn.Module:
    layer = conv1d()
    forward = type(layer).forward
    twice = {"forward": lambda self, x: 2 * forward(self, x)}
    layer.__class__ = type("Scaled", (type(layer),), twice)
    return layer


OBSTACLES = {
    "parametrized": (lambda: parametrizations.orthogonal(nn.Linear(4, 6)), "parametrized"),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(4, 6)), "parametrized"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 6), "weight", 0.5), "pruning"),
    "Conv1D subclass": (subclass_of_conv1d, "Scaled does not compute what its base nn.Conv1D"),
    "forward hook": (lambda: hooked("forward_hook"), "hooks"),
    "pre-hook": (lambda: hooked("forward_pre_hook"), "hooks"),
    "backward hook": (lambda: hooked("full_backward_hook"), "hooks"),
    "backward pre-hook": (lambda: hooked("full_backward_pre_hook"), "hooks"),
    "patched": (patched, "forward is wrapped"),
    "offloaded": (offloaded, "forward is wrapped"),
    "int8": (lambda: stored_as(torch.ones(6, 4, dtype=torch.int8)), "stored as torch.int8"),
    "float8": (lambda: stored_as(torch.ones(6, 4).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "packed": (lambda: stored_as(torch.ones(24, 1, 1)), "shape (24, 1, 1)"),
    "empty": (lambda: stored_as(torch.ones(0, 4)), "shape (0, 4)"),
    "tensor subclass": (odd, "of class Odd"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_are_told(name: str) -> None:
    build, words = OBSTACLES[name]
    layer = build()
    assert layouts.kind(layer) == "linear"  # it is considered
    assert words in layouts.obstacle(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_is_an_obstacle() -> None:
    assert "weight norm" in layouts.obstacle(weight_norm(nn.Linear(4, 6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_layers_have_none(dtype: torch.dtype) -> None:
    for layer in (nn.Linear(4, 6), nn.Linear(4, 6, bias=False), conv1d()):
        assert layouts.obstacle(layer.to(dtype)) == ""


def test_kinds() -> None:
    linear = (nn.Linear(2, 3), conv1d(), NonDynamicallyQuantizableLinear(2, 3))
    assert all(layouts.kind(layer) == "linear" for layer in linear)
    tables = (nn.Embedding(2, 3), nn.EmbeddingBag(2, 3), type("Own", (nn.Embedding,), {})(2, 3))
    assert all(layouts.kind(layer) == "embedding" for layer in tables)
    convs = (
        nn.Conv1d(2, 3, 1),
        nn.Conv2d(2, 3, 1),
        nn.Conv3d(2, 3, 1),
        nn.ConvTranspose2d(2, 3, 1),
    )
    assert all(layouts.kind(layer) == "conv" for layer in convs)
    others = (nn.Bilinear(2, 3, 4), nn.BatchNorm2d(3), nn.Identity())
    assert all(layouts.kind(layer) is None for layer in others)
    own = type("Conv1D", (nn.Module,), {})  # of this name, but not of transformers
    assert layouts.kind(own()) is None


def test_the_matrix_is_out_by_in_whatever_the_layout() -> None:
    x = torch.randn(5, 4)
    for layer in (nn.Linear(4, 6), conv1d(6, 4)):
        weight, bias = layouts.matrix(layer), layouts.bias(layer)
        assert weight.shape == (6, 4)
        assert weight.data_ptr() == layer.weight.data_ptr()  # a view, no copy
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
    assert [layouts.layout(layer) for layer in (nn.Linear(4, 6), conv1d())] == ["linear", "conv1d"]
    assert layouts.bias(nn.Linear(4, 6, bias=False)) is None


def test_dense_cost() -> None:
    cost = layouts.dense_cost(nn.Linear(4, 6).bfloat16())
    assert (cost.params, cost.bytes, cost.macs) == (24, 48, 24)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_seen(bad: float) -> None:
    layer = nn.Linear(4, 6)
    assert layouts.is_finite(layer)
    with torch.no_grad():
        layer.weight[3, 2] = bad
    assert not layouts.is_finite(layer)
