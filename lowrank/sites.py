"""The walk: find the weights that may be factored, select by pattern, replace.

Patterns have peft's meaning: a list holds names or their endings, a string is a regular expression
for the full name (or one name), "all-linear" means every linear layer but the output head.
No architecture is named here: everything is read from the modules themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as changed

from torch import Tensor, nn

from . import layouts
from .errors import LowrankError, listed
from .nn import is_factored, remember_layout
from .types import Site

ALL_LINEAR = "all-linear"
Patterns = str | Sequence[str]


def find(model: nn.Module) -> list[Site]:
    """Every weight of a known kind, in the model's own order; tied weights are one site.

    A site that cannot be factored carries its reason. Layers inside factored modules are not
    walked: they are the result of an earlier compression.
    """
    modules: dict[int, nn.Module] = {}
    names: dict[int, list[str]] = {}
    for name, module in _walk(model):
        modules[id(module)] = module
        names.setdefault(id(module), []).append(name)
    holders = _holders(model)
    sites: list[Site] = []
    done: set[int] = set()
    for key, module in modules.items():
        if layouts.kind(module) is None or key in done:
            continue
        reason = layouts.obstacle(module)
        tied = [key]
        if not reason:
            users = holders[_address(module.weight)]  # type: ignore[arg-type]
            tied = [id(user) for user in users if id(user) in modules and layouts.kind(user)]
            reason = _tie_obstacle(module, users)
        done.update(tied)
        every = tuple(name for user in tied for name in names.get(user, []))
        sites.append(_site(tuple(modules[user] for user in tied), every, reason))
    return sites


def select(
    sites: Sequence[Site],
    model: nn.Module,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
) -> list[Site]:
    """The sites that the patterns name; the others carry the reason why they are left.

    Raises:
        LowrankError: a pattern matches no site; what was there is listed.
    """
    head = _output_head(model)
    for patterns in (target_modules, exclude_modules):
        if patterns is not None:
            _check_patterns(patterns, sites)
    chosen = []
    for site in sites:
        reason = site.reason
        if target_modules == ALL_LINEAR:
            if not reason and any(module is head for module in site.modules):
                reason = "the output head: name it in target_modules to compress it"
        elif not reason and not any(_matches(target_modules, name) for name in site.names):
            reason = "not in target_modules"
        if exclude_modules is not None and any(_matches(exclude_modules, n) for n in site.names):
            reason = reason or "in exclude_modules"
        chosen.append(changed(site, reason=reason))
    return chosen


def pattern_value(patterns: Mapping[str, object], names: Iterable[str]) -> str | None:
    """The first key that names one of `names`: a full name, its ending, or a regular expression."""
    every = list(names)
    for key in patterns:
        if any(re.match(rf"(.*\.)?({_compiled(key).pattern})$", name) for name in every):
            return key
    return None


def check_rank_pattern(patterns: Mapping[str, object], sites: Sequence[Site]) -> None:
    """Raises LowrankError when a key names no site; what was there is listed."""
    for key in patterns:
        if not any(pattern_value({key: 0}, site.names) for site in sites):
            raise _nothing("rank_pattern", key, sites)


def replace(model: nn.Module, site: Site, new: nn.Module) -> nn.Module:
    """Put `new` at every name of the site; returns the model, or `new` if the site is the root.

    The training flag and `requires_grad` of the replaced layer are kept.
    """
    old = site.module
    new.train(old.training)
    remember_layout(new, layouts.layout(old))
    weight, bias = layouts.matrix(old), layouts.bias(old)
    for name, parameter in new.named_parameters():
        source = bias if name.endswith("bias") and bias is not None else weight
        parameter.requires_grad_(source.requires_grad)
    root = model
    for name in site.names:
        if name == "":
            root = new
            continue
        parent_name, _, child = name.rpartition(".")
        model.get_submodule(parent_name).register_module(child, new)
    return root


def _walk(model: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Like named_modules with every name of a shared module, but not into factored modules."""
    yield prefix, model
    if is_factored(model):
        return
    for name, child in model._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}.{name}" if prefix else name)


def _address(tensor: Tensor) -> tuple[object, ...]:
    """Equal for parameters that are one object or lie on the same memory in the same way."""
    if tensor.is_meta:
        return (id(tensor),)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape))


def _holders(model: nn.Module) -> dict[tuple[object, ...], list[nn.Module]]:
    """Which modules hold each parameter, each module once."""
    found: dict[tuple[object, ...], list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users = found.setdefault(_address(parameter), [])
                if not any(user is module for user in users):
                    users.append(module)
    return found


def _tie_obstacle(module: nn.Module, users: Sequence[nn.Module]) -> str:
    """Why a weight that several modules hold cannot be factored; "" if it can."""
    for user in users:
        if user is module:
            continue
        if layouts.kind(user) is None:
            return f"its weight is tied to an {type(user).__name__}"
        if layouts.obstacle(user):
            return f"its weight is tied to a layer of which {layouts.obstacle(user)}"
        if type(user) is not type(module):
            return "its weight is tied to a layer that stores it the other way round"
        if layouts.bias(user) is not layouts.bias(module):
            return "its weight is tied to a layer with another bias"
    return ""


def _site(modules: tuple[nn.Module, ...], names: tuple[str, ...], reason: str) -> Site:
    weight = layouts.matrix(modules[0])
    shape = (weight.shape[0], weight.shape[-1])
    kind = layouts.kind(modules[0]) or ""
    return Site(names[0], names, kind, modules, shape, layouts.dense_cost(modules[0]), reason)


def _output_head(model: nn.Module) -> nn.Module | None:
    accessor = getattr(model, "get_output_embeddings", None)
    return accessor() if callable(accessor) else None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LowrankError(f"{pattern!r} is no regular expression: {error}") from error


def _matches(patterns: Patterns, name: str) -> bool:
    if isinstance(patterns, str):
        return bool(_compiled(patterns).fullmatch(name)) or _is_ending(patterns, name)
    return any(_is_ending(pattern, name) for pattern in patterns)


def _is_ending(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _check_patterns(patterns: Patterns, sites: Sequence[Site]) -> None:
    if patterns == ALL_LINEAR:
        return
    every: Sequence[str] = [patterns] if isinstance(patterns, str) else patterns
    if not every:
        raise LowrankError("target_modules is empty: name at least one module, or 'all-linear'")
    for pattern in every:
        one: Patterns = pattern if isinstance(patterns, str) else [pattern]
        if not any(_matches(one, name) for site in sites for name in site.names):
            raise _nothing("pattern", pattern, sites)


def _nothing(what: str, pattern: str, sites: Sequence[Site]) -> LowrankError:
    there = sorted({name.rpartition(".")[2] for site in sites for name in site.names} - {""})
    full = [name for site in sites for name in site.names if name]
    return LowrankError(
        f"{what} {pattern!r} matches none of {len(sites)} layers; "
        f"their last names: {listed(there) or 'none (the root is the layer)'}; "
        f"such as: {listed(full, 3) or '(root)'}"
    )
