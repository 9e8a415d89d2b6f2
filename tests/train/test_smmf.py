"""SMMF: the formula, in numpy; what is exact where moments have rank one; memory; resuming."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.train import DLRT, SMMF
from lowrank.train.parts.optimizer import CarriesState, corner, replace_parameter
from lowrank.train.smmf import packed, squarest, unpacked
from tests.train.loops import Net, run


class Nothing:
    """In the place of a controller."""

    def before_step(self) -> None: ...
    def after_step(self) -> None: ...


def follow(gradients: list[np.ndarray], start: np.ndarray, **options: float) -> np.ndarray:
    """The weights after these gradients, by the formula, in numpy."""
    lr, beta, growth, decay, eps = (
        options.get(k, v)
        for k, v in zip(
            ("lr", "beta", "growth", "decay", "eps"), (1e-3, 0.9, 0.999, -0.5, 1e-8), strict=True
        )
    )
    weight = start.copy()
    a, b = squarest(start.size)
    first = second = np.zeros((a, b))
    for t, gradient in enumerate(gradients, 1):
        g = gradient.reshape(a, b)
        mix = beta * growth ** (t - 1)
        m = mix * first + (1 - mix) * g
        mix = 1 - t**decay
        v = mix * second + (1 - mix) * g**2
        weight = weight * (1 - lr * options.get("weight_decay", 0.0))
        weight -= lr * (m / (np.sqrt(v) + eps)).reshape(weight.shape)
        size = np.abs(m)
        first = np.where(m > 0, 1, -1) * np.outer(size.sum(1), size.sum(0)) / size.sum()
        second = np.outer(v.sum(1), v.sum(0)) / v.sum()
    return weight


def stepped(gradients: list[np.ndarray], start: np.ndarray, **options: Any) -> torch.Tensor:
    weight = nn.Parameter(torch.tensor(start))
    optimizer = SMMF([weight], **options)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(6, 10), (7,), (3, 4, 5, 2), (1,), (13, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "beta": 0.5, "growth": 0.9, "decay": -0.8, "eps": 1e-3},
        {"weight_decay": 0.5, "lr": 0.1},
        {"beta": 0.0},
    ],
)
def test_it_is_the_formula(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    gradients = [random.standard_normal(shape) for _ in range(6)]
    start = random.standard_normal(shape)
    expected = follow(gradients, start, **options)
    np.testing.assert_allclose(stepped(gradients, start, **options), expected, rtol=1e-10)


def test_it_is_adam_where_gradients_have_rank_one() -> None:
    """Nothing is lost in compression then: the recurrences without it, entry by entry."""
    random = np.random.default_rng(1)
    pattern = np.outer(random.uniform(1, 2, 6), random.uniform(1, 2, 6))
    pattern *= np.sign(random.standard_normal((6, 6)))
    sizes = random.uniform(0.5, 2, 8)
    weight, m, v = np.zeros((6, 6)), np.zeros((6, 6)), np.zeros((6, 6))
    for t, size in enumerate(sizes, 1):
        beta, gamma = 0.9 * 0.999 ** (t - 1), 1 - t**-0.5
        m = beta * m + (1 - beta) * size * pattern
        v = gamma * v + (1 - gamma) * (size * pattern) ** 2
        weight -= 0.01 * m / (np.sqrt(v) + 1e-8)
    weights = stepped([size * pattern for size in sizes], np.zeros((6, 6)), lr=0.01)
    np.testing.assert_allclose(weights, weight, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 7, 12, 36, 97, 1000, 4096, 500 * 800])
def test_the_squarest_matrix(count: int) -> None:
    pairs = [(a, count // a) for a in range(1, count + 1) if count % a == 0]
    assert sum(squarest(count)) == min(map(sum, pairs))
    assert int(np.prod(squarest(count))) == count


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_signs_take_one_bit(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.5
    data = packed(bits)
    assert data.dtype == torch.uint8
    assert data.numel() == -(-count // 8)
    assert torch.equal(unpacked(data, count), bits * 2.0 - 1)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    every = (t for state in optimizer.state.values() for t in state.values())
    return sum(t.numel() * t.element_size() for t in every if isinstance(t, torch.Tensor))


def test_memory_is_counted() -> None:
    """Two pairs of vectors in fp32 and a bit a number, as the docstring says; Adam takes 8 bytes
    a number."""
    layer = nn.Linear(256, 1024, bias=False)
    layer.weight.grad = torch.randn(1024, 256)
    ours, adam = SMMF(layer.parameters()), torch.optim.Adam(layer.parameters())
    ours.step()
    adam.step()
    count = 1024 * 256
    assert state_bytes(ours) == 4 * 2 * (512 + 512) + count // 8
    assert state_bytes(ours) < 0.04 * state_bytes(adam) <= 0.04 * (8 * count + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_it_is_the_unbroken_run(dtype: torch.dtype) -> None:
    def made(seed: int) -> tuple[nn.Module, SMMF]:
        torch.manual_seed(seed)
        model = nn.Linear(12, 10, dtype=dtype)
        return model, SMMF(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: SMMF, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    unbroken, optimizer = made(0)
    train(unbroken, optimizer, range(20))
    model, optimizer = made(0)
    train(model, optimizer, range(10))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, second = made(1)
    again.load_state_dict(weights)
    second.load_state_dict(state)
    assert second.state[again.weight]["signs"].dtype == torch.uint8
    assert second.state[again.weight]["rows_v"].dtype == torch.float32
    train(again, second, range(10, 20))
    for a, b in zip(again.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(a, b)
    train(model, optimizer, range(10, 20))  # what was saved is a copy: the first run goes on
    assert torch.equal(model.weight, again.weight)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = SMMF([weight])
    for _ in range(3):
        weight.grad = torch.zeros(4, 4)
        optimizer.step()
    assert torch.equal(weight, torch.ones(4, 4))


def test_it_trains() -> None:
    model = Net()
    optimizer = SMMF(model.parameters(), lr=0.02)
    losses = run(model, optimizer, Nothing(), 150)
    assert sum(losses[-8:]) < 0.2 * sum(losses[:8])


def test_its_state_follows_a_change_of_rank() -> None:
    """To a corner and back nothing of the corner is lost but what a rank-one product loses."""
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = SMMF([weight], lr=0.1)
    pattern = torch.outer(torch.tensor([1.0, 2, -3, 4]), torch.tensor([1.0, -1, 2, 1])).double()
    weight.grad = pattern
    optimizer.step()
    wide = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    replace_parameter(optimizer, weight, wide, corner((4, 5)))
    assert optimizer.state[wide]["step"] == 1
    narrow = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    replace_parameter(optimizer, wide, narrow, corner((4, 4)))
    assert weight not in optimizer.state
    alone = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    other = SMMF([alone], lr=0.1)
    alone.grad = pattern
    other.step()
    half = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    replace_parameter(other, alone, half, corner((2, 2)))
    half.grad = pattern[:2, :2].clone()
    before = copy.deepcopy(other.state[half])
    assert before["rows_m"].sum() == pytest.approx(0.1 * float(pattern[:2, :2].abs().sum()))
    other.step()
    beta, gamma = 0.9 * 0.999, 1 - 2**-0.5
    mean = (beta * 0.1 + 1 - beta) * pattern[:2, :2]
    size = (gamma + 1 - gamma) * pattern[:2, :2].square()
    torch.testing.assert_close(half.detach(), -0.1 * mean / (size.sqrt() + 1e-8))


def test_a_controller_works_with_it() -> None:
    model = Net()
    optimizer = SMMF(model.parameters(), lr=0.02)
    controller = DLRT(model, optimizer, tolerance=0.2, every=5)
    losses = run(model, optimizer, controller, 100)
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
    assert any(event["event"] == "truncate" for event in controller.history)


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"beta": 1.0}, {"growth": 0.0}, {"decay": 0.1}, {"eps": -1.0},
     {"weight_decay": -1.0}, {"lr": float("nan")}],
)  # fmt: skip
def test_an_option_out_of_range(options: dict[str, float]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(LowrankError, match=f"SMMF: {name} is out of range, got {value}"):
        SMMF([nn.Parameter(torch.zeros(2))], **options)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SMMF(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(LowrankError, match="dense gradients"):
        optimizer.step()


def test_it_says_that_it_carries_its_own_state() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    assert isinstance(SMMF(parameters), CarriesState)
    assert not isinstance(torch.optim.SGD(parameters, lr=0.1), CarriesState)
