"""Whether a model can be compressed, and how it is entered: asked before anything looks inside.

Adapters of other libraries (LoRA and its kin) are found by how they are built, quantized models by
what their configs say; transformers is not imported for that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import LowrankError, listed
from .quantized import is_dequantised

# Names of an adapter's own parts: lora_A and lora_embedding_B of peft, lora_a of torchtune.
PART = re.compile(r"lora_\w+", re.IGNORECASE)
# A layer that is trained beside the adapters, as peft holds it (modules_to_save).
COPIES = ("original_module", "modules_to_save")


def check_module(model: Any) -> None:
    """Raises LowrankError unless it is a module; one that holds it, a pipeline say, is told so."""
    if isinstance(model, nn.Module):
        return
    inner = isinstance(getattr(model, "model", None), nn.Module)
    hint = ": pass its .model" if inner else ""
    raise LowrankError(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """A context, or a decorator, that leaves torch.inference_mode.

    What is made in that mode can never be trained: factors, which stay with the model, must not be.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            yield
    else:
        yield


def check_model(model: Any) -> None:
    """Raises LowrankError unless it is a module with materialised, unquantized weights, and
    without adapters."""
    check_module(model)
    check_no_adapters(model)
    check_shaped(model)
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise LowrankError(
            f"{len(meta)} parameters are on the meta device ({listed(meta, 3)}): "
            "load the weights first, without offloading"
        )
    frozen = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if frozen:
        raise LowrankError(
            f"{len(frozen)} parameters were made in torch.inference_mode, where nothing can be "
            f"trained ({listed(frozen, 3)}): load the model outside of it"
        )
    kind = mark_of(model)
    if kind is not None and not is_dequantised(model):
        raise LowrankError(
            f"the model is quantized ({kind}): compress the model first and quantize the result"
        )


def check_shaped(model: nn.Module) -> None:
    """Raises LowrankError for parameters of lazy layers that have not run yet."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise LowrankError(
            f"{len(lazy)} parameters have no shape yet ({listed(lazy, 3)}): "
            "run the model once on an example"
        )


def sub_configs(config: Any) -> list[Any]:
    """The configs inside a transformers config, such as those of text and vision."""
    parts = [part for part in vars(config).values() if isinstance(part, _configs())]
    return [one for part in parts for one in (part, *sub_configs(part))]


def _configs() -> Any:
    return sys.modules["transformers.configuration_utils"].PreTrainedConfig


def declaration_in(config: object) -> Any:
    """The quantization_config, an object or a dict; None without one."""
    return getattr(config, "quantization_config", None)


def method_of(config: object) -> str | None:
    """The quantization method that a config names; None without one, "unknown" without a name."""
    given = declaration_in(config)
    if given is None:
        return None
    method = (
        given.get("quant_method")
        if isinstance(given, dict)
        else getattr(given, "quant_method", None)
    )
    return str(getattr(method, "value", method)) if method is not None else "unknown"


def mark_of(module: nn.Module) -> str | None:
    """The quantization method of another library that a module is marked with; None without.

    The mark may outlive the codes: see `is_dequantised`.
    """
    for holder in (getattr(module, "config", None), getattr(module, "hf_quantizer", None)):
        method = method_of(holder)
        if method not in ("lowrank", None):
            return method
    return None


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the modules that hold an adapter, merged for the time being or not."""
    return [name or "(root)" for name, module in model.named_modules() if _is_adapted(module)]


def _is_adapted(module: nn.Module) -> bool:
    parts = {**module._modules, **module._parameters}
    own = any(PART.fullmatch(key) and not _is_empty(part) for key, part in parts.items())
    active = "base_layer" in parts and bool(getattr(module, "active_adapters", ()))
    return own or active or all(key in parts for key in COPIES)


def _is_empty(part: object) -> bool:
    """Whether it is absent, or a dict of adapters without any."""
    dicts = (nn.ModuleDict, nn.ParameterDict)
    return part is None or (isinstance(part, dicts) and isinstance(part, Sized) and not len(part))


def check_no_adapters(model: nn.Module) -> None:
    """Raises LowrankError if the model holds adapters: factored, their layer could not take the
    later merge, and they would be factored as if they were weights of the model."""
    adapted = adapted_layers(model)
    if adapted:
        raise LowrankError(
            f"{len(adapted)} layers hold adapters ({listed(adapted, 3)}): merge first (peft: "
            "model = model.merge_and_unload()), or compress first and add adapters to the result"
        )
