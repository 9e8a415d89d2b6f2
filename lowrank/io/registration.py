"""Register "lowrank" checkpoints with transformers and diffusers, without importing either."""

from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType
from typing import Any

from .import_hooks import STEPS
from .import_hooks import VERBS as VERBS
from .import_hooks import install as install

METHOD = "lowrank"
RESIZING = {  # methods of PreTrainedModel, and our functions in resizing.py
    "_resize_token_embeddings": "resize_all",
    "_get_resized_embeddings": "resize_table",
    "_get_resized_lm_head": "resize_head",
}


def _register(auto: ModuleType) -> None:
    """Register both classes; a failure here must not break the import of transformers."""
    ours = sys.modules.get(f"{__package__}.hf")
    if ours is not None and not hasattr(ours, "LowRankHfQuantizer"):
        return  # it is being imported, which led here: it registers at its end
    try:
        from .hf import LowRankConfig, LowRankHfQuantizer

        configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
        for mapping in (configs, quantizers):
            # Ours may be registered from before a reload; the decorators refuse to replace it.
            if METHOD in mapping and mapping[METHOD].__module__ == LowRankConfig.__module__:
                del mapping[METHOD]
        auto.register_quantization_config(METHOD)(LowRankConfig)
        auto.register_quantizer(METHOD)(LowRankHfQuantizer)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        _warn("load lowrank checkpoints", error)


def _register_with_diffusers(auto: ModuleType) -> None:
    """The same for diffusers, whose tables are plain dicts."""
    try:
        from .diffusers_format import DiffusersConfig, DiffusersLowRank

        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DiffusersConfig
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = DiffusersLowRank
    except (ImportError, AttributeError, TypeError) as error:
        _warn("load lowrank checkpoints with diffusers", error)


def _save_declared(modeling: ModuleType) -> None:
    """Let every model of this library declare its factored modules when it is saved."""
    name = "PreTrainedModel" if hasattr(modeling, "PreTrainedModel") else "ModelMixin"
    try:
        base = getattr(modeling, name)
        save = getattr(base.save_pretrained, "_lowrank_wraps", base.save_pretrained)

        @functools.wraps(save)
        def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            from .declaration import declared, is_converted

            if is_converted(self):
                kwargs.setdefault("save_original_format", False)
            with declared(self, save_directory, *args, **kwargs):
                return save(self, save_directory, *args, **kwargs)

        save_pretrained._lowrank_wraps = save  # type: ignore[attr-defined]
        base.save_pretrained = save_pretrained
    except AttributeError as error:
        _warn("save lowrank checkpoints", error)


def _act_on_modeling(modeling: ModuleType) -> None:
    """What transformers' models need: to be saved declared, and tables that can be resized."""
    _save_declared(modeling)
    try:
        base = modeling.PreTrainedModel
        for name, ours in RESIZING.items():
            _resize_factored(base, name, ours)
    except AttributeError as error:
        _warn("resize factored embeddings", error)


def _resize_factored(base: Any, name: str, ours: str) -> None:
    """Let a method of transformers' models that resizes a layer go through ours."""
    resize = getattr(getattr(base, name), "_lowrank_wraps", getattr(base, name))

    @functools.wraps(resize)
    def resized(self: Any, *args: Any, **kwargs: Any) -> Any:
        from . import resizing

        return getattr(resizing, ours)(resize, self, *args, **kwargs)

    resized._lowrank_wraps = resize  # type: ignore[attr-defined]
    setattr(base, name, resized)


def _adapt_factored(tuners: ModuleType) -> None:
    """Let peft's adapters find factored layers by the names of the layers they replaced."""
    try:
        base = tuners.BaseTuner
        inject = getattr(base.inject_adapter, "_lowrank_wraps", base.inject_adapter)

        @functools.wraps(inject)
        def inject_adapter(self: Any, model: Any, adapter_name: str, *rest: Any, **kw: Any) -> Any:
            from .adapters import name_children

            # With a state dict, that names the layers.
            if kw.get("state_dict") is None:
                name_children(self, model, adapter_name)
            return inject(self, model, adapter_name, *rest, **kw)

        inject_adapter._lowrank_wraps = inject  # type: ignore[attr-defined]
        base.inject_adapter = inject_adapter
    except AttributeError as error:
        _warn("add adapters to factored layers by their names", error)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(
        f"lowrank could not register: it will not {what}: {error}",
        stacklevel=3,
    )


STEPS.update(
    {
        "transformers.quantizers.auto": _register,
        "transformers.modeling_utils": _act_on_modeling,
        "diffusers.quantizers.auto": _register_with_diffusers,
        "peft.tuners.tuners_utils": _adapt_factored,
        "diffusers.models.modeling_utils": _save_declared,
    }
)
