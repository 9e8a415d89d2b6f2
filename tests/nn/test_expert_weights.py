"""The weights of several experts: what stands for a tensor multiplies as the tensor did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.nn import LowRankLinear
from lowrank.nn.expert_weights import ExpertWeights, Product

EXPERTS, OUT, IN = 3, 5, 4


def _pair(transposed: bool) -> tuple[ExpertWeights, Tensor]:
    sides = (IN, OUT) if transposed else (OUT, IN)
    weight = torch.randn(EXPERTS, *sides, dtype=torch.float64, requires_grad=True)
    return ExpertWeights.split(weight, transposed=transposed), weight.detach()


def _factored(transposed: bool) -> tuple[ExpertWeights, Tensor]:
    """One of its layers is factored."""
    weights, dense = _pair(transposed)
    down, up = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, IN), (OUT, 2)))
    low = LowRankLinear.from_factors(down, up, None)
    weights._modules["1"] = low
    dense = dense.clone()
    product = low.dense_weight().detach()
    dense[1] = product.T if transposed else product
    return weights, dense


@pytest.fixture(params=[_pair, _factored])
def made(request: Any) -> Any:
    torch.manual_seed(0)
    return request.param


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_it_says_of_itself_what_a_tensor_says() -> None:
    weights, dense = _pair(transposed=True)
    assert weights.shape == dense.shape
    assert (weights.ndim, weights.dtype, weights.device) == (3, dense.dtype, dense.device)
    assert len(weights) == EXPERTS
    assert weights.size(0) == EXPERTS
    assert weights.requires_grad
    assert weights[1].shape == (IN, OUT)
    assert weights[-1].T.shape == (OUT, IN)
    assert weights[torch.tensor([2, 0])].transpose(-1, -2).shape == (2, OUT, IN)
    assert [each.shape for each in weights] == [(IN, OUT)] * EXPERTS
    with pytest.raises(AttributeError, match="no_such"):
        weights.no_such  # noqa: B018
    with pytest.raises(IndexError):
        weights[EXPERTS]


def test_one_expert_by_linear_and_matmul(made: Any) -> None:
    x, bias = _rows(7, IN), _rows(OUT)
    weights, dense = made(transposed=False)
    for index in (0, 1, torch.tensor(1)):
        torch.testing.assert_close(F.linear(x, weights[index]), F.linear(x, dense[index]))
        with_bias = F.linear(x, weights[index], bias)
        torch.testing.assert_close(with_bias, F.linear(x, dense[index], bias))
        torch.testing.assert_close(x @ weights[index].T, x @ dense[index].T)
    turned, dense = made(transposed=True)
    torch.testing.assert_close(x @ turned[1], x @ dense[1])
    torch.testing.assert_close(torch.matmul(x, turned[1]), x @ dense[1])
    torch.testing.assert_close(F.linear(x, turned[1].T), x @ dense[1])


def test_all_experts_and_chosen_ones_by_bmm(made: Any) -> None:
    turned, dense = made(transposed=True)
    x, chosen = _rows(EXPERTS, 2, IN), torch.tensor([1, 0, 1, 2])
    torch.testing.assert_close(torch.bmm(x, turned), torch.bmm(x, dense))
    torch.testing.assert_close(x @ turned, x @ dense)
    y = _rows(4, 1, IN)
    torch.testing.assert_close(torch.bmm(y, turned[chosen]), torch.bmm(y, dense[chosen]))
    straight, dense = made(transposed=False)
    columns = _rows(4, IN, 1)
    expected = torch.bmm(dense[chosen], columns)
    torch.testing.assert_close(torch.bmm(straight[chosen], columns), expected)


def test_rows_sorted_by_expert(made: Any) -> None:
    turned, dense = made(transposed=True)
    x, ends = _rows(6, IN), torch.tensor([2, 2, 5], dtype=torch.int32)
    found = Product(turned).run(x, ends)
    torch.testing.assert_close(found[:2], x[:2] @ dense[0])
    torch.testing.assert_close(found[2:5], x[2:5] @ dense[2])
    assert not found[5:].any()  # of no expert


def test_exported_its_sizes_do_not_depend_on_data(made: Any) -> None:
    """What is chosen or sorted at the example is none of the graph's."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.dense = made(transposed=True)

        def forward(self, x: Tensor, index: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
            return (self.weights[index].mT @ x.mT).mT, torch._grouped_mm(
                x[:, 0], self.weights, offs=offs
            )

    experts, draw = Experts(), _rows(6, 2, IN)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    program = torch.export.export(experts, (draw, torch.tensor([0, 2, 2, 1, 0, 2]), ends)).module()
    for index, offs in (([1, 1, 1, 0, 2, 0], [1, 4, 5]), ([2, 2, 2, 2, 2, 2], [0, 0, 6])):
        x = _rows(6, 2, IN)
        chosen, ends = torch.tensor(index), torch.tensor(offs, dtype=torch.int32)
        found = program(x, chosen, ends)
        torch.testing.assert_close(found[0], x @ experts.dense[chosen])
        owner = [sum(row >= end for end in offs) for row in range(6)]
        want = [
            x[i, 0] @ experts.dense[e] if e < EXPERTS else _rows(OUT) * 0
            for i, e in enumerate(owner)
        ]
        torch.testing.assert_close(found[1], torch.stack(want))


def test_anything_else_takes_the_dense_tensor(made: Any) -> None:
    weights, dense = made(transposed=False)
    x = _rows(2, IN)
    found: Any = torch.einsum("eoi,ni->eno", weights, x)
    torch.testing.assert_close(found, torch.einsum("eoi,ni->eno", dense, x))
    torch.testing.assert_close(weights[:2], dense[:2])
    torch.testing.assert_close(weights.to(torch.float32), dense.float())
    torch.testing.assert_close(torch.sum(weights[2]), dense[2].sum())


def test_gradients_reach_the_layers_that_ran() -> None:
    weights, dense = _pair(transposed=False)
    x = _rows(3, IN)
    F.linear(x, weights[2]).square().sum().backward()
    leaf = dense[2].clone().requires_grad_()
    F.linear(x, leaf).square().sum().backward()
    layers: list[Any] = list(weights.layers())
    torch.testing.assert_close(layers[2].weight.grad, leaf.grad)
    assert layers[0].weight.grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_layers_join_into_the_weight(transposed: bool) -> None:
    weights, dense = _pair(transposed)
    assert weights.is_dense
    assert torch.equal(weights.joined(), dense)
    assert isinstance(weights.joined(), nn.Parameter)
    weights, _ = _factored(transposed)
    assert not weights.is_dense


def test_layers_are_views_not_copies() -> None:
    weight = nn.Parameter(torch.zeros(EXPERTS, OUT, IN))
    layers: list[Any] = list(ExpertWeights.split(weight, transposed=False).layers())
    with torch.no_grad():
        layers[1].weight.fill_(3.0)
    assert torch.equal(weight[1], torch.full((OUT, IN), 3.0))
