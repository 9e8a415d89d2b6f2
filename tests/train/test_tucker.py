"""TuckerDLRT: nothing is lost in a change of basis, both ranks are found, the rest stays dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import TuckerConv
from lowrank.train import DLRT, TuckerDLRT
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import fit


def kernel() -> torch.Tensor:
    """(12, 10, 3, 3) of multilinear rank (3, 4)."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, v = torch.linalg.qr(gaussian(12, 3)).Q, torch.linalg.qr(gaussian(10, 4)).Q
    return torch.einsum("oa,abhw,ib->oihw", u, gaussian(3, 4, 3, 3), v)


def of_kernel(model: Any, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (model[0].dense_weight() - target).square().sum()


def attached(**options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(10, 12, 3, padding=1, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return model, optimizer, TuckerDLRT(model, optimizer, **options)


def test_planted_ranks_are_found() -> None:
    """T3: both of them, and the kernel itself."""
    model, optimizer, controller = attached(tolerance=0.05, every=2, rank=8, min_rank=1)
    assert controller.ranks == {"0": (8, 8)}
    assert fit(model, optimizer, controller, kernel(), 150, of_kernel)[-1] < 1e-12
    assert controller.ranks == {"0": (3, 4)}
    x = torch.randn(1, 10, 6, 6, dtype=torch.float64)
    want = nn.functional.conv2d(x, kernel(), model[0].bias, padding=1)
    model = controller.finish()
    torch.testing.assert_close(model(x), want, atol=1e-6, rtol=1e-6)
    assert type(model[0]) is TuckerConv
    check_same_parameters(optimizer, model)
    assert all(p.requires_grad for p in model.parameters())


def test_growing_the_bases_changes_nothing() -> None:
    """T1."""
    model, _, controller = attached(rank=4)
    before = model[0].dense_weight().detach()
    (0.5 * (model[0].dense_weight() - kernel()).square().sum()).backward()
    controller.before_step()
    assert model[0].rank == (7, 8)  # what the target adds: 3 outputs, 4 inputs
    torch.testing.assert_close(model[0].dense_weight().detach(), before, rtol=0, atol=1e-13)
    for basis in (model[0].u0, model[0].u1):
        gram = (basis.T @ basis).detach().numpy()
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


@pytest.mark.parametrize("tolerance", [0.1, 0.4])
def test_a_truncation_stays_within_the_tolerance_of_the_whole(tolerance: float) -> None:
    """T2: θ for both modes together."""
    model, _, controller = attached(rank=1.0, tolerance=tolerance, every=2, min_rank=1)
    before = model[0].dense_weight().detach()
    with torch.no_grad():
        controller.truncate()
    lost = float((model[0].dense_weight().detach() - before).norm() / before.norm())
    assert 0 < lost <= tolerance
    assert controller.history[-1]["energy_lost"] == pytest.approx(lost**2)


def kept(model: Any, controller: Any) -> int:
    """Numbers that the chosen kernels take when training ends now."""
    return sum(min(m.cost().params, m.dense_weight().numel()) for m in controller.layers.values())


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.25])
def test_a_budget_is_kept_and_used(ratio: float) -> None:
    """One tolerance for all kernels, the smallest that meets the budget."""
    model = net()
    whole = 8 * 3 * 9 + 8 * 8 * 9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    controller = TuckerDLRT(model, optimizer, ratio=ratio, min_rank=1, every=3, rank=1.0)
    steps(model, optimizer, [controller], 0, 2)
    spectra = {}
    for name in controller.ranks:
        core = model.get_submodule(name).core.weight.detach().double()
        spectra[name] = [
            np.linalg.svd(np.moveaxis(core.numpy(), i, 0).reshape(core.shape[i], -1))[1]
            for i in (0, 1)
        ]
    controller.end_epoch()
    assert kept(model, controller) <= ratio * whole
    # Tails are cut in the order of their share: the next one to come back would be too much.
    cut = {
        (name, mode): np.linalg.norm(values[rank:]) / np.linalg.norm(values)
        for name, ranks in controller.ranks.items()
        for mode, (values, rank) in enumerate(zip(spectra[name], ranks, strict=True))
    }
    more = {key: list(controller.ranks[key[0]]) for key in cut}
    largest = max(cut, key=lambda key: cut[key])
    more[largest][largest[1]] += 1
    size = 0
    for name, module in controller.layers.items():
        out, into = module.dense_weight().shape[:2]
        a, b = more[largest] if name == largest[0] else controller.ranks[name]
        size += min(a * out + b * into + a * b * 9, out * into * 9)
    assert size > ratio * whole
    model = controller.finish()
    assert sum(p.numel() for p in model.parameters() if p.ndim == 4) <= ratio * whole
    steps(model, optimizer, [], 2, 4)


def test_a_budget_that_no_rank_can_meet_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    least = (8 * 3 + 3 * 3 + 3 * 3 * 9 + 8 * 3 + 8 * 3 + 3 * 3 * 9) / (8 * 3 * 9 + 8 * 8 * 9)
    with pytest.raises(LowrankError, match=f"at min_rank 3 .* keep {least:.4f}"):
        TuckerDLRT(model, optimizer, ratio=0.2)
    with pytest.raises(LowrankError, match="ratio is the share kept"):
        TuckerDLRT(model, optimizer, ratio=1.0)
    assert type(model[0]) is nn.Conv2d
    TuckerDLRT(model, optimizer, ratio=least + 1e-6)


def test_the_momentum_follows_along_both_modes() -> None:
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Conv2d(5, 6, 3, dtype=torch.float64))
    target = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    (0.5 * (dense[0].weight - target).square().sum()).backward()
    optimizer.step()
    buffer = optimizer.state[dense[0].weight]["momentum_buffer"].clone()
    plain = dense[0].weight.detach().clone()
    controller = TuckerDLRT(dense, optimizer, tolerance=0.0, rank=1.0, every=2)
    for _ in range(6):
        fit(dense, optimizer, controller, target, 1, of_kernel)
        buffer = 0.9 * buffer + (plain - target)
        plain = plain - 0.05 * buffer
    torch.testing.assert_close(dense[0].dense_weight().detach(), plain)


def test_what_has_no_such_form_stays_dense_with_the_reason() -> None:
    model = nn.ModuleList([
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 4),
    ])  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TuckerDLRT(model, optimizer, rank=2)
    assert list(controller.ranks) == ["0"]
    left = {line["site"]: line["reason"] for line in controller.history if line["event"] == "left"}
    assert left["1"] == "it has 2 groups"
    assert left["2"].startswith("its kernel is one pixel")
    assert left["3"].startswith("it pads by 'reflect'")
    DLRT(model, optimizer)  # the linear layer is free
    with pytest.raises(LowrankError, match=r"0 already has a controller \(TuckerDLRT\)"):
        TuckerDLRT(model, optimizer)


def test_what_is_factored_already_stays_as_it_is(tmp_path: Path) -> None:
    """Factors of factors would be saved and never loaded."""

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(6, 16, 3), nn.Conv2d(16, 24, 3, padding=1))

    rest = ["1"]
    model, _ = lowrank.compress(net(), 0.6, target_modules=rest, data=None, progress=False)
    first = model[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TuckerDLRT(model, optimizer, rank=2)
    assert list(controller.ranks) == ["0"]
    model = controller.finish()
    assert model[1] is first
    lowrank.save(model, tmp_path)
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(lowrank.load(tmp_path, net())(x), model(x))


def test_what_is_not_smaller_becomes_the_convolution_again() -> None:
    model, optimizer, controller = attached(tolerance=0.0, rank=1.0, every=2)
    fit(model, optimizer, controller, kernel(), 4, of_kernel)
    x = torch.randn(1, 10, 6, 6, dtype=torch.float64)
    output, bias = model(x), model[0].bias
    model = controller.finish()
    assert type(model[0]) is nn.Conv2d
    assert model[0].bias is bias
    torch.testing.assert_close(model(x), output)
    check_same_parameters(optimizer, model)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def steps(model: Any, optimizer: Any, controllers: Any, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 6, 6, generator=generator)
        y = torch.randint(4, (6,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for controller in controllers:
            controller.before_step()
        optimizer.step()
        for controller in controllers:
            controller.after_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_beside_dlrt_and_resumed_in_the_middle(name: str) -> None:
    """T10, T12: two controllers on one optimizer; stopped at 30 of 60, equal bit for bit."""

    def made(seed: int) -> Any:
        model = net(seed)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        both = TuckerDLRT(model, optimizer, tolerance=0.3, every=7), DLRT(model, optimizer, every=4)
        return model, optimizer, both

    model, optimizer, both = made(0)
    unbroken = steps(model, optimizer, both, 0, 60)
    check_same_parameters(optimizer, model)
    model, optimizer, both = made(0)
    steps(model, optimizer, both, 0, 30)
    kept = json.loads(json.dumps([controller.state_dict() for controller in both]))
    numbers, moments = model.state_dict(), optimizer.state_dict()
    again, live, resumed = made(5)
    for controller, state in zip(resumed, kept, strict=True):
        controller.load_state_dict(state)
    again.load_state_dict(numbers)
    live.load_state_dict(moments)
    assert steps(again, live, resumed, 30, 60) == unbroken[30:]
    worst = max(line.get("orthonormality", 0) for line in both[0].history)
    assert 0 < worst < 1e-6
    for controller in resumed:
        controller.finish()
    check_same_parameters(live, again)


def test_a_start_out_of_range_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rank in (0, 1.5, 0.0):
        with pytest.raises(LowrankError, match="rank must be an int >= 1 or a share"):
            TuckerDLRT(model, optimizer, rank=rank)
    with pytest.raises(LowrankError, match="truncates everything"):
        TuckerDLRT(model, optimizer, tolerance=1.0)
    with pytest.raises(LowrankError, match="nothing to adapt: no known layer"):
        TuckerDLRT(nn.Sequential(nn.Linear(2, 2)), optimizer)
    assert type(model[0]) is nn.Conv2d
