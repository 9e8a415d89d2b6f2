"""Layers with adapters of other libraries (LoRA and its kin), found by how they are built."""

from __future__ import annotations

import re
from collections.abc import Sized

from torch import nn

from ..errors import LowrankError, listed

# Names of an adapter's own parts: lora_A and lora_embedding_B of peft, lora_a of torchtune.
PART = re.compile(r"lora_\w+", re.IGNORECASE)
# A layer that is trained beside the adapters, as peft holds it (modules_to_save).
COPIES = ("original_module", "modules_to_save")


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
