"""Several processes: all take rank 0's decomposition, and DDP synchronises new parameters."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import LowrankError
from .wrappers import nested

SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
SHARDED_OPTIMIZERS = (
    "ZeroRedundancyOptimizer",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedZeroOptimizer",
)


def world() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def refuse_sharded(model: nn.Module, optimizer: Any, who: str) -> None:
    """FSDP and ZeRO keep slices of flattened parameters, which have no rank.

    Raises:
        LowrankError: model or optimizer are sharded.
    """
    names = [name for module in model.modules() for name in _classes(module) if name in SHARDED]
    for inner in nested(optimizer):
        for name in _classes(inner):
            if name in SHARDED_OPTIMIZERS or name.startswith("DeepSpeedZero"):
                names.append(name)
    names += [name for p in model.parameters() for name in _classes(p) if name == "DTensor"]
    if names:
        raise LowrankError(
            f"{who} cannot change ranks under {names[0]}: FSDP and ZeRO hold slices of parameters; "
            "train with DistributedDataParallel or on one device, or compress after training"
        )


def wrapper_of(root: nn.Module) -> nn.Module:
    """The DDP module around `root`, for trainers that hand out only the module inside.

    Raises:
        LowrankError: there is none.
    """
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel) and thing.module is root:
            return thing
    raise LowrankError(f"on {world()} processes the model must be wrapped in DDP, and is not")


def agreed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as rank 0 has them, shapes included; on one process the given ones."""
    if world() == 1:
        return list(tensors)
    sizes: list[object] = [[tuple(t.shape) for t in tensors]]
    torch.distributed.broadcast_object_list(sizes, src=0)
    agreed_on = []
    for tensor, size in zip(tensors, sizes[0], strict=True):  # type: ignore[call-overload]
        same = tensor.contiguous() if tensor.shape == size else tensor.new_empty(size)
        torch.distributed.broadcast(same, src=0)
        agreed_on.append(same)
    return agreed_on


def renew(model: nn.Module) -> None:
    """Have a DDP wrapper synchronise the parameters that the model has now.

    Its reducer is built anew in place, so that the user's reference stays valid; gradients that
    were already reduced are untouched. Models that are not wrapped are left alone.

    Raises:
        LowrankError: a communication hook is registered, which a new reducer would lose.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if model._comm_hooks:
        raise LowrankError("DDP with a communication hook cannot follow a change of rank")
    parameters, sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._module_parameters = parameters
    model._ddp_init_helper(parameters, sparse, names, model.static_graph)
    model._has_rebuilt_buckets = False
    if model.static_graph:
        model._set_static_graph()


def _classes(thing: object) -> list[str]:
    return [cls.__name__ for cls in type(thing).__mro__]
