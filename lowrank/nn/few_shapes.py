"""Factored layers that multiply with few different ranks, for passes over many of them.

On the CPU oneDNN compiles a product in half precision for every new shape, and keeps many of them
(benchmarks/few_shapes.py). With a rank of its own in every layer, memory would grow with the depth
of the model. With ranks padded by zeros to few, the layers compute the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .children import is_plain
from .cur_linear import CURLinear
from .lowrank_linear import LowRankLinear
from .pivoted_linear import PivotedLinear
from .shared_linear import SharedLowRankLinear
from .usv_linear import USVLinear

PARTS = 4  # sizes between two powers of two: at most a quarter is computed in vain
LEAST = 16
# Others multiply otherwise than by calling their children.
FORMS = (LowRankLinear, SharedLowRankLinear, PivotedLinear, USVLinear, CURLinear)


@contextmanager
def even_ranks(model: nn.Module) -> Iterator[None]:
    """A context in which low-rank layers in half precision on the CPU multiply with padded ranks.

    Their tensors, gradients and outputs keep their shapes. Children that are hooked, patched or
    adapted compute as ever.
    """
    patched: list[nn.Module] = []
    for form in model.modules():
        if isinstance(form, FORMS):
            full = form.in_features, form.out_features
            for child in form.children():
                if isinstance(child, nn.Linear) and is_plain(child) and _compiles(child.weight):
                    outputs, inputs = (0 if n in full else even(n) - n for n in child.weight.shape)
                    vars(child)["forward"] = partial(_padded, child, outputs, inputs)
                    patched.append(child)
    try:
        yield
    finally:
        for child in patched:
            del vars(child)["forward"]


def even(size: int) -> int:
    """The next of few sizes: the multiples of a quarter of the power of two below."""
    step = max((1 << size.bit_length()) // (2 * PARTS), LEAST)
    return -(-size // step) * step


def _compiles(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)


def _padded(child: nn.Linear, outputs: int, inputs: int, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out), computed with so many more outputs and inputs."""
    weight, bias = F.pad(child.weight, (0, inputs, 0, outputs)), child.bias
    x = F.pad(x, (0, inputs)) if inputs else x  # else it would be copied
    y = F.linear(x, weight, bias if bias is None else F.pad(bias, (0, outputs)))
    return y[..., : child.out_features]
