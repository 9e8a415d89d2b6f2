"""Steps of recovery's optimizer: their length and directions, and what is no matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Recovery
from lowrank.recover.optimizer import RecoveryOptimizer


def stepped(start: Tensor, gradient: Tensor, kind: str = "muon", share: float = 1.0) -> Tensor:
    """The change by one step at a rate of 0.1."""
    parameter = nn.Parameter(start.clone())
    optimizer = RecoveryOptimizer([parameter], 0.1, kind)
    parameter.grad = gradient.clone()
    optimizer.step(share)
    return (parameter.detach() - start).float()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def steep() -> Tensor:
    """A gradient (12, 5) with singular values from 1 to 1/256."""
    u, _ = torch.linalg.qr(random(12, 5))
    v, _ = torch.linalg.qr(random(5, 5))
    return u @ torch.diag(4.0 ** -torch.arange(5.0)) @ v.T


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_all_directions_of_a_step_are_about_equally_long(share: float) -> None:
    start = 3 * random(12, 5)
    change = stepped(start, steep(), share=share)
    values = torch.linalg.svdvals(change)
    assert values.max() < 2 * values.min()
    relative = change.square().mean().sqrt() / start.square().mean().sqrt()
    assert 0.07 * share < relative < 0.13 * share
    assert (change * steep()).sum() < 0


def test_adamw_alone_takes_the_same_step_for_every_number() -> None:
    start = random(12, 5)
    change = stepped(start, steep(), kind="adamw").abs()
    expected = 0.1 * float(start.square().mean().sqrt())
    assert torch.allclose(change, torch.full_like(change, expected), rtol=0.05)  # with its decay


def test_a_kernel_is_a_matrix_and_a_batch_of_matrices_is_none() -> None:
    start, gradient = random(6, 2, 3, 1), random(6, 2, 3, 1).flip(0)
    assert torch.equal(
        stepped(start, gradient).flatten(1), stepped(start.flatten(1), gradient.flatten(1))
    )
    batch = random(2, 6, 4)
    assert torch.equal(stepped(batch, batch), stepped(batch, batch, kind="adamw"))
    vector = random(9)
    assert torch.equal(stepped(vector, vector), stepped(vector, vector, kind="adamw"))


def test_small_steps_add_up_in_16_bits() -> None:
    parameter = nn.Parameter(random(8, 8).bfloat16())
    start, gradient = parameter.detach().clone(), random(8, 8).flip(0)
    optimizer = RecoveryOptimizer([parameter], 2e-4)
    for _ in range(40):
        parameter.grad = gradient.bfloat16()
        optimizer.step(1.0)
    moved = (parameter.detach().float() - start.float()).square().mean().sqrt()
    assert moved > 4e-3 * float(start.float().square().mean().sqrt())


def test_what_had_no_part_in_the_loss_stays() -> None:
    used, unused = nn.Parameter(random(4, 3)), nn.Parameter(random(5, 5))
    before = unused.detach().clone()
    optimizer = RecoveryOptimizer([used, unused], 0.1)
    used.grad = random(4, 3)
    optimizer.step(1.0)
    assert torch.equal(unused.detach(), before)


def test_unknown_optimizer() -> None:
    with pytest.raises(lowrank.LowrankError, match=r"unknown optimizer 'adam'.*adamw"):
        Recovery(optimizer="adam")
