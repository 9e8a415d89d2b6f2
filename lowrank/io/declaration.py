"""Declare factored modules in a transformers config, so that stock `save_pretrained` saves it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..nn import is_factored
from ..plans.plan import version
from ..walk.surgery import factored
from .specs import other_ties, retie, specs_of, untie


def attach(model: nn.Module, provenance: dict[str, Any] | None = None) -> bool:
    """Write the factored modules of a transformers model into its config.

    Afterwards stock `save_pretrained` and `from_pretrained` round-trip the model. Call it after
    every in-memory compression; without factored modules it removes earlier entries.

    Args:
        model: any model; only transformers models are changed.
        provenance: JSON-serialisable, stored under "lowrank" in the config for human readers.

    Returns:
        Whether the config now declares factored modules.

    Raises:
        LowrankError: the model is quantized by another library, a factored module has tied
            weights, or `provenance` is not JSON-serialisable. Nothing is then changed.
    """
    if not is_transformers(model):
        return False
    check_attachable(model)
    notes = _notes(model, provenance)
    specs = specs_of(model)
    if not specs:
        detach(model)
        return False
    _forget(model)
    untie(model, factored(model))
    from .hf import LowRankConfig, LowRankHfQuantizer

    config = LowRankConfig(modules=specs, lowrank=notes)
    model.config.quantization_config = config  # type: ignore[union-attr]
    # It updates the config at every save, and provides model.dequantize().
    model.hf_quantizer = LowRankHfQuantizer(config, pre_quantized=True)
    return True


def detach(model: nn.Module) -> None:
    """Remove what `attach` or loading wrote, once a model has no factored modules any more.

    Entries of other quantizers are kept.
    """
    if is_transformers(model):
        retie(model)
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Remove our entries from the config and the model."""
    config = model.config
    if _method(_entry(config)) == "lowrank":
        del config.quantization_config  # type: ignore[union-attr]
    if _method(_entry(getattr(model, "hf_quantizer", None))) == "lowrank":
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)


def check_attachable(model: nn.Module) -> None:
    """Check that a transformers model can declare its factored modules.

    Raises:
        LowrankError: it cannot; see `attach`.
    """
    for name, module in model.named_modules():
        holders = (getattr(module, "config", None), getattr(module, "hf_quantizer", None))
        method = next((m for h in holders if (m := _method(_entry(h))) not in ("lowrank", None)), 0)
        if method:
            raise LowrankError(
                f"{name or type(module).__name__} is already quantized by {method!r}: "
                f"dequantize it, compress, then quantize again"
            )
    names = factored(model)
    for target, source in other_ties(model, names).items():
        for key in (target, source):
            # The bias of a factored head stays tied.
            if key.rpartition(".")[0] in names and not _is_own_bias(names, key):
                raise LowrankError(
                    f"{key.rpartition('.')[0]} is factored, but the config ties {target} to "
                    f"{source}: leave it dense, or set tie_word_embeddings=False in the config"
                )


def _is_own_bias(names: Mapping[str, nn.Module], key: str) -> bool:
    name, _, tensor = key.rpartition(".")
    return tensor in names[name]._parameters


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a transformers PreTrainedModel; does not import transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def is_compressed(model: nn.Module) -> bool:
    return any(is_factored(module) for module in model.modules())


def _notes(model: nn.Module, provenance: dict[str, Any] | None) -> dict[str, Any]:
    """The provenance, merged over that already in the config."""
    entry = _entry(getattr(model, "config", None))
    before = entry.get("lowrank") if isinstance(entry, dict) else getattr(entry, "lowrank", None)
    notes = {**(before or {}), **(provenance or {}), "lowrank_version": version()}
    try:
        json.dumps(notes)
    except (TypeError, ValueError) as error:
        raise LowrankError(f"provenance must be JSON-serialisable: {error}") from error
    return notes


def _entry(config: object) -> Any:
    return getattr(config, "quantization_config", None)


def _method(entry: Any) -> str | None:
    """Name of the quantization method; None without one, "?" for one without a name."""
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry.quant_method
    return str(getattr(method, "value", method)) if method is not None else "?"
