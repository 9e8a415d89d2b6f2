"""The config and quantizer classes by which stock diffusers loads and saves factored models.

As for transformers (`hf.py`): the model counts as quantized by "lowrank", its dense layers named in
config.json are swapped for empty factored ones before the weights are read.

Only this file imports diffusers at module level; see `registration.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..errors import LowrankError, listed
from ..walk.checks import method_of
from ..walk.surgery import swap
from .containers import declared_containers, hold_apart
from .flattening import codes_of
from .specs import Spec, check_specs, check_version, guards, lengthen, prepare, specs_of

SOURCE = "config.json: quantization_config"


class _Name(StrEnum):
    """diffusers reads the name's `value`."""

    LOWRANK = "lowrank"


class DiffusersConfig(QuantizationConfigMixin):
    """`config.json["quantization_config"]` of a factored model; the fields of `LowRankConfig`."""

    def __init__(
        self, modules: dict[str, Spec] | None = None, version: Any = None, **_: Any
    ) -> None:
        check_version(version, SOURCE)
        self.quant_method = _Name.LOWRANK
        self.version = version
        self.modules = check_specs(modules, SOURCE)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "quant_method": _Name.LOWRANK.value}

    def to_diff_dict(self) -> dict[str, Any]:
        """By which diffusers prints it."""
        return self.to_dict()


class DiffusersLowRank(DiffusersQuantizer):
    """Swaps modules before weights load. Nothing is quantized; all weights are trainable."""

    use_keep_in_fp32_modules = False
    requires_calibration = False
    saved: nn.Module | None = None  # the model that is being saved

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """Without the guards, of which diffusers would warn."""
        modules = self.quantization_config.modules
        ours = {*declared_containers(modules), *(f"{name}.weight" for name in modules)}
        return [key for key in loaded_keys if key not in ours]

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        specs = hold_apart(model, self.quantization_config.modules, SOURCE)
        swap(model, prepare(model, specs, SOURCE))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        lengthen(model)
        model.is_quantized = False  # type: ignore[assignment]  # to() and half() work as usual
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors to save, with guards."""
        assert self.saved is not None
        return {**guards(self.saved, state_dict), **state_dict}, {}


@contextmanager
def declared_to_diffusers(model: Any, version: int) -> Iterator[None]:
    """While diffusers saves it, the model's config names its factored modules.

    Raises:
        LowrankError: it holds factored modules and is quantized by another library, before or
            since.
    """
    before, quantizer = model._internal_dict, vars(model).get("hf_quantizer")
    specs, method = specs_of(model), method_of(SimpleNamespace(**before))
    if method not in ("lowrank", None):
        if specs:
            raise LowrankError(
                f"the model is quantized by {method!r}: dequantize it, compress, then quantize "
                "again"
            )
        yield  # not ours
        return
    if specs and (codes := codes_of(model)):
        raise LowrankError(
            f"{len(codes)} weights are quantized ({listed(codes, 2)}), for which diffusers' files "
            "have no place: write lowrank's own with lowrank.save(model, folder)"
        )
    kept = {key: value for key, value in before.items() if key != "quantization_config"}
    try:
        vars(model).pop("hf_quantizer", None)
        if specs:
            ours = DiffusersLowRank(DiffusersConfig(specs, version), pre_quantized=True)
            ours.saved = model
            model.hf_quantizer = ours
            kept["quantization_config"] = ours.quantization_config.to_dict()
        model._internal_dict = type(before)(kept)
        yield
    finally:
        model._internal_dict = before
        vars(model).pop("hf_quantizer", None)
        if quantizer is not None:
            model.hf_quantizer = quantizer
