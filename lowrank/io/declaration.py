"""Declare factored modules in a transformers config, so that stock `save_pretrained` saves it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..nn import is_factored
from ..plans.plan import version
from ..plans.report import Report
from ..walk.checks import declaration_in, mark_of, method_of, sub_configs
from ..walk.quantized import is_dequantised
from ..walk.surgery import factored
from . import card as cards
from .containers import are_joined
from .flattening import check_storable, codes_of
from .specs import VERSION, specs_of
from .tensors import check_whole
from .ties import other_ties, retie, untie

WEIGHTS, SHARDED = ".safetensors", ".index.json"  # the ends of names, of one file and of shards
SAVED_IN = "_lowrank_saved_in"  # of a model: the folder, of which its adapters are then


def attach(
    model: nn.Module, provenance: dict[str, Any] | None = None, *, report: Report | None = None
) -> bool:
    """Write the factored modules of a transformers model into its config.

    Afterwards stock `save_pretrained` and `from_pretrained` round-trip the model. Call it after
    every in-memory compression; without factored modules it removes earlier entries.

    Args:
        model: any model; only transformers models are changed.
        provenance: JSON-serialisable, stored under "lowrank" in the config for human readers.
        report: of its compression, for the model card: `model.hf_quantizer.report`.

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
    vars(model).pop(SAVED_IN, None)
    if not specs:
        detach(model)
        return False
    if report is None:  # of an earlier call
        report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    _forget(model)
    untie(model, factored(model))
    from .hf import LowRankConfig, LowRankHfQuantizer

    config = LowRankConfig(modules=specs, lowrank=notes)
    model.config.quantization_config = config  # type: ignore[union-attr]
    # It updates the config at every save, and provides model.dequantize().
    quantizer = LowRankHfQuantizer(config, pre_quantized=True)
    quantizer.report = report
    model.hf_quantizer = quantizer
    return True


@contextmanager
def declared(
    model: nn.Module,
    folder: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *_: Any,
    **__: Any,
) -> Iterator[None]:
    """While transformers saves it, the model declares its factored modules; takes the arguments
    of `save_pretrained`.

    Whatever was compressed, the whole, a part or what is around it: what is saved counts. The
    model card and the code for trust_remote_code are written too, and every part of the config
    says it, so that a part can be loaded alone.

    Raises:
        LowrankError: the model cannot declare them; see `attach`; or it was quantized since,
            or is sharded and no gathered `state_dict` is given. Nothing is then written.
    """
    compressed = is_compressed(model)
    adapters_alone = getattr(model, "_hf_peft_config_loaded", False)
    if compressed and not adapters_alone:
        check_storable(model)
        check_whole(model.state_dict() if state_dict is None else state_dict)
    if not is_transformers(model):
        from .diffusers_format import declared_to_diffusers

        with declared_to_diffusers(model, VERSION), superseding(folder, is_main_process):
            yield
        return
    if adapters_alone or not (_is_declared(model) or compressed) or not attach(model):
        yield
        return
    config: Any = model.config
    config.quantization_config.quantized = codes = codes_of(model)
    untie(model, factored(model), codes)
    before = [(part, name, vars(part).get(name)) for part, name in _touched(config)]
    own = config.quantization_config.to_dict()
    quantizer: Any = model.hf_quantizer
    try:
        for part in sub_configs(config):
            part.quantization_config = own
        if is_main_process and not Path(folder).is_file():
            _write_beside(model, Path(folder))
        quantizer.state = state_dict
        with superseding(folder, is_main_process):
            yield
        vars(model)[SAVED_IN] = str(folder)
    finally:
        quantizer.state = None
        for part, name, value in before:
            vars(part).pop(name, None)
            if value is not None:
                vars(part)[name] = value


@contextmanager
def superseding(folder: str | Path, is_main_process: bool = True) -> Iterator[None]:
    """While weights are saved: one file then replaces the shards of an earlier save, and shards
    the one file.

    transformers leaves the one file, or the shards' index, and a loader takes whichever it looks
    for first: the earlier weights.
    """
    before = {path: _stamp(path) for path in Path(folder).glob(f"*{WEIGHTS}*")}
    yield
    for index in list(Path(folder).glob(f"*{WEIGHTS}{SHARDED}")) if is_main_process else ():
        whole = index.with_name(index.name.removesuffix(SHARDED))
        if whole.exists():
            stale = [path for path in (whole, index) if _stamp(path) == before.get(path)]
            if len(stale) == 1:  # else both were written, or neither
                stale[0].unlink()


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def is_converted(model: nn.Module) -> bool:
    """Whether transformers would join tensors of factored layers when it saves them.

    Some checkpoints hold one weight where the model has several layers, such as q, k and v. Their
    factors have ranks of their own and cannot be joined: the model's own names are kept.
    """
    if not is_compressed(model) or not is_transformers(model):
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping

    given = getattr(model, "_weight_conversions", None)
    return are_joined(model, get_model_conversion_mapping(model) if given is None else given)


def _touched(config: Any) -> list[tuple[Any, str]]:
    """What `declared` writes into configs."""
    parts = [(part, "quantization_config") for part in sub_configs(config)]
    return [*parts, (config, "auto_map")]


def _write_beside(model: nn.Module, folder: Path) -> None:
    """The model card, and the code for trust_remote_code, which the config then names."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = cards.auto_classes(model)
    if classes:
        name = type(model).__name__
        (folder / cards.REMOTE_FILE).write_text(cards.remote_code(name), encoding="utf-8")
        given = getattr(model.config, "auto_map", None) or {}
        model.config.auto_map = {**given, **cards.auto_map(name, classes)}  # type: ignore[union-attr]
    cards.write(folder / "README.md", model, classes, None)


def _is_declared(model: nn.Module) -> bool:
    return method_of(model.config) == "lowrank"


def detach(model: nn.Module) -> None:
    """Remove what `attach` or loading wrote, once a model has no factored modules any more.

    Entries of other quantizers are kept, unless nothing is quantized any more.
    """
    if is_transformers(model):
        retie(model)
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Remove our entries from the configs and the model, and marks of what is dequantised."""
    marked = any(map(mark_of, model.modules()))
    stale = marked and is_dequantised(model)
    for part in model.modules() if stale else (model,):
        config = getattr(part, "config", None)
        if method_of(config) == "lowrank" or (stale and method_of(config) is not None):
            del config.quantization_config  # type: ignore[union-attr]
            vars(config).pop("_is_quantized", None)
        method = method_of(getattr(part, "hf_quantizer", None))
        if method == "lowrank" or (stale and method is not None):
            for name in ("hf_quantizer", "quantization_method", "is_quantized"):
                vars(part).pop(name, None)


def check_attachable(model: nn.Module) -> None:
    """Check that a transformers model can declare its factored modules.

    Raises:
        LowrankError: it cannot; see `attach`.
    """
    marked = {name: m for name, module in model.named_modules() if (m := mark_of(module))}
    if marked and not is_dequantised(model):
        name, method = next(iter(marked.items()))
        raise LowrankError(
            f"{name or type(model).__name__} is already quantized by {method!r}: "
            f"dequantize it, compress, then quantize again"
        )
    names = factored(model)
    for target, source in other_ties(model, names).items():
        if _is_one_module(names, target, source):
            continue
        for key in (target, source):
            # The bias of a factored head stays tied.
            if key.rpartition(".")[0] in names and not _is_own_bias(names, key):
                raise LowrankError(
                    f"{key.rpartition('.')[0]} is factored, but the config ties {target} to "
                    f"{source}: leave it dense, or set tie_word_embeddings=False in the config"
                )


def _is_one_module(names: Mapping[str, nn.Module], target: str, source: str) -> bool:
    """Whether a tie is between a factored module's tensor and itself, under two names."""
    ends = [
        (names.get(name), tensor)
        for name, _, tensor in (k.rpartition(".") for k in (target, source))
    ]
    (module, tensor), other = ends
    return module is not None and ends[0] == other and hasattr(module, tensor)


def _is_own_bias(names: Mapping[str, nn.Module], key: str) -> bool:
    name, _, tensor = key.rpartition(".")
    return tensor in names[name]._parameters


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a transformers PreTrainedModel; does not import transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def is_compressed(model: nn.Module) -> bool:
    return any(is_factored(module) for module in model.modules())


def noted(model: nn.Module) -> dict[str, Any]:
    """The provenance in the config of a transformers model; {} of other models."""
    given = declaration_in(getattr(model, "config", None))
    notes = given.get("lowrank") if isinstance(given, dict) else getattr(given, "lowrank", None)
    return notes if isinstance(notes, dict) else {}


def _notes(model: nn.Module, provenance: dict[str, Any] | None) -> dict[str, Any]:
    """The provenance, merged over that already in the config."""
    ours = {"lowrank_version": version(), "saved_as": type(model).__name__}
    notes = {**noted(model), **(provenance or {}), **ours}
    try:
        json.dumps(notes)
    except (TypeError, ValueError) as error:
        raise LowrankError(f"provenance must be JSON-serialisable: {error}") from error
    return notes
