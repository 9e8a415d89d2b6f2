"""Tensors to and from one safetensors file: each stored once, every name of it remembered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..walk.surgery import plain_name


@dataclass(frozen=True)
class TensorEntry:
    """What a name stands for: a tensor in a file, or one that a model expects.

    `parameter` tells parameters from buffers, `identity` is equal for names of one tensor; both
    are known for a model only.
    """

    shape: tuple[int, ...]
    floating: bool
    parameter: bool = False
    identity: int = 0


def collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, by the first of their names, and which other name is which of them.

    Raises:
        LowrankError: something in the state is no plain tensor with values.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[object, str] = {}
    memory: set[int] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        name = plain_name(key)
        if not isinstance(value, Tensor):
            raise LowrankError(f"{name}: {type(value).__name__} cannot be stored without pickle")
        if value.is_meta or value.layout != torch.strided:
            raise LowrankError(f"{name}: expected a dense tensor with values, got {_nature(value)}")
        owner = owners.setdefault(_place(value), name)
        if owner != name:
            aliases[name] = owner
        else:
            tensors[name] = _own(value, memory)
    return tensors, aliases


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """One file, complete or not there: it gets its name when all is written."""
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def header(path: Path) -> dict[str, TensorEntry]:
    """What the file holds, without reading it.

    Raises:
        LowrankError: the file is missing, truncated or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LowrankError(f"no file {path.name} in {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorEntry(tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise LowrankError(
            f"{path} is truncated or no safetensors file ({error}): copy or save it again"
        ) from error


def read(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of a file; floating-point ones in `dtype` if that is given."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise LowrankError(f"{path} could not be read: {error}") from error
    if dtype is None:
        return tensors
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def expected(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, TensorEntry]:
    """What the model will want to load once the modules at these names are replaced."""
    state = {plain_name(k): v for k, v in model.state_dict(keep_vars=True).items()}
    entries = {
        key: _entry(tensor)
        for key, tensor in state.items()
        if not any(name in new for name in _ancestors(key))
    }
    for name, module in new.items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            entries[f"{name}.{key}" if name else key] = _entry(tensor)
    return entries


def check_match(
    wanted: Mapping[str, TensorEntry],
    stored: Mapping[str, TensorEntry],
    aliases: Mapping[str, str],
    path: Path,
) -> None:
    """Raises LowrankError unless the file holds what is wanted, no more and no less."""
    odd = [name for name, owner in aliases.items() if owner not in stored or name in stored]
    if odd:
        raise LowrankError(f"{path}: aliases that do not fit the file: {listed(sorted(odd))}")
    _check_ties(wanted, aliases, path)
    held = {**stored, **{name: stored[owner] for name, owner in aliases.items()}}
    missing = [name for name in wanted if name not in held]
    unexpected = [name for name in held if name not in wanted]
    wrong = [
        f"{name} {_text(held[name])} instead of {_text(entry)}"
        for name, entry in wanted.items()
        if name in held and _text(held[name]) != _text(entry)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape or kind": wrong}
    parts = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if parts:
        raise LowrankError(f"{path} does not fit the model; {'; '.join(parts)}")


def _check_ties(wanted: Mapping[str, TensorEntry], aliases: Mapping[str, str], path: Path) -> None:
    """One tensor of the model cannot take two of the file."""
    owners: dict[int, str] = {}
    for name, entry in wanted.items():
        owner = aliases.get(name, name)
        first = owners.setdefault(entry.identity, owner)
        if first != owner:
            raise LowrankError(
                f"{path} holds {first} and {owner} as two tensors, but the model has one for "
                f"both: untie them in the skeleton"
            )


def as_state(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], wanted: Mapping[str, TensorEntry]
) -> dict[str, Tensor]:
    """A state for `load_state_dict(assign=True)`: names of one tensor get one parameter."""
    state: dict[str, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, entry in wanted.items():
        owner = aliases.get(name, name)
        if entry.parameter:
            fresh = nn.Parameter(tensors[owner], entry.floating)  # the model's own flag comes later
            state[name] = parameters.setdefault(owner, fresh)
        else:
            state[name] = tensors[owner]
    return state


def _entry(tensor: Tensor) -> TensorEntry:
    parameter = isinstance(tensor, nn.Parameter)
    return TensorEntry(tuple(tensor.shape), tensor.is_floating_point(), parameter, id(tensor))


def _text(entry: TensorEntry) -> str:
    return f"{list(entry.shape)} {'floating' if entry.floating else 'integer'}"


def _place(tensor: Tensor) -> object:
    """Equal for tensors that lie on the same memory in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    start = tensor.untyped_storage().data_ptr()
    where = (str(tensor.device), start, tensor.storage_offset())
    return (*where, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _own(tensor: Tensor, memory: set[int]) -> Tensor:
    """Contiguous and alone on its memory, as safetensors wants it; `memory` is what is taken."""
    storage = tensor.untyped_storage()
    alone = tensor.numel() * tensor.dtype.itemsize == storage.nbytes()
    plain = tensor.detach()
    if alone and plain.is_contiguous() and storage.data_ptr() not in memory:
        memory.add(storage.data_ptr())
        return plain
    return plain.clone(memory_format=torch.contiguous_format)


def _nature(tensor: Tensor) -> str:
    return "a tensor on the meta device" if tensor.is_meta else str(tensor.layout)


def _ancestors(key: str) -> list[str]:
    """The names of the modules that hold a tensor, from the root "" down."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
