"""Read and write one safetensors file: each tensor is stored once, with all its names."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..nn.children import is_sharded
from ..walk.surgery import plain_name

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
BLOCK = 2**20  # bytes hashed at a time
WIDE = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorEntry:
    """Shape and kind of a tensor in a file, or of one that a model expects.

    `parameter` is False for buffers; `identity` is equal for names of the same tensor. Both are
    known only for a model.
    """

    shape: tuple[int, ...]
    floating: bool
    dtype: str  # as safetensors calls it
    parameter: bool = False
    identity: int = 0


def collect(state: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, by their first name, and the aliases: other name -> first name.

    Args:
        state: of a model, with `keep_vars=True`.

    Raises:
        LowrankError: an entry of the state dict is not a dense tensor with values.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[object, str] = {}
    memory: set[int] = set()
    for key, value in state.items():
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


def check_whole(state: Mapping[str, Any]) -> None:
    """Check that a state dict holds whole tensors; asked before anything is written.

    Raises:
        LowrankError: a tensor is sharded.
    """
    sharded = [plain_name(key) for key, value in state.items() if is_sharded(value)]
    if sharded:
        raise LowrankError(
            f"{len(sharded)} tensors are sharded by FSDP ({listed(sharded, 2)}): gather them on "
            "all processes, state = get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True, cpu_offload=True)), and on the first one call "
            "model.save_pretrained(folder, state_dict=state)"
        )


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file atomically: it is renamed into place when complete."""
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def header(path: Path) -> dict[str, TensorEntry]:
    """The entries of a file, read from its header alone.

    Raises:
        LowrankError: the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LowrankError(f"there is no {path.name} in {path.parent}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: _stored(tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise LowrankError(
            f"{path} is truncated or not a safetensors file ({error}): copy or save it again"
        ) from error


def read(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of a file, floating-point ones cast to `dtype` if given."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path, device=str(device))
    except (SafetensorError, OSError, RuntimeError) as error:  # a device that is not there
        reason = " ".join(str(error).split())
        raise LowrankError(f"{path} could not be read to {device}: {reason:.200}") from error
    if dtype is None:
        return tensors
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def each(path: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file one after another, or those of these names; none is kept."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if names is None or name in names:
                    yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise LowrankError(f"{path} could not be read: {error}") from error


def expected(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, TensorEntry]:
    """The entries that the model expects once the modules of these names are replaced."""
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
    """Raises LowrankError unless the file holds exactly the wanted entries."""
    invalid = [name for name, owner in aliases.items() if owner not in stored or name in stored]
    if invalid:
        raise LowrankError(f"{path}: aliases do not match the file: {listed(sorted(invalid))}")
    _check_ties(wanted, aliases, path)
    held = {**stored, **{name: stored[owner] for name, owner in aliases.items()}}
    missing = [name for name in wanted if name not in held]
    unexpected = [name for name in held if name not in wanted]
    wrong = [
        f"{name} {_text(held[name])} instead of {_text(entry)}"
        for name, entry in wanted.items()
        if name in held and _text(held[name]) != _text(entry)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape or type": wrong}
    parts = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if parts:
        raise LowrankError(f"{path} does not fit the model; {'; '.join(parts)}")


def _check_ties(wanted: Mapping[str, TensorEntry], aliases: Mapping[str, str], path: Path) -> None:
    """Raises LowrankError if the model ties what the file stores as two tensors."""
    owners: dict[int, str] = {}
    for name, entry in wanted.items():
        owner = aliases.get(name, name)
        first = owners.setdefault(entry.identity, owner)
        if first != owner:
            raise LowrankError(
                f"{path} holds {first} and {owner} as two tensors, which the model ties: untie "
                f"them in the skeleton"
            )


def as_state(
    tensors: Mapping[str, Tensor], aliases: Mapping[str, str], wanted: Mapping[str, TensorEntry]
) -> dict[str, Tensor]:
    """State dict for `load_state_dict(assign=True)`; names of one tensor share one parameter."""
    state: dict[str, Tensor] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, entry in wanted.items():
        owner = aliases.get(name, name)
        if entry.parameter:
            fresh = nn.Parameter(tensors[owner], entry.floating)  # requires_grad: set on load
            state[name] = parameters.setdefault(owner, fresh)
        else:
            state[name] = tensors[owner]
    return state


def _entry(tensor: Tensor) -> TensorEntry:
    parameter = isinstance(tensor, nn.Parameter)
    kind = dtype_name(tensor.dtype)
    shape, floating = tuple(tensor.shape), tensor.is_floating_point()
    return TensorEntry(shape, floating, kind, parameter, id(tensor))


def _stored(shape: tuple[int, ...], dtype: str) -> TensorEntry:
    return TensorEntry(shape, dtype.startswith(("F", "BF")), dtype)


def _text(entry: TensorEntry) -> str:
    """Shape and kind; floating-point numbers of 16 to 64 bits are one kind, since a model may be
    cast."""
    return f"{list(entry.shape)} {'floating' if entry.dtype in WIDE else entry.dtype}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors' files; torch's own for one that they cannot hold."""
    return NAMES.get(dtype, str(dtype))


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a file's index says of floating-point tensors: the usual dtype, and those of others."""
    every = {n: dtype_name(t.dtype) for n, t in tensors.items() if t.is_floating_point()}
    usual = Counter(every.values()).most_common(1)
    if not usual:
        return {}
    others = {name: dtype for name, dtype in every.items() if dtype != usual[0][0]}
    return {"dtype": usual[0][0], **({"dtypes": others} if others else {})}


def check_dtypes(stored: Mapping[str, TensorEntry], index: Mapping[str, Any], path: Path) -> None:
    """Raises LowrankError unless floating-point tensors have the dtypes that the index names."""
    usual, others = index.get("dtype"), index.get("dtypes", {})
    if usual is None:
        return  # written before there was one
    if not isinstance(usual, str) or not isinstance(others, dict):
        raise LowrankError(f"{path}: 'dtype' must be a name and 'dtypes' map tensors to names")
    wrong = [
        f"{name} {entry.dtype} instead of {others.get(name, usual)!r:.40}"
        for name, entry in stored.items()
        if entry.floating and entry.dtype != others.get(name, usual)
    ]
    if wrong:
        raise LowrankError(f"{path} is damaged or was edited; of another dtype: {listed(wrong)}")


def _place(tensor: Tensor) -> object:
    """A key that is equal for tensors with the same memory and layout."""
    if tensor.numel() == 0:
        return id(tensor)
    start = tensor.untyped_storage().data_ptr()
    address = (str(tensor.device), start, tensor.storage_offset())
    return (*address, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _own(tensor: Tensor, memory: set[int]) -> Tensor:
    """The tensor, contiguous and sole user of its storage, as safetensors needs; cloned if not."""
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
    """Names of the modules around a tensor, from the root "" down."""
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
