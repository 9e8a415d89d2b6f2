"""Export without lowrank: merged to dense layers, or as a graph (torch.export, ONNX)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..errors import LowrankError
from ..walk.checks import check_module, ordinary_tensors
from ..walk.surgery import copied, twin
from . import tensors
from .declaration import detach, is_transformers
from .merging import densify

FORMATS = ("dense", "torch.export", "onnx")


@ordinary_tensors()
def to_dense(model: nn.Module, *, copy: bool = False) -> nn.Module:
    """Merge every factored module back into a dense layer of the kind that it replaced.

    The function is the same up to rounding: products are computed in float32 or better and stored
    in the dtype of the factors. Bias, training flag and requires_grad are kept; shared modules stay
    shared; the config of a transformers model no longer declares factored modules.

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
) -> None:
    """Export a model to files that load without lowrank; the model is unchanged.

    "dense": merged, as a transformers folder or as `model.safetensors` with the dense names.
    "torch.export" writes `model.pt2` and "onnx" `model.onnx` (extra: lowrank[onnx]): the graph in
    evaluation mode, layers still factored; the first axis of all inputs is dynamic.

    Args:
        example: for a graph: an input batch of at least two samples.

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
        _graph(model, target, format, example)
        return
    if tokenizer is not None and not is_transformers(model):
        raise LowrankError(f"tokenizer is for transformers models, got {type(model).__name__}")
    # Copies the modules but not the tensors: only merged layers take new memory.
    dense = to_dense(twin(model))
    if is_transformers(dense):
        dense.save_pretrained(target)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        return
    stored, aliases = tensors.collect(dense)
    target.mkdir(parents=True, exist_ok=True)
    # load_state_dict(strict=True) wants every name, so aliases are written out.
    whole = {**stored, **{name: stored[owner].clone() for name, owner in aliases.items()}}
    tensors.write(whole, target / "model.safetensors")


def _graph(model: nn.Module, target: Path, format: str, example: Batch | None) -> None:
    """Trace the model on an example and write the graph."""
    if example is None:
        raise LowrankError(f"format {format!r} traces the model: pass an input batch as example=…")
    if format == "onnx":
        _require_onnx()
    positional = isinstance(example, Tensor)
    args: tuple[Any, ...] = (example,) if positional else ()
    named: dict[str, Any] = {} if positional else dict(example)
    axes = {0: torch.export.Dim.AUTO}
    shapes = tuple(axes for _ in args) or {k: _axes(v, axes) for k, v in named.items()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, named, dynamic_shapes=shapes)
            target.mkdir(parents=True, exist_ok=True)
            if format == "torch.export":
                torch.export.save(program, target / "model.pt2")
            else:
                torch.onnx.export(
                    program,
                    f=target / "model.onnx",
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
    except LowrankError:
        raise
    except Exception as error:  # tracing runs arbitrary model code
        what = " ".join(str(error).split())[:200]
        raise LowrankError(f"{type(model).__name__} cannot be traced ({what})") from error
    finally:
        for module in training:
            module.training = True


def _axes(value: Any, axes: dict[int, Any]) -> Any:
    return axes if isinstance(value, Tensor) and value.ndim else None


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LowrankError("format 'onnx' needs onnxscript: pip install 'lowrank[onnx]'") from error
