"""Weights held as layers, in a declaration: split before the layers in them are replaced.

The fused weights of a mixture's experts, nn.MultiheadAttention, recurrent nets, grouped and
transposed convolutions: the dense model that is built first knows nothing of their layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..nn.children import class_of
from ..nn.expert_weights import ExpertWeights
from ..nn.split_linear import SplitLinear, split_outputs
from ..nn.splits import KINDS, obstacle_to_split, split_module
from ..nn.unfused import Unfused
from ..walk import layouts
from ..walk.experts import split
from ..walk.surgery import factored, module_at, modules_of

EXPERTS = "ExpertWeights"
ENTRIES = frozenset({"type", "experts", "transposed"})
LINEAR = SplitLinear.__name__
TYPES = frozenset({EXPERTS, LINEAR, *(kind.__name__ for kind in KINDS)})


def containers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> spec of what holds several layers of which some are factored."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in modules_of(model):
        if isinstance(module, ExpertWeights) and not module.is_dense:
            sizes = {"experts": len(module), "transposed": module.transposed}
            found[name] = {"type": EXPERTS, **sizes}
        elif isinstance(module, Unfused) and not module.is_dense:
            found[name] = {"type": class_of(module).__name__, **module.spec()}
    return found


def fused_names(model: nn.Module) -> list[str]:
    """The names of the weights in whose places such modules hold layers."""
    names = []
    for name in containers_of(model):
        module = module_at(model, name)
        if isinstance(module, Unfused):
            cuts = {key for key, cut in module.cuts(module).items() if cut.tensor == "weight"}
            held = [key for key in module._parameters if key in cuts]
            names += [f"{name}.{key}" if name else key for key in held]
        else:
            names.append(name)
    return names


def declared_containers(specs: Mapping[str, Any]) -> list[str]:
    """The names of such modules among specs."""
    return [name for name, spec in specs.items() if _is_container(spec)]


def _is_container(spec: Mapping[str, Any]) -> bool:
    kind = spec.get("type")  # of a damaged file anything
    return isinstance(kind, str) and kind in TYPES


def are_joined(model: nn.Module, rules: Sequence[Any]) -> bool:
    """Whether transformers' rules for the files of a model join or turn factored weights."""
    from transformers.core_model_loading import WeightConverter

    names = [*containers_of(model), *(f"{name}.weight" for name in factored(model))]
    joined = [
        p for rule in rules if isinstance(rule, WeightConverter) for p in rule.target_patterns
    ]
    return any(re.search(pattern, name) for pattern in joined for name in names)


def hold_apart(model: nn.Module, specs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Split what specs declare, in place; the other specs are returned.

    Raises:
        LowrankError: the model has no such weight or module, or of another size.
    """
    for name in declared_containers(specs):
        if specs[name]["type"] == EXPERTS:
            _hold_experts_apart(model, name, specs[name], source)
        else:
            _hold_parts_apart(model, name, specs[name], source)
    return {name: spec for name, spec in specs.items() if not _is_container(spec)}


def _hold_experts_apart(model: nn.Module, name: str, spec: dict[str, Any], source: str) -> None:
    parent, _, key = name.rpartition(".")
    transposed, experts = spec.get("transposed"), spec.get("experts")
    if set(spec) != ENTRIES or not isinstance(transposed, bool):
        raise LowrankError(f"{source}: {name}: expected {sorted(ENTRIES)}, got {spec!r:.80}")
    module = module_at(model, parent)
    if isinstance(module._modules.get(key), ExpertWeights):
        return  # this module has another name too
    weight = module._parameters.get(key)
    if weight is None or weight.ndim != 3 or len(weight) != experts:
        shape = None if weight is None else tuple(weight.shape)
        raise LowrankError(
            f"{source}: {name}: stored as {experts} experts, but {type(module).__name__} has "
            f"{key} of shape {shape}: the architectures differ"
        )
    split(module, {key: transposed})


def _hold_parts_apart(model: nn.Module, name: str, spec: dict[str, Any], source: str) -> None:
    module, where = module_at(model, name), name or "(root)"
    if spec["type"] == LINEAR and not isinstance(module, Unfused):
        _check_sizes(module, spec, f"{source}: {where}")
        split_outputs(module, spec["sizes"])
    if not isinstance(module, Unfused):
        reason = obstacle_to_split(module)
        if reason is None:
            raise LowrankError(
                f"{source}: {where}: stored as {spec['type']}, but the model has a "
                f"{type(module).__name__} there: the architectures differ"
            )
        if reason:
            raise LowrankError(f"{source}: {where}: it cannot be split: {reason}")
        split_module(module)
    assert isinstance(module, Unfused)
    here = {"type": type(module).__name__, **module.spec()}
    if here != spec:
        raise LowrankError(
            f"{source}: {where}: stored as {spec!r:.200}, but the model has {here!r:.200}: the "
            "architectures differ"
        )


def _check_sizes(module: nn.Module, spec: dict[str, Any], where: str) -> None:
    """Raises LowrankError unless a linear layer has the outputs that a spec of its parts names."""
    if layouts.kind(module) != "linear":
        raise LowrankError(
            f"{where}: stored as parts of a linear layer, but the model has a "
            f"{type(module).__name__} there: the architectures differ"
        )
    if reason := layouts.obstacle(module):
        raise LowrankError(f"{where}: it cannot be split: {reason}")
    sizes = spec.get("sizes")
    rows = len(layouts.matrix(module))
    listed = sizes if isinstance(sizes, list) else []
    if not all(type(size) is int and size > 0 for size in listed) or sum(listed) != rows:
        raise LowrankError(
            f"{where}: stored as parts of {sizes!r:.80} outputs, but the layer has {rows}: the "
            "architectures differ"
        )
