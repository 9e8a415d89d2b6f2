"""A weight of one byte per number with a trained factor: rounding, the fit, both passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.train.parts.quantised_weight import QuantisedLowRank, fit_in_turns, from_int8, to_int8


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def test_quantisation() -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[2] = 0
    weight[3] *= 1000
    numbers, scale = to_int8(weight)
    assert numbers.dtype == torch.int8
    assert scale.shape == (6, 1)
    error = (from_int8(numbers, scale) - weight).abs()
    assert bool((error <= scale / 2 * (1 + 1e-12)).all())  # half a step of the row's own grid
    assert float(numbers.abs().amax(1)[[0, 1, 3, 4, 5]].min()) == 127
    assert not numbers[2].any()


@pytest.mark.parametrize("left", [True, False])
def test_the_factor_makes_up_for_what_quantisation_loses(left: bool) -> None:
    """Against numpy, and never worse with more rounds; exact where the basis is complete."""
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    side = 8 if left else 12
    basis = orthonormal(side, 3)
    (numbers, scale, _), error = fit_in_turns(weight, basis, left, 0.5, 1)
    q = (numbers.double() * scale).numpy()
    p = basis.numpy() @ basis.numpy().T
    rest = weight.numpy() - q
    rest -= p @ rest if left else rest @ p
    assert error == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(weight))
    assert error < np.linalg.norm(weight.numpy() - q) / np.linalg.norm(weight)
    more = [fit_in_turns(weight, basis, left, 0.5, rounds)[1] for rounds in (1, 2, 5, 20)]
    assert more == sorted(more, reverse=True)
    assert fit_in_turns(weight, orthonormal(side, side), left, 0.5, 1)[1] < 1e-15


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_layer_is_its_dense_weight(shape: tuple[int, int]) -> None:
    """Outputs, gradients of the input, the factor and the bias, and the gradient it collects."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = nn.Parameter(torch.randn(shape[0], dtype=torch.float64))
    layer = QuantisedLowRank(weight, 3, 0.5, bias)
    layer.put(weight, orthonormal(8, 3), 3)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    layer.collect(True)
    y = layer(x)
    y.square().sum().backward()
    got = [x.grad, layer.factor.grad, layer.bias.grad]
    dense = layer.dense_weight().detach().requires_grad_()
    seen = x.detach().requires_grad_()
    expected = seen @ dense.T + bias.detach()
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward()
    torch.testing.assert_close(got[0], seen.grad)
    torch.testing.assert_close(layer.gathered, dense.grad)
    turned = dense.grad if layer.left else dense.grad.T
    torch.testing.assert_close(got[1], 0.5 * layer.basis.T @ turned)
    torch.testing.assert_close(got[2], expected.detach().mul(2).sum((0, 1)))
    layer(x).square().sum().backward()  # accumulated batches add up
    torch.testing.assert_close(layer.gathered, 2 * dense.grad)
    layer.collect(False)
    layer(x).sum().backward()
    assert layer.gathered is None


def test_neither_pass_keeps_a_dense_weight() -> None:
    """What autograd saves for the backward pass: one byte a number, and small tensors."""
    weight = torch.randn(64, 96)
    layer = QuantisedLowRank(weight, 2, 0.5, None)
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(1, 96, requires_grad=True)).sum()
    assert max(sizes) == weight.numel()
