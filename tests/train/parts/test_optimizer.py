"""State that follows its parameter through a change of basis, in every optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.train.parts import optimizer as live
from tests.draws import orthonormal

FIRST = [
    ("SGD", {"momentum": 0.9}, "momentum_buffer"),
    ("Adam", {"amsgrad": True}, "exp_avg"),
    ("AdamW", {}, "exp_avg"),
    ("NAdam", {}, "exp_avg"),
    ("RMSprop", {"momentum": 0.9, "centered": True}, "grad_avg"),
]
SECOND = [
    ("Adam", {}, "exp_avg_sq"),
    ("RMSprop", {}, "square_avg"),
    ("Adagrad", {}, "sum"),
]
MOMENTS = [(*row, 1) for row in FIRST] + [(*row, 2) for row in SECOND]
ALL = ["SGD", "Adam", "AdamW", "Adafactor", "RMSprop", "Adagrad", "Adamax", "RAdam", "Adadelta"]


def stepped(name: str, **options: Any) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer after three steps on a matrix (5, 4) and two vectors around it."""
    torch.manual_seed(0)
    shapes = [(3,), (5, 4), (2,)]
    parameters = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in shapes]
    made = getattr(torch.optim, name)(parameters, **{"lr": 0.1, **options})
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        made.step()
    return made, parameters


@pytest.mark.parametrize(("name", "options", "key", "order"), MOMENTS)
def test_first_moments_follow_linearly_and_second_ones_by_their_roots(
    name: str, options: dict[str, Any], key: str, order: int
) -> None:
    made, (_, old, _) = stepped(name, **options)
    before = made.state[old][key].numpy().copy()
    left, right = torch.randn(3, 5).double(), torch.randn(4, 2).double()
    new = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    live.replace_parameter(made, old, new, live.both_sides(left, right))
    roots = before if order == 1 else np.sqrt(before)
    want = (left.numpy() @ roots @ right.numpy()) ** order
    np.testing.assert_allclose(made.state[new][key].numpy(), want, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_permutation_permutes_the_whole_state(name: str) -> None:
    """Then the next step is the permuted step: nothing of the state is lost or confused."""
    plain, (_, stays, _) = stepped(name)
    moved, (_, old, _) = stepped(name)
    rows, columns = torch.randperm(5), torch.randperm(4)
    left = torch.eye(5, dtype=torch.float64)[rows]
    right = torch.eye(4, dtype=torch.float64)[:, columns]
    new = nn.Parameter(old.detach()[rows][:, columns].clone())
    live.replace_parameter(moved, old, new, live.both_sides(left, right))
    stays.grad = torch.randn_like(stays)
    new.grad = stays.grad[rows][:, columns].clone()
    plain.step()
    moved.step()
    torch.testing.assert_close(new, stays.detach()[rows][:, columns], rtol=1e-9, atol=1e-11)


def test_augment_then_truncate_gives_the_same_moments() -> None:
    """T9: with no step between them, m comes back; v does where nothing is mixed."""
    made, (_, old, _) = stepped("Adam")
    m, v = (made.state[old][key].clone() for key in ("exp_avg", "exp_avg_sq"))
    grown = nn.Parameter(torch.zeros(8, 7, dtype=torch.float64))
    left, right = orthonormal(8, 8, 1)[:, :5], orthonormal(7, 7, 2)[:, :4].T
    live.replace_parameter(made, old, grown, live.both_sides(left, right))
    back = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    live.replace_parameter(made, grown, back, live.both_sides(left.T, right.T))
    torch.testing.assert_close(made.state[back]["exp_avg"], m)
    assert not torch.allclose(made.state[back]["exp_avg_sq"], v)  # a heuristic, and known to be
    made, (_, old, _) = stepped("Adam")
    grown = nn.Parameter(torch.zeros(8, 7, dtype=torch.float64))
    live.replace_parameter(made, old, grown, live.corner((8, 7)))
    live.replace_parameter(made, grown, back, live.corner((5, 4)))
    assert torch.equal(made.state[back]["exp_avg"], m)
    torch.testing.assert_close(made.state[back]["exp_avg_sq"], v)


def test_growing_pads_by_zeros_and_shrinking_cuts() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    grown = live.corner((3, 2))(x)
    assert torch.equal(grown, torch.tensor([[0.0, 1.0], [3.0, 4.0], [0.0, 0.0]]))


def test_modes_of_a_tensor_are_turned_one_by_one() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    a, b = torch.randn(5, 2, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    want = np.einsum("ai,bk,ijk->ajb", a.numpy(), b.numpy(), x.numpy())
    np.testing.assert_allclose(live.along_modes({0: a, 2: b})(x).numpy(), want, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_the_place_the_group_and_the_schedule_stay(name: str) -> None:
    """T10: exactly the live parameters, in their order; a scheduler goes on."""
    made, (first, old, last) = stepped(name)
    schedule = torch.optim.lr_scheduler.StepLR(made, step_size=1, gamma=0.5)
    factors = [nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.zeros(2, 4))]
    live.replace_parameter(made, old, factors)
    assert [id(p) for p in made.param_groups[0]["params"]] == [
        id(p) for p in (first, *factors, last)
    ]
    assert old not in made.state
    for parameter in (first, *factors, last):
        parameter.grad = torch.ones_like(parameter)
    made.step()
    schedule.step()
    assert all(bool(factor.detach().any()) for factor in factors)
    assert made.param_groups[0]["lr"] == pytest.approx(0.05)
    assert set(made.state) <= {first, *factors, last}
    live.insert_parameters(made, factors[0], [nn.Parameter(torch.zeros(1))])
    assert [p.numel() for p in made.param_groups[0]["params"]] == [3, 10, 1, 8, 2]
    live.replace_parameter(made, factors[1], [])
    assert [p.numel() for p in made.param_groups[0]["params"]] == [3, 10, 1, 2]


def test_a_state_dict_with_new_shapes_comes_back() -> None:
    made, (_, old, _) = stepped("Adam")
    new = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    live.replace_parameter(made, old, new, live.corner((2, 2)))
    again = torch.optim.Adam(
        [nn.Parameter(p.detach().clone()) for p in made.param_groups[0]["params"]]
    )
    again.load_state_dict(made.state_dict())
    assert again.param_groups[0]["lr"] == 0.1
    copied = again.state[again.param_groups[0]["params"][1]]
    assert torch.equal(copied["exp_avg"], made.state[new]["exp_avg"])


def test_it_works_through_accelerates_wrapper() -> None:
    from accelerate import Accelerator

    made, (_, old, _) = stepped("Adam")
    wrapped = Accelerator(cpu=True).prepare_optimizer(made)
    assert live.inner_optimizer(wrapped) is made
    assert live.holds(wrapped, old)
    new = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    live.replace_parameter(wrapped, old, new, live.corner((2, 2)))
    assert wrapped.state[new]["exp_avg"].shape == (2, 2)
    assert not live.holds(wrapped, old)


def test_what_cannot_be_carried_is_said_before_anything_changes() -> None:
    made, (_, old, _) = stepped("Adam")
    new = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    made.state[old]["blocks"] = torch.zeros(7)
    with pytest.raises(LowrankError, match=r"state 'blocks' is torch.float32 of shape \(7,\)"):
        live.replace_parameter(made, old, new, live.corner((2, 2)))
    del made.state[old]["blocks"]
    with pytest.raises(LowrankError, match="the change of basis does not fit"):
        live.replace_parameter(made, old, new, live.corner((3, 2)))
    assert live.holds(made, old)
    assert "exp_avg" in made.state[old]
    with pytest.raises(LowrankError, match=r"shape \(2, 2\) is not in the optimizer"):
        live.replace_parameter(made, new, old)
    with pytest.raises(LowrankError, match="carried to one parameter, got 2"):
        live.replace_parameter(made, old, [new, new], live.corner((2, 2)))


def test_dead_and_missing_parameters_are_found() -> None:
    model = nn.Linear(2, 2)
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    live.check_same_parameters(made, model)
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(LowrankError, match=r"holds 1 .*misses 1: weight"):
        live.check_same_parameters(made, model)
