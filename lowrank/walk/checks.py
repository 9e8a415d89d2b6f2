"""What no verb of the library can work with, said before anything else happens."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import LowrankError, listed


def check_model(model: Any) -> None:
    """Raises LowrankError for what is no module, has no numbers yet, or is quantized."""
    if not isinstance(model, nn.Module):
        raise LowrankError(f"expected a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise LowrankError(
            f"{len(lazy)} parameters have no shape yet ({listed(lazy, 3)}): "
            "run the model once on an example"
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise LowrankError(
            f"{len(meta)} parameters are on the meta device ({listed(meta, 3)}): "
            "load the weights first, without offloading"
        )
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    kind = _kind(stored)
    if kind not in (None, "lowrank"):
        raise LowrankError(
            f"the model is quantized ({kind}): compress the model first and quantize the result"
        )


def _kind(stored: Any) -> str | None:
    """The quant_method in a quantization_config of transformers; "unknown" if it names none."""
    if stored is None:
        return None
    values = stored if isinstance(stored, dict) else vars(stored)
    found = values.get("quant_method")
    return str(getattr(found, "value", found) or "unknown")
