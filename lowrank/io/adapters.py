"""Let peft's `target_modules` name a layer as it was called before it was factored.

The adapters go to the children that compute: `q_proj` becomes `q_proj.down` and `q_proj.up`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LowrankError
from ..walk.surgery import factored

CHILDREN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PATTERNS = ("rank_pattern", "alpha_pattern")


def name_children(tuner: Any, model: nn.Module, adapter: str) -> None:
    """Replace targets that are factored modules, in the config of a new adapter, by their children.

    Args:
        tuner: peft's, which holds the config and knows what it matches.

    Raises:
        LowrankError: a target has no tensors of its own.
    """
    modules, config = factored(model), tuner.peft_config[adapter]
    if not modules or config.target_modules == "all-linear":
        return
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))  # its defaults
    keys = [key for key, _ in model.named_modules()]
    matched = [key for key in keys if tuner._check_target_module_exists(config, key)]
    if not any(key in modules for key in matched):
        return
    targets = set(matched) - modules.keys()
    for key in modules.keys() & matched:
        module = modules[key]
        parts = [n for n, part in module.named_children() if _takes(part)]
        if not parts:
            raise LowrankError(
                f"{key} is a {type(module).__name__} without tensors of its own: adapt the table "
                "that it reads, by naming that"
            )
        targets |= {f"{key}.{part}" for part in parts}
    config.target_modules = targets
    for name in PATTERNS:
        given = getattr(config, name, None) or {}
        if given:
            setattr(config, name, {rf"({key})(\.\w+)?": value for key, value in given.items()})


def _takes(part: nn.Module) -> bool:
    """Whether a child takes an adapter, or has one already."""
    return isinstance(part, CHILDREN) or hasattr(part, "base_layer")
