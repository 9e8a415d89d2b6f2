"""y = U S Vᵀ x + b: the arithmetic, the children, the cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.nn import USVLinear, build, describe


def layer(a: int = 3, b: int = 2, bias: bool = True) -> tuple[USVLinear, list[np.ndarray]]:
    u, s, v = (torch.randn(*size, dtype=torch.float64) for size in ((5, a), (a, b), (7, b)))
    shift = torch.randn(5, dtype=torch.float64) if bias else None
    dense = (u @ s @ v.T).numpy()
    return USVLinear.from_factors(u, s, v, shift), [dense, np.zeros(5) if shift is None else shift]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(3, 2), (2, 3), (4, 4)])
def test_forward_is_the_product_of_three(ranks: tuple[int, int], bias: bool) -> None:
    module, (dense, shift) = layer(*ranks, bias=bias)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    got = module(x).detach().numpy()
    np.testing.assert_allclose(got, x.numpy() @ dense.T + np.asarray(shift), atol=1e-12)
    np.testing.assert_allclose(module.dense_weight().detach(), dense, atol=1e-12)
    np.testing.assert_allclose(module.weight.detach(), dense, atol=1e-12)
    assert module.rank == min(ranks)


def test_names_and_shapes_of_the_tensors_are_a_contract() -> None:
    module, _ = layer(3, 2)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "down.weight": (2, 7), "core.weight": (3, 2), "up.weight": (5, 3), "up.bias": (5,),
    }  # fmt: skip
    assert {type(child) for child in module.children()} == {nn.Linear}
    assert (module.u.shape, module.s.shape, module.v.shape) == ((5, 3), (3, 2), (7, 2))


def test_it_costs_what_it_stores() -> None:
    module, _ = layer(3, 2)
    held = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    assert module.cost().params == module.cost().macs == sum(p.numel() for p in held) == 35
    assert module.cost().bytes == 35 * 8


def test_new_factors_may_have_new_sizes() -> None:
    module, _ = layer(3, 2)
    u, s, v = torch.randn(5, 1), torch.randn(1, 4), torch.randn(7, 4)
    module.set_factors(u, s, v)
    assert (module.up.in_features, module.core.in_features, module.core.out_features) == (1, 4, 1)
    torch.testing.assert_close(module.dense_weight(), u @ s @ v.T)
    v.zero_()
    assert module.v.abs().sum() > 0


def test_a_bias_that_is_a_parameter_stays_the_same_object() -> None:
    bias = nn.Parameter(torch.zeros(5))
    module = USVLinear.from_factors(torch.eye(5, 2), torch.eye(2), torch.eye(7, 2), bias)
    assert module.bias is bias


def test_it_is_built_empty_from_what_it_says() -> None:
    module, _ = layer(3, 2)
    again = build(describe(module), "fc")
    again.load_state_dict(module.state_dict(), assign=True)
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.equal(again(x), module(x))
