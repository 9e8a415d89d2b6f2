"""Save and load any nn.Module: `model.safetensors` and `lowrank.json`, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LowrankError, listed
from ..plans.plan import version
from ..walk.checks import check_module, check_shaped
from ..walk.surgery import (
    PARALLEL,
    modules_of,
    plain_name,
    swap,
    unchanged_on_error,
    unwrapped,
)
from . import flattening, pretrained, tensors
from .containers import hold_apart
from .declaration import is_compressed, is_transformers
from .specs import Spec, as_longer, check_finite, check_specs, check_values, prepare, specs_of

FORMAT = "lowrank"
VERSION = 1
WEIGHTS = "model.safetensors"
INDEX = "lowrank.json"
CONFIG = "config.json"
Folder = str | Path


def save(
    model: nn.Module,
    folder: Folder,
    *,
    tokenizer: Any = None,
    card: str | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Save a model so that `load` restores it bit for bit.

    A transformers model is saved for `from_pretrained`, with a model card; any other module as
    `model.safetensors` and `lowrank.json`.

    Args:
        model: any module, with or without factored layers.
        folder: created if missing.
        tokenizer: saved too (transformers models only).
        card: markdown for the model card, such as a table of ranks (transformers models only).
        max_shard_size: of the files, such as "1GB" (transformers models only).

    Raises:
        LowrankError: `folder` is a file or holds a checkpoint of the other kind, or the model
            cannot be stored: nothing is then written. Or the folder cannot be written to.
    """
    target = _folder(folder)
    check_module(model)
    check_shaped(model)
    model = unwrapped(model)
    if target.exists() and not target.is_dir():
        raise LowrankError(f"{target} is a file, expected a folder")
    other = INDEX if is_transformers(model) else CONFIG
    if (target / other).exists():
        raise LowrankError(f"{target} holds another checkpoint ({other}): choose another folder")
    tensors.check_whole(model.state_dict())
    if is_compressed(model):
        flattening.check_storable(model)
    if is_transformers(model):
        with _writing(target):
            pretrained.save(model, target, tokenizer, card, max_shard_size)
        return
    if tokenizer is not None or card is not None or max_shard_size is not None:
        raise LowrankError(
            "tokenizer, card and max_shard_size are for transformers models, got "
            f"{type(model).__name__}"
        )
    with _writing(target):
        _write(model, target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Raises LowrankError for what the file system refuses."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise LowrankError(
            f"{target} cannot be written to ({error}): choose another folder, or make room"
        ) from error


def _write(model: nn.Module, target: Path) -> None:
    stored, aliases = tensors.collect(flattening.flat(model.state_dict(keep_vars=True)))
    codes = flattening.codes_of(model)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "lowrank_version": version(),
        "modules": specs_of(model),
        **({"quantized": codes} if codes else {}),
        "aliases": aliases,
        **tensors.dtypes_of(stored),
    }
    target.mkdir(parents=True, exist_ok=True)
    tensors.write(stored, target / WEIGHTS)
    index["sha256"] = tensors.sha256(target / WEIGHTS)  # compared by `lowrank verify`
    (target / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def load(
    folder: Folder,
    skeleton: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model that `save` wrote.

    Args:
        folder: holds `lowrank.json`, or a transformers model.
        skeleton: the dense model, or a function that returns it; modified in place, and may be on
            the meta device. None for a transformers model.
        device: of the weights; the CPU by default.
        dtype: of floating-point tensors; as saved by default. Quantized weights take no other than
            that which they were quantized in.

    Returns:
        The skeleton with factored modules (or its new root), or the transformers model.

    Raises:
        LowrankError: a file is missing, damaged or does not fit; the skeleton is then unchanged.
    """
    source = _folder(folder)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LowrankError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    if not source.is_dir():
        raise LowrankError(f"there is no folder {source}")
    if not (source / INDEX).exists():
        return _load_pretrained(source, skeleton, device, dtype)
    specs, index = index_of(source / INDEX)
    if skeleton is None:
        raise LowrankError(
            f"{source} holds weights but no architecture: pass skeleton=, the dense model or a "
            f"function that returns it"
        )
    model = skeleton if isinstance(skeleton, nn.Module) else skeleton()
    if not isinstance(model, nn.Module):
        raise LowrankError(f"skeleton must be or return an nn.Module, got {type(model).__name__}")
    check_shaped(model)
    if isinstance(model, PARALLEL):  # names in files are those of the module inside
        model.module = _filled(model.module, source / WEIGHTS, specs, index, device, dtype)
        return model
    return _filled(model, source / WEIGHTS, specs, index, device, dtype)


def _folder(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike):
        raise LowrankError(f"expected the path of a folder, got {type(given).__name__}")
    return Path(given)


def _filled(
    model: nn.Module,
    path: Path,
    specs: dict[str, Spec],
    index: dict[str, Any],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Swap layers and load tensors from `path`; the model is unchanged on an error."""
    stored, aliases, codes = tensors.header(path), index["aliases"], index["quantized"]
    with unchanged_on_error(model):
        new = prepare(model, hold_apart(model, specs, INDEX), INDEX)
        named = {name: new[id(module)] for name, module in modules_of(model) if id(module) in new}
        whole = tensors.expected(model, named)
        wanted = flattening.taken_apart(whole, codes, INDEX)
        tensors.check_match(wanted, as_longer(stored, named), aliases, path)
        tensors.check_dtypes(stored, index, path)
        _check_unsaved_buffers(model)
        values = tensors.read(path, device or "cpu", None if codes else dtype)
        state = tensors.as_state(values, aliases, wanted)
        state = flattening.joined(state, codes, whole, str(path), dtype)
        filled = swap(model, new)
        filled.load_state_dict(
            {key: state[plain_name(key)] for key in filled.state_dict()}, assign=True
        )
        for name in codes:
            state[name].requires_grad_(False)  # assigning gave it that of the skeleton's
        check_values(filled, str(path))
        check_finite(filled, str(path))
    # Also moves what the file does not hold (unsaved buffers).
    return filled.to(device=device, dtype=dtype)


def _load_pretrained(
    source: Path,
    skeleton: object,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    names = sorted(path.name for path in source.iterdir())
    if CONFIG not in names:
        raise LowrankError(
            f"{source} is not a saved model: neither {INDEX} nor {CONFIG} among {listed(names)}"
        )
    if skeleton is not None:
        raise LowrankError(f"{source} is a transformers model, which needs no skeleton: drop it")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model: nn.Module = pretrained.from_pretrained(source, **options)
    return model.to(device=device)


def index_of(path: Path) -> tuple[dict[str, Spec], dict[str, Any]]:
    """Specs by module name, and the whole of a validated `lowrank.json`, with its aliases and
    quantized weights."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LowrankError(f"{path} is not valid JSON ({error}): save the model again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise LowrankError(f"{path}: expected an object with format {FORMAT!r}")
    if index.get("version") != VERSION or isinstance(index["version"], bool):
        raise LowrankError(
            f"{path}: format version {index.get('version')!r} is unknown, expected {VERSION}: "
            f"update lowrank, or save the model again"
        )
    aliases = index.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
        raise LowrankError(f"{path}: 'aliases' must map names to names, got {aliases!r:.80}")
    codes = flattening.check_codes(index.get("quantized", {}), INDEX)
    specs = check_specs(index.get("modules"), INDEX)
    return specs, {**index, "aliases": aliases, "quantized": codes}


def _check_unsaved_buffers(model: nn.Module) -> None:
    """Raises LowrankError for a non-persistent buffer on the meta device: no file holds it."""
    empty = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
    if empty:
        raise LowrankError(
            f"the skeleton has buffers on the meta device that are not saved: {listed(empty)}; "
            f"build it on the CPU"
        )
