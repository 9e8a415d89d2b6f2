"""Models as graphs: torch.export and ONNX, layers still factored, sizes that may change.

The first axis of all inputs is dynamic; of a transformers model also the second of its ids and
masks, the length. What a transformers model returns beside tensors is left out. With `cache`, the
keys and values of earlier tokens are inputs, and those of all are outputs, under the names that
optimum gives them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.running import quiet
from ..errors import LowrankError
from .declaration import is_transformers

Pairs = Sequence[tuple[Tensor, Tensor]]
AUTO: Any = torch.export.Dim.AUTO
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
AGREED = 1e-3  # of the largest output: what the graph may differ by on its own example


class _Traced(NamedTuple):
    """What is given to the tracer.

    Attributes:
        outputs: the names of the outputs, if known.
    """

    model: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]
    axes: Any
    inputs: list[str] | None = None
    outputs: list[str] | None = None


def write_graph(
    model: nn.Module, target: Path, format: str, example: Batch | None, *, cache: bool = False
) -> None:
    """Trace the model on an example, and write `model.pt2` or `model.onnx` into the folder.

    Raises:
        LowrankError: there is no example, the model cannot be traced, or its graph computes
            something else on the example.
    """
    if example is None:
        raise LowrankError(f"format {format!r} traces the model: pass an input batch as example=…")
    if format == "onnx":
        _require_onnx()
    with quiet(model):
        try:
            traced = _traced(model, example, cache)
            program = torch.export.export(
                traced.model, traced.args, traced.named, dynamic_shapes=traced.axes
            )
            _check_equal(program.module(), traced)
            target.mkdir(parents=True, exist_ok=True)
            if format == "torch.export":
                torch.export.save(program, target / "model.pt2")
                return
            _write_onnx(program, traced, target / "model.onnx")
        except LowrankError:
            raise
        except Exception as error:  # tracing runs arbitrary model code
            raise LowrankError(
                f"{type(model).__name__} cannot be traced ({_first_cause(error)})"
            ) from error


def _write_onnx(program: Any, traced: _Traced, path: Path) -> None:
    options: dict[str, Any] = {
        "f": path, "dynamo": True, "external_data": False, "verbose": False,
        "input_names": traced.inputs, "output_names": traced.outputs,
    }  # fmt: skip
    try:
        torch.onnx.export(program, **options)
    except Exception:  # the guards of some programs (T5's) cannot be taken apart once they are made
        torch.onnx.export(
            traced.model, traced.args, kwargs=traced.named, dynamic_shapes=traced.axes, **options
        )


def _first_cause(error: BaseException) -> str:
    """In one line, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(COLOURS.sub("", str(error)).split())[:200]


def _traced(model: nn.Module, example: Batch, cache: bool) -> _Traced:
    if not is_transformers(model):
        if cache:
            raise LowrankError(
                f"cache is for language models of transformers, got {type(model).__name__}"
            )
        if isinstance(example, Tensor):
            return _Traced(model, (example,), {}, ({0: AUTO},))
        given = dict(example)
        axes = {key: {0: AUTO} if _has_axes(value) else None for key, value in given.items()}
        return _Traced(model, (), given, axes)
    main = str(getattr(model, "main_input_name", "input_ids"))
    given = {main: example} if isinstance(example, Tensor) else dict(example)
    if cache:
        return _with_past(model, given)
    traced = _returning(model, given)
    names = list(traced(**given))
    axes = {key: _axes_of(value) for key, value in given.items()}
    return _Traced(traced, (), given, axes, list(given), names)


def _with_past(model: Any, given: Mapping[str, Tensor]) -> _Traced:
    """A language model that reads the second half of its example, and remembers the first."""
    ids = given.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] < 4:
        raise LowrankError("cache: the example holds input_ids of at least four tokens")
    half = ids.shape[1] // 2
    held = model(input_ids=ids[:, :half], use_cache=True).past_key_values
    layers = getattr(held, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise LowrankError(
            f"cache: {type(model).__name__} keeps other states than keys and values: export it "
            "without a cache"
        )
    past = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    mask = given.get("attention_mask", torch.ones_like(ids))
    # A copy: the tracer would hold a view to its base.
    inputs = {"input_ids": ids[:, half:].clone(), "attention_mask": mask}
    axes = {key: _axes_of(value) for key, value in inputs.items()}
    pair = {0: AUTO, 2: AUTO}
    names = [f"{i}.{what}" for i in range(len(past)) for what in ("key", "value")]
    return _Traced(
        _Remembering(model), (), {"inputs": inputs, "past": past},
        {"inputs": axes, "past": [(pair, pair)] * len(past)},
        [*inputs, *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names)],
    )  # fmt: skip


def _returning(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A transformers model that takes inputs of these names, and returns its tensors by name."""

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            found = self.model(**inputs, return_dict=True)
            return {key: value for key, value in found.items() if isinstance(value, Tensor)}

    # The tracer asks for the arguments' names.
    named = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
    own = Parameter("self", Parameter.POSITIONAL_ONLY)
    Outputs.forward.__signature__ = Signature([own, *named])  # type: ignore[attr-defined]
    return Outputs()


class _Remembering(nn.Module):
    """A language model whose cache is a list of keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Tensor], past: Pairs) -> tuple[Tensor, list[Any]]:
        from transformers import DynamicCache

        cache = DynamicCache(past, config=self.model.config)
        found = self.model(**inputs, past_key_values=cache, use_cache=True)
        return found.logits, [(layer.keys, layer.values) for layer in cache.layers]


def _check_equal(program: Any, traced: _Traced) -> None:
    """Raises LowrankError if the graph computes something else on the example."""
    found = torch.utils._pytree.tree_leaves(program(*traced.args, **traced.named))
    wanted = torch.utils._pytree.tree_leaves(traced.model(*traced.args, **traced.named))
    for ours, theirs in zip(found, wanted, strict=True):
        if isinstance(theirs, Tensor) and theirs.is_floating_point() and theirs.numel():
            error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
            if not error <= AGREED * max(size, 1e-6):
                raise LowrankError(
                    f"the graph differs from the model by {error:.2g} of {size:.2g} here: "
                    "its code depends on values that tracing fixes"
                )


def _axes_of(value: Any) -> Any:
    """The axes that may change: rows, and the length of ids and masks."""
    if not _has_axes(value):
        return None
    is_text = value.ndim == 2 and not value.is_floating_point()
    return {0: AUTO, 1: AUTO} if is_text else {0: AUTO}


def _has_axes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _require_onnx() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LowrankError("format 'onnx' needs onnxscript: pip install 'lowrank[onnx]'") from error
