"""What is completed after an older transformers loaded a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.io.older_transformers import cast_to, check_shapes, wanted_of
from tests.zoo import mlp


def empty(dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return mlp(4, 6, 2).to(dtype)


def test_tensors_get_the_dtype_that_was_asked_for() -> None:
    model, wanted = mlp(4, 6, 2), wanted_of(empty(torch.bfloat16))
    before = model[0].weight.detach().clone()
    held = model[0].weight
    cast_to(model, wanted, {"2.bias": torch.float32})
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("2.bias") == torch.float32  # transformers keeps some as they are
    assert set(dtypes.values()) == {torch.bfloat16}
    assert model[0].weight is held
    assert torch.equal(held, before.bfloat16())


def test_another_shape_is_an_error() -> None:
    wanted = wanted_of(empty(torch.float32))
    with pytest.raises(LowrankError, match=r"of another shape: 0\.weight, 0\.bias, 2\.weight$"):
        check_shapes(mlp(4, 5, 2), wanted, "the weights")


def test_what_is_not_loaded_is_left() -> None:
    model, wanted = mlp(4, 6, 2).double(), wanted_of(empty(torch.float32))
    model[2] = empty(torch.float64)[2]
    check_shapes(model, wanted, "the weights")
    cast_to(model, wanted, {})
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert model[2].weight.is_meta
