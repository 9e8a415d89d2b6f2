"""A network trained in a subspace stays in it, and is its seed and vector."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.linalg.projections import PROJECTIONS
from lowrank.train import Subspace
from lowrank.types import Controller
from tests.train.loops import Net, batches, run

EVERY = pytest.mark.parametrize("kind", PROJECTIONS)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(steps: int = 32, **options: Any) -> tuple[Any, Any, Any, list[float]]:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    controller = Subspace(model, optimizer, **{"dimension": 24, **options})
    return model, optimizer, controller, run(model, optimizer, controller, steps)


@EVERY
def test_only_the_subspace_is_moved_in(kind: str) -> None:
    begun = flat(Net())
    model, optimizer, controller, losses = trained(projection=kind)
    assert isinstance(controller, Controller)
    assert sum(losses[-8:]) < sum(losses[:8])  # of the same eight batches
    moved = (flat(model) - begun).double()
    assert float(moved.norm()) > 0.1
    columns = torch.stack([controller._random.exact(row) for row in torch.eye(24)])
    inside = columns.T @ torch.linalg.lstsq(columns.T, moved[:, None]).solution
    assert torch.allclose(inside[:, 0], moved, atol=1e-6)
    # The optimizer had nothing to do with the parameters themselves.
    assert set(optimizer.state) == {controller.coordinates}


@EVERY
def test_the_gradient_is_that_of_the_coordinates(kind: str) -> None:
    """Beside autograd through θ₀ + λ P z."""
    x, y = next(iter(batches(1)))
    model, _, controller, _ = trained(3, projection=kind, said=True)
    p, z, scales = controller._random, controller.coordinates, controller.scales
    matrix = torch.stack([p.times(row) for row in torch.eye(len(z))]).T
    z2, scales2 = (t.detach().clone().requires_grad_() for t in (z, scales))
    theta = controller._start + scales2.repeat_interleave(controller._counts) * (matrix @ z2)
    parts = theta.split(controller._counts.tolist())
    named = {
        name: part.view(q.shape)
        for (name, q), part in zip(model.named_parameters(), parts, strict=True)
    }
    torch.func.functional_call(model, named, (x, y))["loss"].backward()
    model(x, y)["loss"].backward()
    controller.before_step()
    assert torch.allclose(z.grad, z2.grad, atol=1e-6)
    assert torch.allclose(scales.grad, scales2.grad, atol=1e-6)
    assert all(q.grad is None for q in model.parameters())


@pytest.mark.parametrize("said", [False, True])
def test_finish_leaves_what_a_file_stands_for(said: bool, tmp_path: Any) -> None:
    model, optimizer, controller, _ = trained(said=said, precision="float16")
    assert len(controller.coordinates) == 24 - 4 * said
    trained_numbers, groups = flat(model), len(optimizer.param_groups)
    controller.seeded().save(tmp_path / "net.safetensors")
    assert controller.finish() is model
    assert torch.allclose(flat(model), trained_numbers, atol=2e-3)
    assert len(optimizer.param_groups) == groups - 1
    assert controller.coordinates not in optimizer.state
    again = lowrank.load_seeded(tmp_path / "net.safetensors", Net())
    assert torch.equal(flat(again), flat(model))


def test_norms_are_trained_beside_it_or_projected() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 10))

    for norms, size in (("kept", 104 + 90), ("projected", 104 + 16 + 90)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = Subspace(model, optimizer, dimension=9, norms=norms)  # type: ignore[arg-type]
        model(torch.randn(4, 12)).square().mean().backward()
        assert controller.size == size
        controller.before_step()
        assert (model[1].weight.grad is None) == (norms == "projected")
        optimizer.step()
        controller.after_step()
        assert not torch.equal(model[1].weight, torch.ones(8))


def test_resumed_it_is_the_unbroken_run() -> None:
    *_, unbroken = trained(20, said=True)
    model, optimizer, controller, first = trained(8, said=True)
    state, moments = json.loads(json.dumps(controller.state_dict())), optimizer.state_dict()
    model, optimizer, controller, _ = trained(0, said=True)
    controller.load_state_dict(state)
    optimizer.load_state_dict(moments)
    assert [*first, *run(model, optimizer, controller, 20, start=8)] == unbroken
    controller.finish()
    assert len(optimizer.param_groups) == 1
    other = trained(0, seed=1)[2]
    with pytest.raises(LowrankError, match="another subspace: seed is 0, expected 1"):
        other.load_state_dict(state)


def test_detached_it_leaves_the_model_to_its_optimizer() -> None:
    model, optimizer, controller, _ = trained(5)
    before = flat(model)
    controller.detach()
    assert torch.equal(flat(model), before)
    run(model, optimizer, _Idle(), 2)
    assert set(optimizer.state) == set(model.parameters())


class _Idle:
    def before_step(self) -> None: ...

    def after_step(self) -> None: ...


def test_what_cannot_be_trained_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, words in (
        ({"dimension": 0}, r"dimension must be in \[1, 378\]"),
        ({"dimension": 4, "said": True}, "above 4, the number of scales, got 4"),
        ({"dimension": 5, "projection": "dence"}, "did you mean 'dense'"),
        ({"dimension": 5, "start": "zero"}, "unknown start 'zero'"),
        ({"dimension": 5, "start": "seed", "norms": "projected"}, "a norm cannot be drawn"),
        ({"dimension": 5, "precision": "int8"}, "precision must be one of"),
    ):
        with pytest.raises(LowrankError, match=words):
            Subspace(model, optimizer, **options)
    assert len(optimizer.param_groups) == 1
    assert torch.equal(flat(model), flat(Net()))
    controller = Subspace(model, optimizer, dimension=5)
    with pytest.raises(LowrankError, match="found no gradient: call it after backward"):
        controller.before_step()
    x, y = next(iter(batches(1)))
    (model(x, y)["loss"] * float("nan")).backward()
    with pytest.raises(LowrankError, match="not finite"):
        controller.before_step()
    frozen = Net()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(LowrankError, match="no parameters for a subspace"):
        Subspace(frozen, torch.optim.SGD([torch.ones(1)], lr=1), dimension=1)
