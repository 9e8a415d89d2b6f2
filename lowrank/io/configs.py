"""What configs of transformers say of quantization, without importing transformers."""

from __future__ import annotations

import sys
from typing import Any


def sub_configs(config: Any) -> list[Any]:
    """The configs inside a transformers config, such as those of text and vision."""
    parts = [part for part in vars(config).values() if isinstance(part, _config_class())]
    return [one for part in parts for one in (part, *sub_configs(part))]


def _config_class() -> Any:
    return sys.modules["transformers.configuration_utils"].PreTrainedConfig


def declaration_in(config: object) -> Any:
    """The quantization_config, an object or a dict; None without one."""
    return getattr(config, "quantization_config", None)


def method_of(config: object) -> str | None:
    """Name of the quantization method of a config; None without one, "?" for one without a name."""
    given = declaration_in(config)
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
    return str(getattr(method, "value", method)) if method is not None else "?"
