"""Models without factors: merged in memory, or as a checkpoint that loads without lowrank."""

from __future__ import annotations

import copy as copying
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..errors import LowrankError
from . import tensors
from .attach import detach, is_transformers
from .densify import densify

FORMATS = ("dense",)


def to_dense(model: nn.Module, *, copy: bool = False) -> nn.Module:
    """Every factored module merged into the kind of layer that it replaced.

    The same function up to rounding: products are formed in float32 or better and stored in the
    dtype of the factors. Bias, training flag and requires_grad are kept; a shared module stays
    shared; a transformers model no longer says that it is factored.

    Args:
        model: changed in place unless `copy`.
        copy: work on a deep copy.

    Returns:
        The model, or a new layer if the model itself is a factored module.

    Raises:
        LowrankError: factors are on the meta device or carry adapters; nothing is changed then.
    """
    target = copying.deepcopy(model) if copy else model
    dense = densify(target)
    detach(dense)
    return dense


def export(
    model: nn.Module,
    folder: str | Path,
    format: Literal["dense"] = "dense",
    *,
    tokenizer: Any = None,
) -> None:
    """Write a checkpoint that needs no lowrank; the model is unchanged.

    "dense": a transformers folder, or `model.safetensors` with the names of the dense model.

    Raises:
        LowrankError: the format is not available, or `folder` is a file.
    """
    if format not in FORMATS:
        raise LowrankError(f"format {format!r} is not available, only: {', '.join(FORMATS)}")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise LowrankError(f"{target} is a file, expected a folder")
    if tokenizer is not None and not is_transformers(model):
        raise LowrankError(f"a tokenizer is for transformers models, got {type(model).__name__}")
    # The structure is copied, the tensors are not: only merged layers take new memory.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    dense = to_dense(copying.deepcopy(model, shared))
    if is_transformers(dense):
        dense.save_pretrained(target)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        return
    stored, aliases = tensors.collect(dense)
    target.mkdir(parents=True, exist_ok=True)
    # Plain readers know no aliases: load_state_dict(strict=True) wants every name.
    whole = {**stored, **{name: stored[owner].clone() for name, owner in aliases.items()}}
    tensors.write(whole, target / "model.safetensors")
