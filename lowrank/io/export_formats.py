"""Export without lowrank: merged to dense layers, or as a graph (torch.export, ONNX)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..calibration.batches import Batch
from ..errors import LowrankError
from ..walk.checks import check_module, ordinary_tensors
from ..walk.surgery import copied, twin
from . import tensors
from .declaration import detach, is_transformers
from .graphs import write_graph
from .merging import densify

FORMATS = ("dense", "torch.export", "onnx")


@ordinary_tensors()
def to_dense(model: nn.Module, *, copy: bool = False) -> nn.Module:
    """Merge every factored module back into a dense layer of the kind that it replaced.

    The function is the same up to rounding: products are computed in float32 or better and stored
    in the dtype of the factors. Bias, training flag and requires_grad are kept; shared modules stay
    shared; the config of a transformers model no longer declares factored modules. Weights that
    torchao quantized, in factored layers or beside them, become numbers again.

    Args:
        model: changed in place unless `copy`.
        copy: work on a deep copy.

    Returns:
        The model, or a new layer if the model itself is a factored module.

    Raises:
        LowrankError: factors are on the meta device, carry adapters or are not a linear map; the
            model is then unchanged.
    """
    check_module(model)
    target = copied(model) if copy else model
    dense = densify(target)
    detach(dense)
    return dense


def export(
    model: nn.Module,
    folder: str | Path,
    format: Literal["dense", "torch.export", "onnx"] = "dense",
    *,
    tokenizer: Any = None,
    example: Batch | None = None,
    cache: bool = False,
) -> None:
    """Export a model to files that load without lowrank; the model is unchanged.

    "dense": merged, as a transformers folder or as `model.safetensors` with the dense names.
    "torch.export" writes `model.pt2` and "onnx" `model.onnx` (extra: lowrank[onnx]): the graph in
    evaluation mode, layers still factored. The first axis of all inputs is dynamic, and the length
    of a transformers model's ids and masks. Its outputs are the tensors that it returns, without a
    cache.

    Args:
        example: for a graph: an input batch of at least two samples; ids of two tokens or more.
        cache: for the graph of a language model: keys and values of earlier tokens are inputs
            (`past_key_values.0.key`, …), those of all tokens outputs (`present.0.key`, …); the
            attention mask is of all tokens.

    Raises:
        LowrankError: the format is unknown, `folder` is a file, or a graph has no example or
            cannot be traced.
    """
    if format not in FORMATS:
        raise LowrankError(f"format {format!r} is not available, only: {', '.join(FORMATS)}")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise LowrankError(f"{target} is a file, expected a folder")
    if format != "dense":
        write_graph(model, target, format, example, cache=cache)
        return
    if cache:
        raise LowrankError("cache is for a graph: format 'torch.export' or 'onnx'")
    if tokenizer is not None and not is_transformers(model):
        raise LowrankError(f"tokenizer is for transformers models, got {type(model).__name__}")
    # Copies the modules but not the tensors: only merged layers take new memory.
    dense = to_dense(twin(model))
    if is_transformers(dense):
        dense.save_pretrained(target)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        return
    stored, aliases = tensors.collect(dense.state_dict(keep_vars=True))
    target.mkdir(parents=True, exist_ok=True)
    # load_state_dict(strict=True) wants every name, so aliases are written out.
    whole = {**stored, **{name: stored[owner].clone() for name, owner in aliases.items()}}
    tensors.write(whole, target / "model.safetensors")
