"""Let peft name a layer as it was called before it was factored.

The adapters go to the children that compute: `q_proj` becomes `q_proj.down` and `q_proj.up`. A
`down` that other layers read gets one where all of them are targets, since it changes them all. A
form without such children (BLAST) gets its adapter beside the whole layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LowrankError, listed
from ..nn import Form
from ..nn.expert_weights import ExpertWeights
from ..nn.form import LinearForm
from ..nn.unfused import Unfused
from ..walk.surgery import factored
from .declaration import SAVED_IN

CHILDREN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PATTERNS = ("rank_pattern", "alpha_pattern")
ALL_LINEAR = "all-linear"


def name_children(tuner: Any, model: nn.Module, adapter: str) -> None:
    """Replace targets that are factored modules, in the config of a new adapter, by their children.

    What is excluded by its old name stays out, children included; "all-linear" leaves out factored
    tables and heads, as it does dense ones.

    Args:
        tuner: peft's, which holds the config and knows what it matches.

    Raises:
        LowrankError: a target has no tensors of its own, or the config asks for what would part
            layers that share tensors.
    """
    modules, config = factored(model), tuner.peft_config[adapter]
    if not modules:
        return
    folder = vars(model).get(SAVED_IN)
    if folder is not None and Path(folder).is_dir():
        # peft takes the name that the model was loaded by: there it is dense.
        config.base_model_name_or_path = folder
    _check_copies(config, modules)
    _check_tokens(config, model)
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))  # its defaults
    if str(getattr(config, "target_modules", None)).lower() == ALL_LINEAR:
        _name_linear(config, model, modules)
    split = _experts(config, model)
    found = {key: tuner._check_target_module_exists(config, key) for key, _ in _named(model)}
    fused = {key: m for key, m in _named(model) if found[key] and isinstance(m, Unfused)}
    split |= {
        f"{key}.{n}"
        for key, m in fused.items()
        for n, part in m.named_children()
        if _is_layer(part)
    }
    matched = {key for key, result in found.items() if result and key not in fused} | split
    out = {key for key in modules if _is_excluded(found.get(key))}
    targets = {key for key in matched - modules.keys() if _form_of(key, modules) not in out}
    forms = sorted(modules.keys() & matched)
    if targets == matched and not split:
        return
    parts = _parts(forms, modules)
    for key in (key for key in forms if parts[key] == {key}):
        _put_beside(config, key, modules[key])
    config.target_modules = targets.union(*parts.values())
    for name in PATTERNS if forms else ():
        given = getattr(config, name, None) or {}
        if given:
            setattr(config, name, {rf"({key})(\.\w+)?": value for key, value in given.items()})


def _name_linear(config: Any, model: nn.Module, modules: Mapping[str, Form]) -> None:
    """Write out "all-linear": peft's names, with factored layers in the place of their children."""
    from peft.tuners import tuners_utils

    config.target_modules = ALL_LINEAR  # peft compares it as it is, in places
    named = tuners_utils._maybe_include_all_linear_layers(config, model).target_modules
    heads = [_head(model)]
    if heads == [None] and config.task_type == "SEQ_CLS":
        heads = [getattr(model, name, None) for name in tuners_utils.SEQ_CLS_HEAD_NAMES]
    layers = {
        key
        for key, module in modules.items()
        if isinstance(module, LinearForm) and not any(module is head for head in heads)
    }
    config.target_modules = layers | {key for key in named if not _form_of(key, modules)}


def _head(model: nn.Module) -> nn.Module | None:
    """The output head of a transformers model; None without one."""
    given: Any = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = given() if given else None
    return head


def _experts(config: Any, model: nn.Module) -> set[str]:
    """The layers of experts whose former parameters the config targets, which are then none of its
    parameters any more."""
    names, found = list(getattr(config, "target_parameters", None) or ()), set()
    for key, module in _named(model):
        hit = [name for name in names if _ends(key, [name])]
        if isinstance(module, ExpertWeights) and hit:
            found |= {f"{key}.{index}" for index in module._modules}
            config.target_parameters = [n for n in config.target_parameters if n not in hit]
    if found and not config.target_parameters:
        config.target_parameters = None
    return found


def _parts(forms: Iterable[str], modules: Mapping[str, Form]) -> dict[str, set[str]]:
    """The names that get the adapters of each form.

    Raises:
        LowrankError: it reads the tensors of another module and has none.
    """
    chosen, readers = set(forms), _readers(modules)
    found: dict[str, set[str]] = {}
    for key in chosen:
        module = modules[key]
        names = {n for n, part in module.named_children() if _takes(part)}
        if isinstance(module, LinearForm) and not readers.get(id(module), set()) <= chosen:
            names.discard("down")
        if not names and module.owner is not None:
            raise LowrankError(
                f"{key} is a {type(module).__name__} without tensors of its own: adapt the table "
                "that it reads, by naming that"
            )
        found[key] = {f"{key}.{name}" for name in names} or {key}
    return found


def _readers(modules: Mapping[str, Form]) -> dict[int, set[str]]:
    """Names of the modules that read the tensors of each owner."""
    found: dict[int, set[str]] = {}
    for key, module in modules.items():
        if module.owner is not None:
            found.setdefault(id(module.owner), set()).add(key)
    return found


def _put_beside(config: Any, key: str, module: Form) -> None:
    """Let LoRA take a form without children as it is.

    Raises:
        LowrankError: the adapter is not LoRA, or its start changes the weight, or the form is of a
            convolution: peft builds its adapters of the class that it meets.
    """
    if not isinstance(module, LinearForm):
        raise LowrankError(
            f"{key} is a {type(module).__name__}, which takes no adapters: exclude it, or merge it "
            "first (lowrank.to_dense)"
        )
    start = getattr(config, "init_lora_weights", True)
    if not hasattr(config, "_register_custom_module") or start not in (True, False, "gaussian"):
        got = type(config).__name__ + ("" if start is True else f" that starts by {start!r}")
        raise LowrankError(
            f"{key} is a {type(module).__name__}, which takes adapters of LoRA only, beside its "
            f"weight as it is, got {got}: exclude it, or merge it first (lowrank.to_dense)"
        )
    config._register_custom_module({type(module): _beside})


def _beside(target: Form, *args: Any, **kwargs: Any) -> Any:
    """peft's layer of LoRA around a form."""
    from peft.tuners.lora import Linear

    with warnings.catch_warnings():
        # It knows all that it needs of the layer.
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        layer = Linear(target, *args, **kwargs)
    layer.fan_in_fan_out = target.layout == "conv1d"  # how it is merged once the form is dense
    return layer


def _check_copies(config: Any, modules: Mapping[str, Form]) -> None:
    """Raises LowrankError if `modules_to_save` would copy one of two modules that share tensors."""
    names = list(getattr(config, "modules_to_save", None) or ())
    first = {id(module): key for key, module in reversed(list(modules.items()))}
    for key, module in modules.items() if names else ():
        owner = first.get(id(module.owner))
        if owner is None:
            continue
        copies = [_copied(one, names) for one in (key, owner)]
        if copies[0] != copies[1]:
            raise LowrankError(
                f"modules_to_save would copy one of {key} and {owner}, which share tensors, and "
                "part them: name the layers in target_modules instead, or merge first "
                "(lowrank.to_dense)"
            )


def _copied(key: str, names: list[str]) -> str | None:
    """The outermost module around `key`, or itself, that is copied."""
    steps = key.split(".")
    around = (".".join(steps[: i + 1]) for i in range(len(steps)))
    return next((one for one in around if _ends(one, names)), None)


def _check_tokens(config: Any, model: nn.Module) -> None:
    """Raises LowrankError if single rows of a factored table are to be trained."""
    given = getattr(config, "trainable_token_indices", None)
    tables: dict[str, nn.Module] = {}
    if isinstance(given, dict):
        tables = {k: m for k, m in _named(model) if _ends(k, given)}
    elif given:
        table: Any = getattr(model, "get_input_embeddings", None)
        tables = {"the table": table()} if table else {}
    held = [f"{key} ({type(m).__name__})" for key, m in tables.items() if isinstance(m, Form)]
    if held:
        raise LowrankError(
            f"trainable_token_indices trains single rows, which a factored table does not store: "
            f"got {listed(held)}; name it in target_modules instead, or leave it dense "
            "(exclude_modules)"
        )


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules())


def _ends(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)


def _is_excluded(result: object) -> bool:
    """Whether this is peft's answer for a name that is excluded: falsy, but of a class."""
    return type(result).__name__ == "_ExcludedModule"


def _form_of(key: str, modules: Mapping[str, Form]) -> str:
    """The name of the factored module around a module; "" without one."""
    while key:
        key = key.rpartition(".")[0]
        if key in modules:
            return key
    return ""


def _is_layer(part: nn.Module) -> bool:
    """Whether it is a layer, factored or not."""
    return isinstance(part, Form) or _takes(part)


def _takes(part: nn.Module) -> bool:
    """Whether a child takes an adapter, or has one already."""
    return isinstance(part, CHILDREN) or hasattr(part, "base_layer")
