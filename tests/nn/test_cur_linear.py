"""y = C U R x + b: the arithmetic, the children, the cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lowrank.nn import CURLinear, build, describe, form_of

from ..draws import normal


def made(bias: bool = True) -> tuple[CURLinear, np.ndarray]:
    parts = normal(5, 3, seed=1), normal(3, 3, seed=2), normal(3, 7, seed=3)
    dense = np.linalg.multi_dot([part.numpy() for part in parts])
    return CURLinear.from_parts(*parts, normal(5, seed=4) if bias else None), dense


def test_the_product_of_three_children() -> None:
    layer, dense = made()
    x = normal(2, 4, 7, seed=5)
    want = x.numpy() @ dense.T + layer.up.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach(), want, atol=1e-12)
    np.testing.assert_allclose(layer.dense_weight().detach(), dense, atol=1e-12)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "down.weight": (3, 7), "core.weight": (3, 3), "up.weight": (5, 3), "up.bias": (5,),
    }  # fmt: skip
    assert {type(child) for child in layer.children()} == {nn.Linear}
    assert made(bias=False)[0].bias is None


def test_it_costs_what_it_stores_and_is_built_from_what_it_says() -> None:
    layer, _ = made()
    held = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
    cost = layer.cost()
    assert (cost.params, cost.bytes, cost.macs) == (held, 8 * held, held) == (45, 360, 45)
    form = form_of("cur")
    assert form is CURLinear
    assert form.size_cost((5, 7), (3,), itemsize=8) == cost
    again = build(describe(layer), "fc")
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again(normal(4, 7, seed=6)), layer(normal(4, 7, seed=6)))


def test_recovery_leaves_it() -> None:
    assert not CURLinear.REFITTED
