"""What a layer of two factors and its pivoted storage share: the product, tensors of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.nn import LowRankLinear, PivotedLinear
from lowrank.types import Factored

from .forms import factors

Sizes = tuple[int, int, int]  # out, in, rank
FORMS: dict[str, tuple[Callable[..., Any], list[Sizes]]] = {
    "plain": (LowRankLinear.from_factors, [(3, 7, 2), (7, 3, 2), (4, 4, 4), (5, 5, 1)]),
    **{
        side: (
            partial(PivotedLinear.from_factors, side=side),
            [(3, 7, 2), (7, 3, 2), (6, 6, 5), (5, 4, 1)],
        )
        for side in ("out", "in")
    },
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("form", "sizes"), [(form, sizes) for form, (_, rows) in FORMS.items() for sizes in rows]
)
def test_forward_and_dense_weight_are_the_product(form: str, sizes: Sizes, bias: bool) -> None:
    down, up, shift = factors(*sizes, bias=bias)
    module, weight = FORMS[form][0](down, up, shift), up.numpy() @ down.numpy()
    assert isinstance(module, Factored)
    for lead in ((), (4,), (2, 3), (2, 1, 5)):
        x = torch.randn(*lead, sizes[1], dtype=torch.float64)
        want = x.numpy() @ weight.T
        want = want if shift is None else want + shift.numpy()
        got = module(x).detach().numpy()
        assert got.shape == (*lead, sizes[0])
        np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(module.dense_weight().detach(), weight, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_it_owns_contiguous_tensors(form: str) -> None:
    base = torch.randn(9, 9)
    module = FORMS[form][0](base[:2], base.T[:, 3:5], base[0])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    base.zero_()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in module.parameters())
