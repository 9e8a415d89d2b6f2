"""The config and quantizer classes by which stock transformers loads and saves factored models.

A factored model is declared as quantized with "lowrank". While transformers builds the model on the
meta device, the dense layers named in `config.json` are swapped for empty factored ones, whose
parameter names match the files; transformers handles shards, dtype and device_map.

Only this file imports transformers at module level; see `registration.py`.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import LowrankError, listed
from ..plans.report import Report
from ..walk.checks import method_of, sub_configs
from ..walk.surgery import factored, modules_of, swap
from .card import REMOTE_FILE
from .containers import are_joined, declared_containers, hold_apart
from .flattening import Codes, Placeholders, check_codes, codes_of, flat
from .import_hooks import VERBS, install
from .merging import densify
from .older_transformers import Wanted, cast_to, check_shapes, wanted_of
from .specs import (
    VERSION,
    Spec,
    check_found,
    check_specs,
    check_values,
    check_version,
    guards,
    never_drawn,
    prepare,
    specs_of,
    stands_for,
)
from .ties import share_buffers, untie

SOURCE = "config.json: quantization_config"
SIZES = frozenset({"ratio", "rank", "rank_pattern"})  # one of them says how small

LEAVES_DTYPES = not hasattr(HfQuantizer, "get_new_dtype")  # before transformers 5.21

logger = logging.getLogger(__name__)


class LowRankConfig(QuantizationConfigMixin):
    """`config.json["quantization_config"]` of a factored model.

    Or what is asked of a dense one, to be compressed as it is loaded:
    `from_pretrained(…, quantization_config=LowRankConfig(ratio=0.6))`.

    Args:
        modules: full module name -> spec that rebuilds the factored module, empty.
        version: format version.
        quantized: name of a weight -> how to put it together of its parts in the files, of what
            torchao quantized since (see flattening.py).
        lowrank: provenance for human readers: library version, what was asked for.
        ratio: the share of the targets to keep; the dense model is compressed once its weights are
            there, and `model.hf_quantizer.report` says what became of it.
        asked: other arguments of `lowrank.compress`, such as `data`, `effort`, or `rank` instead of
            a ratio.
    """

    def __init__(
        self,
        modules: dict[str, Spec] | None = None,
        version: int = VERSION,
        lowrank: dict[str, Any] | None = None,
        quant_method: str = "lowrank",
        *,
        quantized: Codes | None = None,
        ratio: float | None = None,
        **asked: Any,
    ) -> None:
        wanted = {**({} if ratio is None else {"ratio": ratio}), **asked}
        if wanted and not wanted.keys() & SIZES:
            raise LowrankError(
                f"{SOURCE}: unknown entries {listed(sorted(wanted))}, perhaps written by a newer "
                f"version of lowrank"
            )
        self._asked = wanted
        self.quant_method = quant_method
        self.version = version
        self.modules = {} if modules is None else modules
        self.lowrank = {} if lowrank is None else lowrank
        self.quantized = {} if quantized is None else quantized

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-serialisable values; empty entries are left out."""
        held = {key: value for key, value in vars(self).items() if key != "_asked" and value != {}}
        return copy.deepcopy(held)

    def asked(self) -> dict[str, Any]:
        """The arguments of `lowrank.compress` for a dense model; none of a factored one."""
        return dict(self._asked)


class LowRankHfQuantizer(HfQuantizer):
    """Swaps modules before weights load. All weights are trainable but what torchao quantized."""

    requires_calibration = False
    quantization_config: LowRankConfig
    state: dict[str, Any] | None = None  # given to save_pretrained, such as FSDP's gathered one
    loading: nn.Module | None = None  # the model whose weights are being loaded
    wanted: dict[str, Wanted] | None = None  # of each parameter, while it is loaded
    report: Report | None = None  # of the compression, for the model card
    placeholders: Placeholders | None = None  # of quantized weights, while it is loaded
    left_out = False  # rules that join tensors of the original checkpoints

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # Otherwise Trainer refuses a "purely quantized" model without adapters.
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the config; called before the model is built.

        Raises:
            LowrankError: the format version is unknown, or this is not a saved factored model.
        """
        config = self.quantization_config
        if not self.pre_quantized:
            if config.asked():
                return
            raise LowrankError(
                "a LowRankConfig without a size only says how a factored model was saved: to "
                "compress the dense model as it is loaded, give it a ratio, as in "
                "LowRankConfig(ratio=0.6)"
            )
        check_version(config.version, SOURCE)
        check_specs(config.modules, SOURCE)
        check_codes(config.quantized, SOURCE)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            return
        self.loading = model
        check_version(config.version, SOURCE)
        specs, saved_as = check_specs(config.modules, SOURCE), config.lowrank.get("saved_as")
        names = {name: specs[name] for name in declared_containers(specs)}
        hold_apart(model, _renamed(model, names, saved_as), SOURCE)
        rest = {name: spec for name, spec in specs.items() if name not in names}
        specs = _renamed(model, rest, saved_as)
        specs = _with_heads(model, specs)
        swap(model, prepare(model, specs, SOURCE))
        never_drawn(model)
        codes = _codes_renamed(model, check_codes(config.quantized, SOURCE), saved_as)
        self.placeholders = Placeholders(model, codes, SOURCE)
        untie(model, factored(model), codes)
        _ignore_guards(model, codes)
        self.wanted = wanted_of(model)

    def update_weight_conversions(self, weight_conversions: Any, *model: nn.Module) -> Any:
        """Without the rules that join or turn tensors, if the files have the model's own names."""
        rules = super().update_weight_conversions(weight_conversions, *model)
        loading = model[0] if model else self.loading  # not said before transformers 5.21
        if loading is None or not are_joined(loading, rules):
            return rules
        self.left_out = True
        return [rule for rule in rules if not isinstance(rule, WeightConverter)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            return _compressed(model, self.quantization_config.asked())
        self.loading = None
        if self.left_out:  # what was used says nothing of how to save it once it is dense again
            vars(model).pop("_weight_conversions", None)
        check_found(model, "the weights")
        if self.placeholders is not None:
            self.placeholders.release()
            self.placeholders = None
        if self.wanted:
            check_shapes(model, self.wanted, "the weights")
            if LEAVES_DTYPES:
                kept: Any = model._get_dtype_plan(torch.float16)  # type: ignore[operator]
                cast_to(model, self.wanted, kept)
            self.wanted = None
        share_buffers(model)
        check_values(model, "the weights")
        # The weights are ordinary floating-point: half(), float() and Trainer work as usual.
        # transformers' models also branch on this config entry, and would otherwise compute in
        # another order than before saving.
        model.is_quantized = False  # type: ignore[assignment]
        for module in model.modules():
            getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)
        _drop_auto_map(model.config)
        for config in sub_configs(model.config):
            if method_of(config) == "lowrank":  # for those who load this part alone
                del config.quantization_config
        self._refresh(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model, dtype=dtype)

    def get_state_dict_and_metadata(
        self, model: nn.Module, *_: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors to save, with guards; the config is updated, since ranks may have changed."""
        self._refresh(model)
        state = model.state_dict() if self.state is None else self.state
        codes = self.quantization_config.quantized
        parts = flat(state)
        return {**guards(model, parts, codes), **parts}, {}

    def _refresh(self, model: nn.Module) -> None:
        """Update the config to the modules that the model holds now."""
        self.quantization_config.modules = specs_of(model)
        self.quantization_config.quantized = codes_of(model)
        if self.quantization_config.modules:
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        else:
            self.remove_quantization_config(model)


def _compressed(model: Any, asked: dict[str, Any]) -> nn.Module:
    """A dense model that was just loaded, compressed; it declares its factored modules itself."""
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("quantization_method", None)
    small: Any
    small, _ = VERBS["compress"](model, **asked)
    return cast(nn.Module, small)


def _ignore_guards(model: nn.Module, quantized: Iterable[str]) -> None:
    """Let transformers pass over the guards of factored modules in silence."""
    names = stands_for(model, quantized)
    known: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    # Keys in the file may have lost or gained the prefix of the base model.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ours = {rf"(^|\.){re.escape(name.removeprefix(prefix))}$" for name in names}
    model._keys_to_ignore_on_load_unexpected = {*known, *ours}  # type: ignore[assignment]


def _drop_auto_map(config: Any) -> None:
    """Remove our trust_remote_code entries, which hold only for the folder they were saved in."""
    entries = getattr(config, "auto_map", None)
    if isinstance(entries, dict):
        stem = f"{REMOTE_FILE.removesuffix('.py')}."
        kept = {k: v for k, v in entries.items() if not str(v).split("--")[-1].startswith(stem)}
        config.auto_map = kept
        if not kept:
            del config.auto_map


def _renamed(model: nn.Module, specs: dict[str, Spec], saved_as: Any) -> dict[str, Spec]:
    """Specs under the module names of `model`, which may be another class than was saved.

    transformers loads a model with a head into its base model, and vice versa, or one part of a
    model of several: names then lose or gain the base-model prefix, and factored layers of an
    absent part are dropped, as their weights are.

    Args:
        saved_as: name of the saved class.
    """
    settled, left = _settled(model, specs, saved_as)
    if left:
        logger.warning(
            "%s has no %s: these factored layers of the saved %s are not loaded",
            type(model).__name__,
            listed(left),
            saved_as,
        )
    return settled


def _codes_renamed(model: nn.Module, codes: Codes, saved_as: Any) -> Codes:
    """Entries of quantized weights under their names in `model`; those of an absent part are left
    out, as its factored layers are."""
    layers: dict[str, Spec] = {}
    for name, entry in codes.items():
        path, _, leaf = name.rpartition(".")
        layers.setdefault(path, {})[leaf] = entry
    settled = _settled(model, layers, saved_as)[0]
    return {
        f"{path}.{leaf}" if path else leaf: entry
        for path, held in settled.items()
        for leaf, entry in held.items()
    }


def _settled(
    model: nn.Module, specs: dict[str, Spec], saved_as: Any
) -> tuple[dict[str, Spec], list[str]]:
    """Specs under the names of `model`, and the names that it lacks."""
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    present |= {name for name, parameter in model.named_parameters() if parameter.ndim > 2}
    prefix = getattr(model, "base_model_prefix", "")
    if type(model).__name__ == saved_as:
        return specs, []
    settled: dict[str, Spec] = {}
    left: list[str] = []
    changes = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]

    def renamed(name: str) -> str | None:
        name = rename_source_key(f"{name}.weight", changes, [])[0].removesuffix(".weight")
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if prefix else (name,)
        return next((candidate for candidate in names if candidate in present), None)

    for name, spec in specs.items():
        candidate = renamed(name)
        if candidate is not None:
            shared = spec.get("shared")
            named = {"shared": renamed(shared) or shared} if isinstance(shared, str) else {}
            settled[candidate] = {**spec, **named}
        elif prefix and name.startswith(f"{prefix}."):
            settled[name] = spec  # part of the base model, so prepare() will report it as missing
        else:
            left.append(name)
    return settled, left


def _with_heads(model: nn.Module, specs: dict[str, Spec]) -> dict[str, Spec]:
    """Specs plus heads that this class ties to a factored embedding but the saved class lacked."""
    modules = dict(modules_of(model))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    heads: dict[str, Spec] = {}
    for target, source in tied.items():
        name, owner = target.rpartition(".")[0], source.rpartition(".")[0]
        head = modules.get(name)
        if specs.get(owner, {}).get("type") != "LowRankEmbedding" or name in specs:
            continue
        if isinstance(head, nn.Linear):
            sizes = {key: specs[owner][key] for key in ("num_embeddings", "embedding_dim", "rank")}
            bias = {"bias": head.bias is not None}
            heads[name] = {"type": "TiedHead", **sizes, **bias, "shared": owner}
    return {**specs, **heads}


install()  # where importing this file is what imported transformers' quantizers
