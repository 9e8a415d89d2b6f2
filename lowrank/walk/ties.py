"""Which modules hold one weight, and whether all of them can give it up together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..nn.lowrank_embedding import table_options
from . import layouts


def address(tensor: Tensor) -> tuple[object, ...]:
    """Equal for parameters that are one object, or begin at the same place in memory."""
    return (id(tensor),) if tensor.is_meta else (str(tensor.device), tensor.data_ptr())


Holders = dict[tuple[object, ...], list[nn.Module]]


def holders(model: nn.Module) -> Holders:
    """Which modules hold each parameter, each module once."""
    found: Holders = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel():
                users = found.setdefault(address(parameter), [])
                if not any(user is module for user in users):
                    users.append(module)
    return found


def tie_obstacle(module: nn.Module, holders: Holders, names: Mapping[int, list[str]]) -> str:
    """Why a layer whose weight or bias others hold cannot be factored; "" if it can."""
    weight, bias = layouts.matrix(module), layouts.bias(module)
    tied = holders[address(module.weight)]  # type: ignore[arg-type]  # not a view: meta has ids
    pair = any(map(_is_table, tied))  # readers of a table keep the bias that they have
    for user in tied:
        where = f"{_first(names, user)} ({type(user).__name__})"
        if layouts.kind(user) is None or id(user) not in names:
            return f"its weight is tied to {where}"
        if obstacle := layouts.obstacle(user):
            return f"its weight is tied to {where}: {obstacle}"
        if _is_table(user) and _is_table(module) and _options(user) != _options(module):
            return f"its weight is tied to {where}, which has other options"
        other = layouts.matrix(user)
        if (other.shape, other.stride()) != (weight.shape, weight.stride()):
            return f"its weight is tied to {where}, which holds it in another shape or order"
        if layouts.layout(user) != layouts.layout(module):
            return f"its weight is tied to {where}, which stores it the other way round"
        if not pair and layouts.bias(user) is not bias:
            return f"its weight is tied to {where}, which has another bias"
    others = holders.get(address(bias), []) if bias is not None and not pair else []
    others = [user for user in others if user not in tied]
    if others:
        return f"its bias is tied to {_first(names, others[0])} ({type(others[0]).__name__})"
    return ""


def _is_table(module: nn.Module) -> bool:
    return layouts.kind(module) == "embedding"


def _options(table: nn.Module) -> tuple[object, ...]:
    return type(table), table_options(table)


def _first(names: Mapping[int, list[str]], module: nn.Module) -> str:
    return names.get(id(module), ["a factored layer"])[0] or "(root)"
