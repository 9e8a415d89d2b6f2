"""Weights of several experts in a declaration: split up before the layers in them are replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..nn.expert_weights import ExpertWeights
from ..walk.experts import split
from ..walk.surgery import factored, module_at, modules_of

TYPE = "ExpertWeights"
ENTRIES = frozenset({"type", "experts", "transposed"})


def containers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> spec of the weights of several experts of which some are factored."""
    return {
        name: {"type": TYPE, "experts": len(module), "transposed": module.transposed}
        for name, module in modules_of(model)
        if isinstance(module, ExpertWeights) and not module.is_dense
    }


def declared_containers(specs: Mapping[str, Any]) -> list[str]:
    """The names of such weights among specs."""
    return [name for name, spec in specs.items() if spec.get("type") == TYPE]


def are_joined(model: nn.Module, rules: Sequence[Any]) -> bool:
    """Whether transformers' rules for the files of a model join or turn factored weights."""
    from transformers.core_model_loading import WeightConverter

    names = [*containers_of(model), *(f"{name}.weight" for name in factored(model))]
    joined = [
        p for rule in rules if isinstance(rule, WeightConverter) for p in rule.target_patterns
    ]
    return any(re.search(pattern, name) for pattern in joined for name in names)


def hold_apart(model: nn.Module, specs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Split the weights that specs declare, in place; the other specs are returned.

    Raises:
        LowrankError: the model has no such weight, or with another number of experts.
    """
    for name in declared_containers(specs):
        spec = specs[name]
        parent, _, key = name.rpartition(".")
        transposed, experts = spec.get("transposed"), spec.get("experts")
        if set(spec) != ENTRIES or not isinstance(transposed, bool):
            raise LowrankError(f"{source}: {name}: expected {sorted(ENTRIES)}, got {spec!r:.80}")
        module = module_at(model, parent)
        if isinstance(module._modules.get(key), ExpertWeights):
            continue  # this module has another name too
        weight = module._parameters.get(key)
        if weight is None or weight.ndim != 3 or len(weight) != experts:
            shape = None if weight is None else tuple(weight.shape)
            raise LowrankError(
                f"{source}: {name}: stored as {experts} experts, but {type(module).__name__} has "
                f"{key} of shape {shape}: the architectures differ"
            )
        split(module, {key: transposed})
    return {name: spec for name, spec in specs.items() if spec.get("type") != TYPE}
