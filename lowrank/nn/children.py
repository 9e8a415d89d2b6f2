"""How a form reads its children: their tensors where they are plain, else through their forward.

A child may have become something else: peft wraps it, quantization stores its weight in int8,
accelerate keeps it on the disk until it is called. Its `.weight` then says nothing of what it
computes, or does not exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import LowrankError

PLAIN = (nn.Linear, nn.Embedding, nn.EmbeddingBag)


def is_plain(child: nn.Module) -> bool:
    """Whether a child computes with its `.weight` and nothing else: of torch's own class, neither
    hooked nor patched, its weight an ordinary tensor."""
    return type(child) in PLAIN and is_bare(child) and _is_ordinary(child.weight)


def is_bare(child: nn.Module) -> bool:
    """Whether calling a child runs its class's forward pass alone: neither hooked nor patched."""
    hooks = (child._forward_hooks, child._forward_pre_hooks)
    return not any(hooks) and "forward" not in child.__dict__ and not hasattr(child, "_hf_hook")


def _is_ordinary(weight: object) -> bool:
    """Whether it is a tensor of torch's own, or what stands for one while torch traces."""
    cls = type(weight)
    return cls in (Tensor, nn.Parameter) or cls.__module__.startswith("torch._subclasses")


def class_of(module: nn.Module) -> type:
    """The class of a module; the one that it had, where it is a unit of FSDP2, which puts a class
    of its own before it."""
    cls = type(module)
    first, *rest = cls.__bases__
    return rest[0] if rest and first.__name__ == "FSDPModule" else cls


def is_sharded(tensor: object) -> bool:
    """Whether a process holds only a slice of it, as FSDP2's `fully_shard` leaves parameters."""
    return type(tensor).__name__ == "DTensor"


def refuse_shards(child: nn.Module, whose: str = "") -> None:
    """To be called before a tensor of a child is read without calling the child.

    Args:
        whose: the two layers that share it, where one reads what the other stores.

    Raises:
        LowrankError: it is sharded, and nothing gathers it here.
    """
    if not is_sharded(child._parameters.get("weight")) or not is_bare(child):
        return  # a child that is a unit of FSDP gathers its weight when it is called
    if whose:
        raise LowrankError(
            f"{whose} share a factor and are in two units of FSDP: call fully_shard on a module "
            "that holds both, such as the block or the whole model, and not on either of them"
        )
    raise LowrankError(
        "a factor is sharded by FSDP, so no process has the dense weight: gather the tensors, "
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), and load "
        "them into a model that is not sharded"
    )


def linear_weight(child: nn.Module, like: Tensor | None = None) -> Tensor:
    """The weight (out, in) of a linear child as it acts now, adapters included.

    Args:
        like: the dtype and device to compute in, where the child is not plain.

    Raises:
        LowrankError: it is sharded.
    """
    if is_plain(child):
        return child.weight  # type: ignore[return-value]
    refuse_shards(child)
    place, inputs = _place(child) if like is None else like, int(child.in_features)  # type: ignore[arg-type]
    eye = torch.eye(inputs, dtype=place.dtype, device=place.device)
    zero = torch.zeros_like(eye[:1])
    columns: Tensor = child(eye)
    return (columns if getattr(child, "bias", None) is None else columns - child(zero)).T


def table_weight(child: nn.Module, rows: int, like: Tensor | None = None) -> Tensor:
    """The rows (V, width) of an embedding as it reads them now, adapters included.

    Args:
        like: the device to compute on, where the child is not plain.

    Raises:
        LowrankError: it is sharded, or a bag that is not plain and leaves out a padding row.
    """
    if is_plain(child):
        return child.weight  # type: ignore[return-value]
    refuse_shards(child)
    ids = torch.arange(rows, device=(_place(child) if like is None else like).device)
    if not isinstance(child, nn.EmbeddingBag):
        whole: Tensor = child(ids)
        return whole
    if child.padding_idx is not None:
        raise LowrankError(
            "a hooked, offloaded or quantized EmbeddingBag with a padding row cannot be read as a "
            "whole: load it without offloading"
        )
    bags: Tensor = child(ids[:, None])
    return bags


def _place(child: nn.Module) -> Tensor:
    """A tensor with the dtype that the child computes in and a device that it accepts."""
    floating = [p for p in child.parameters() if p.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    held = [p.device for p in floating if not p.is_meta]
    return torch.empty(0, dtype=dtype, device=held[0] if held else "cpu")
