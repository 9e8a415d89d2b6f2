"""Running a model and restoring it: modes, caches, inputs and outputs."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..walk.surgery import COMPILED
from .batches import ROWS, Batch, is_dense

LOGITS = 1 << 27  # bytes of logits that are held at once
# What a model's own code raises.
FAILED = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)

Run = Callable[[], object]  # runs a model on what it is observed with


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """A context of evaluation mode without gradients; flags and random states are restored.

    Models keep no key–value cache: nobody reads it, and it takes memory for every layer. Torch's
    fast path of attention is off too: it makes nested tensors of padded ones, and reads weights
    without calling their layers. What torch.compile wraps runs uncompiled, so that hooks are called
    as they are added.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    training = [module for module in model.modules() if module.training]
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        random = torch.random.fork_rng(devices=cuda)
        with torch.no_grad(), random, _without_cache(model), _uncompiled(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """A context without torch.compile; of a model that has none, nothing is imported for it."""
    is_compiled = any(COMPILED in module._modules for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one batch, on its device and in its precision.

    Labels only make a decoder's input, but where the model makes that itself of them, or demands
    them.

    Raises:
        LowrankError: in place of what the model raises, for want of memory excepted.
    """
    try:
        return bare_forward(model, batch)
    except (LowrankError, torch.OutOfMemoryError):
        raise
    except FAILED as error:
        parts = {"": batch} if isinstance(batch, Tensor) else batch
        given = (f"{name} {_shown(value)}".strip() for name, value in parts.items())
        taken = (place.name for place in _places(model))
        raise LowrankError(
            f"{type(model).__name__} does not run on the data: {type(error).__name__}: "
            f"{' '.join(str(error).split()):.160}; it takes {listed(taken, 6) or 'nothing'}, and "
            f"was given {listed(given, 4)}"
        ) from error


def bare_forward(model: nn.Module, batch: Batch) -> Any:
    """`forward`, with what the model itself raises."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or first is None:
            return value
        wide = value.dtype == torch.float64  # NumPy's default, seldom meant
        return value.to(first.device, first.dtype if wide else None)

    if isinstance(batch, Tensor):
        try:
            return model(moved(batch))
        except TypeError as error:
            if len(demanded := _demanded(model)) < 2:
                raise
            raise LowrankError(
                f"{type(model).__name__} takes {', '.join(demanded)}, but a batch of the data is "
                f"one tensor, such as the first of a tuple: pass dicts, {{'{demanded[0]}': …}}"
            ) from error
    inputs = {k: moved(v) for k, v in batch.items()}
    if _takes_one_dict(model, inputs):
        try:
            return model(inputs)
        except (TypeError, AttributeError) as error:
            raise LowrankError(
                f"{type(model).__name__} takes {_demanded(model)[0]!r}, but a batch of the data "
                f"holds {', '.join(map(repr, inputs))}: name it so, or pass the tensor itself"
            ) from error
    labels = inputs.pop("labels", None)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is None:
        return model(**inputs)
    taken = inspect.signature(model.forward).parameters.get("labels")
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if taken is not None and taken.default is inspect.Parameter.empty:
        inputs["labels"] = labels
    elif "decoder_input_ids" not in inputs and callable(shift):
        inputs["decoder_input_ids"] = shift(labels=labels)
    elif "decoder_input_ids" not in inputs and taken is not None and decodes:
        inputs["labels"] = labels
    return model(**inputs)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _takes_one_dict(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether `forward` takes its inputs as one dict, like that of SentenceTransformer."""
    return len(_demanded(model)) == 1 and not any(p.name in inputs for p in _places(model))


def _demanded(model: nn.Module) -> list[str]:
    """The names of what `forward` has to be given by place."""
    return [p.name for p in _places(model) if p.default is inspect.Parameter.empty]


def _places(model: nn.Module) -> list[inspect.Parameter]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in parameters if p.kind in kinds]


def reads_ids(model: nn.Module, batch: Batch) -> bool:
    """Whether a model of transformers is given ids (rows, length), and nothing but what goes with
    them: masks and labels, integers of one or two axes."""
    library = sys.modules.get("transformers.modeling_utils")  # not loaded: it is no such model
    if library is None or not isinstance(model, library.PreTrainedModel):
        return False
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    tensors = list(tensors_in(batch))
    told = isinstance(ids, Tensor) and ids.ndim == 2 and model.main_input_name == "input_ids"
    return told and not any(t.is_floating_point() or t.ndim > 2 for t in tensors)


def few_rows(model: nn.Module, batch: Batch, most: int = LOGITS) -> int:
    """How many rows of a batch to run at once, so that logits over a large vocabulary stay below
    `most` bytes; at least one.

    The vocabulary is taken for the longest side of any weight.
    """
    tensors = [batch] if isinstance(batch, Tensor) else [*tensors_in(batch)]
    ids = [t for t in tensors if t.ndim > 1 and not t.is_floating_point()]
    if not ids:
        return ROWS
    widest = max((max(p.shape) for p in model.parameters() if p.ndim == 2), default=1)
    tokens = max(t[0].numel() for t in ids)
    return max(min(most // max(4 * widest * tokens, 1), ROWS), 1)


def logits_of(output: Any) -> Tensor:
    """The logits (…, classes) of a model's output: itself, its "logits", or the first of a tuple.

    Raises:
        LowrankError: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif logits is None and isinstance(output, tuple):
        logits = next(iter(output), None)
    if not isinstance(logits, Tensor):
        raise LowrankError(f"expected logits, the model returned {type(output).__name__}")
    return logits


# By these names models give back embeddings and hidden states, the most telling first.
VALUES = ("sentence_embedding", "last_hidden_state")


def predictions_of(model: nn.Module, output: Any) -> tuple[Tensor, bool]:
    """What a model is judged by, (…, features), and whether they are logits of classes.

    Logits are, unless there is one class or the config says that they are a regression. A model
    without logits is judged by its outputs: the pooled embedding, the last hidden state, or the
    first output of a tuple, a dict or a dataclass.

    Raises:
        LowrankError: the output holds no tensor of floating-point numbers.
    """
    try:
        logits = logits_of(output)
    except LowrankError:
        return _values(output), False
    config = getattr(model, "config", None)
    regression = getattr(config, "problem_type", None) == "regression"
    return logits, not regression and logits.ndim > 0 and logits.shape[-1] > 1


def _values(output: Any) -> Tensor:
    """The outputs of a model that gives no logits."""
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    first = (named[name] for name in VALUES if isinstance(named.get(name), Tensor))
    others = (t for t in tensors_in(output) if t.is_floating_point() and t.ndim)
    values = next(first, next(others, None))
    if values is None:
        raise LowrankError(f"expected logits or other outputs, got {type(output).__name__}")
    return values


class Unpadded:
    """`Padding` of batches without any: every position is real, and no hook is needed."""

    uncertain: Mapping[str, None] = {}

    def __enter__(self) -> Unpadded:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, batch: Batch | None) -> None:
        pass

    def real(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
        return None

    def predicted(self, outputs: Tensor) -> Tensor | None:
        return None


class SameTensor:
    """Remembers a tensor weakly and recognises it, or another view of the same memory, later."""

    def __init__(self, tensor: Tensor) -> None:
        self._ref = weakref.ref(tensor)
        self._key = _key(tensor)

    def __call__(self, tensor: Tensor) -> bool:
        # Only while the first tensor is alive its memory cannot have been reused.
        return self._ref() is not None and self._key == _key(tensor)


def input_of(args: Any, kwargs: Any = None) -> Tensor | None:
    """The tensor that a layer is called with, or returns; None where no rows can be read of it: it
    is sparse, nested, or inside torch.func."""
    tensor = first_tensor((args, kwargs))
    return tensor if tensor is not None and _has_memory(tensor) else None


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((t for t in map(first_tensor, value) if t is not None), None)


def remade(value: Any, items: list[Any]) -> Any:
    """Other items in the class of a list or a tuple; a named tuple takes them one by one."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and transformers' outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def takes_hooks(module: nn.Module | None) -> bool:
    """Whether hooks can be added: torch.jit's modules call none, and a container may hold None."""
    return module is not None and not isinstance(module, torch.jit.ScriptModule)


def _key(tensor: Tensor) -> tuple[object, ...]:
    if not _has_memory(tensor):
        return (id(tensor),)
    # Inference tensors have no version counter; in-place changes show in their sum.
    version = float(tensor.sum()) if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version)


def _has_memory(tensor: Tensor) -> bool:
    """Whether it is numbers at an address, as opposed to a sparse or nested tensor or a wrapper."""
    return is_dense(tensor) and not _is_wrapped(tensor)


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform such as torch.func.vmap runs on it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
