"""Routers: the subset that comes nearest, and a linear guess of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.linalg.routers import fitted_router, missed, nearest_experts


def outputs(inputs: int = 40, experts: int = 5, width: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(inputs, experts, width, generator=draw, dtype=torch.float64)


def grams_of(parts: Tensor) -> Tensor:
    return parts @ parts.mT


def test_what_is_missed_is_the_sum_of_what_is_off() -> None:
    parts = outputs()
    on = torch.rand(40, 5) < 0.5
    want = (parts.sum(1) - (parts * on[..., None]).sum(1)).square().sum(1)
    torch.testing.assert_close(missed(grams_of(parts), on), want)


def test_one_expert_less_is_the_best_choice_and_more_beat_the_largest_ones() -> None:
    parts = outputs()
    grams = grams_of(parts)
    least = torch.stack([parts[:, e].square().sum(1) for e in range(5)]).min(0).values
    torch.testing.assert_close(missed(grams, nearest_experts(grams, 4)), least)
    for active in (3, 2):
        on = nearest_experts(grams, active)
        assert on.sum(1).tolist() == [active] * 40
        size = grams.diagonal(dim1=1, dim2=2)
        large = torch.zeros_like(on).scatter(1, size.topk(active, 1).indices, True)
        assert float(missed(grams, on).sum()) < 0.9 * float(missed(grams, large).sum())


def test_experts_that_cancel_are_left_out_together() -> None:
    """By their sizes alone the first and the third would go."""
    parts = torch.tensor([[[1.0, 0.0], [-1.2, 0.0], [0.0, 1.1], [9.0, 9.0]]])
    assert nearest_experts(grams_of(parts), 2).tolist() == [[False, False, True, True]]


def test_a_linear_rule_is_learnt() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=draw)
    rule = torch.randn(4, 8, generator=draw)
    loud = (x @ rule.T).softmax(1)  # of each expert, in a direction of its own
    grams = torch.diag_embed(loud.square())
    weight, bias = fitted_router(x, grams, 2)
    assert (weight.shape, bias.shape) == ((4, 8), (4,))
    chosen = (x @ weight.T + bias).topk(2, 1).indices
    right = nearest_experts(grams, 2).gather(1, chosen).float().mean()
    assert float(right) > 0.9
    assert not weight.requires_grad


def test_inputs_without_any_number_give_a_router_all_the_same() -> None:
    weight, bias = fitted_router(torch.zeros(6, 3), torch.zeros(6, 4, 4), 2)
    assert bool(weight.isfinite().all() & bias.isfinite().all())


def test_an_expert_that_is_always_on_has_a_finite_bias() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    grams = torch.diag_embed(torch.tensor([9.0, 1.0, 0.1]).expand(50, 3))
    _, bias = fitted_router(x, grams, 1)
    assert float(bias.abs().max()) < 20
    assert int(bias.argmax()) == 0
