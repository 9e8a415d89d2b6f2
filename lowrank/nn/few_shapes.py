"""Low-rank layers that compute with few different ranks, for passes over many of them.

On the CPU oneDNN compiles a product in half precision for every new shape, and keeps up to 1,024 of
them, half a megabyte each. With a rank of its own in every layer, memory would grow with the depth
of the model. Padded by zeros to few ranks, the layers compute the same but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .children import is_plain
from .lowrank_linear import LowRankLinear
from .pivoted_linear import PivotedLinear

PARTS = 8  # sizes between two powers of two: at most an eighth is computed in vain
LEAST = 16


@contextmanager
def even_ranks(model: nn.Module) -> Iterator[None]:
    """A context in which low-rank layers in half precision on the CPU compute with padded ranks.

    Their tensors and gradients stay as they are. Layers that share `down`, are hooked or patched,
    or of other forms compute as ever.
    """
    layers = [layer for layer in model.modules() if _is_padded(layer)]
    for layer in layers:
        vars(layer)["forward"] = partial(_FORWARDS[type(layer)], layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def even(size: int) -> int:
    """The next of few sizes: the multiples of an eighth of the power of two below."""
    step = max((1 << size.bit_length()) // (2 * PARTS), LEAST)
    return -(-size // step) * step


def _is_padded(layer: nn.Module) -> bool:
    shared = getattr(layer, "_last", None) is not None
    if type(layer) not in _FORWARDS or "forward" in vars(layer) or shared:
        return False
    weights = [getattr(child, "weight", None) for child in layer.children()]
    halves = [
        isinstance(weight, Tensor)
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.device.type == "cpu"
        for weight in weights
    ]
    return all(halves) and all(map(is_plain, layer.children()))


def _low_rank(layer: LowRankLinear, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out)."""
    more = _more(layer.rank)
    inner = F.linear(x, F.pad(layer.down.weight, (0, 0, 0, more)))
    return F.linear(inner, F.pad(layer.up.weight, (0, more)), layer.up.bias)


def _pivoted(layer: PivotedLinear, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out)."""
    more, others = _more(layer.rank), sum(layer.mix.weight.shape) - layer.rank
    if layer.side == "out":
        kept = F.linear(x, F.pad(layer.down.weight, (0, 0, 0, more)))
        mixed = F.linear(kept, F.pad(layer.mix.weight, (0, more, 0, _more(others))))
        y = torch.cat((kept[..., : layer.rank], mixed[..., :others]), -1)
        y = y.index_select(-1, layer.order)
    else:
        order = layer.order
        kept, mixed = (x.index_select(-1, o) for o in (order[: layer.rank], order[layer.rank :]))
        weight = F.pad(layer.mix.weight, (0, _more(others), 0, more))
        inner = F.pad(kept, (0, more)) + F.linear(F.pad(mixed, (0, _more(others))), weight)
        y = F.linear(inner, F.pad(layer.up.weight, (0, more)))
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _more(size: int) -> int:
    return even(size) - size


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    LowRankLinear: _low_rank,
    PivotedLinear: _pivoted,
}
