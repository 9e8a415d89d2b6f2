"""y = up(down(x)): the arithmetic, the children, the cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank.nn import LowRankLinear
from lowrank.types import Cost

from .forms import factors

SHAPES = [(3, 7, 2), (7, 3, 2), (4, 4, 4), (5, 5, 1)]  # (out, in, rank)


def layer(
    out_features: int, in_features: int, rank: int, *, bias: bool = True
) -> tuple[LowRankLinear, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    down, up, shift = factors(out_features, in_features, rank, bias=bias)
    return LowRankLinear.from_factors(down, up, shift), down, up, shift


def test_names_and_shapes_of_the_tensors_are_a_contract() -> None:
    module, *_ = layer(5, 8, 3)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {"down.weight": (3, 8), "up.weight": (5, 3), "up.bias": (5,)}
    assert type(module.down) is type(module.up) is nn.Linear
    assert (module.in_features, module.out_features, module.rank) == (8, 5, 3)
    assert module.bias is module.up.bias
    assert "down.bias" not in layer(5, 8, 3, bias=False)[0].state_dict()


def test_weight_reads_as_the_dense_one() -> None:
    module, down, up, _ = layer(5, 8, 3)
    torch.testing.assert_close(module.weight, up @ down)
    assert module.dense_weight(torch.float32).dtype == torch.float32
    narrow = copy.deepcopy(module).bfloat16()
    want = narrow.up.weight.double() @ narrow.down.weight.double()
    assert torch.equal(narrow.dense_weight(torch.float64), want)


def test_factors_of_a_graph_are_cut_from_it() -> None:
    factor = torch.ones(2, 3, requires_grad=True) * 2
    module = LowRankLinear.from_factors(factor, torch.ones(4, 2), None)
    module(torch.ones(3)).sum().backward()
    assert module.down.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SHAPES)
def test_cost_is_what_is_stored(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    module = layer(*sizes)[0].to(dtype)
    weights = [module.down.weight, module.up.weight]
    params = sum(weight.numel() for weight in weights)
    stored = sum(weight.untyped_storage().nbytes() for weight in weights)
    assert module.cost() == Cost(params, stored, params)


def test_greenformer_counts() -> None:
    """r(in + out) + out numbers with the bias (methods/core.md §4f)."""
    for out_features, in_features, rank in ((768, 768, 256), (3072, 768, 128), (768, 3072, 614)):
        spec = {"in_features": in_features, "out_features": out_features, "rank": rank}
        module = LowRankLinear.empty(**spec, bias=True)
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == rank * (in_features + out_features) + out_features


@pytest.mark.parametrize("bias", [True, False])
def test_empty_takes_no_memory_and_no_random_numbers(bias: bool) -> None:
    state = torch.get_rng_state()
    spec = {"in_features": 10**6, "out_features": 10**6, "rank": 10**5, "bias": bias}
    module = LowRankLinear.empty(**spec)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.spec() == spec
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_by_design_is_initialised_where_asked() -> None:
    module = LowRankLinear(6, 4, 2, bias=False, dtype=torch.float64)
    assert module.bias is None
    assert module(torch.ones(6, dtype=torch.float64)).shape == (4,)
    assert LowRankLinear(6, 4, 2, device="meta").up.bias.is_meta


def test_it_is_copied_pickled_and_printed() -> None:
    module, *_ = layer(5, 8, 3)
    x = torch.randn(2, 8, dtype=torch.float64)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x), module(x))
    assert "in_features=8, out_features=5, rank=3" in repr(module)
