"""The walk: find the weights that may be factored, and select them by pattern.

Patterns have peft's meaning: a list holds names or their endings, a string is a regular expression
for the full name (or one name), "all-linear" means every linear layer and convolution but the
output head and convolutions that read an image, "all" these and embeddings too.
No architecture is named here: everything is read from the modules themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import LowrankError, listed
from ..nn.lowrank_embedding import table_options
from ..types import Site
from . import layouts
from .surgery import modules_of

ALL_LINEAR = "all-linear"
ALL = "all"
STEM = 4  # channels of an image at most
Patterns = str | Collection[str]


def find_sites(model: nn.Module) -> list[Site]:
    """Every weight of a known kind, in the model's own order; tied weights are one site.

    An embedding and the head that holds its weight are one site of kind "embedding", whose first
    module and name are the embedding's. A site that cannot be factored carries its reason.
    Layers inside factored modules are not walked: they are the result of an earlier compression.
    """
    modules: dict[int, nn.Module] = {}
    names: dict[int, list[str]] = {}
    for name, module in modules_of(model):
        modules[id(module)] = module
        names.setdefault(id(module), []).append(name)
    held = holders(model)
    sites: list[Site] = []
    done: set[int] = set()
    for key, module in modules.items():
        if layouts.kind(module) is None or key in done:
            continue
        users = held.get(address(module.weight), [module])  # type: ignore[arg-type]
        tied = [user for user in users if layouts.kind(user) and id(user) in modules]
        tied.sort(key=lambda user: layouts.kind(user) != "embedding")
        done.update(map(id, tied))
        every = tuple(name for user in tied for name in names[id(user)])
        reason = layouts.obstacle(module) or tie_obstacle(module, held, names)
        sites.append(_site(tuple(tied), every, reason))
    return sites


def tied_heads(model: nn.Module, tables: Iterable[Site]) -> dict[str, Site]:
    """By the names of tied pairs: the linear layers that multiply by the table, as a site."""
    names: dict[int, list[str]] = {}
    for name, module in modules_of(model):
        names.setdefault(id(module), []).append(name)
    heads = {}
    for site in tables:
        linear = tuple(m for m in site.modules if layouts.kind(m) != "embedding")
        if linear:
            every = tuple(name for module in linear for name in names[id(module)])
            heads[site.name] = _site(linear, every, "")
    return heads


def select_sites(
    sites: Sequence[Site],
    model: nn.Module,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
) -> list[Site]:
    """The sites that the patterns name; the others carry the reason why they are left.

    Raises:
        LowrankError: a pattern matches no site; what was there is listed.
    """
    word = target_modules.lower() if isinstance(target_modules, str) else ""
    everything = word == ALL_LINEAR
    named = word not in (ALL_LINEAR, ALL)
    if named:
        _check_patterns("target_modules", target_modules, sites)
    if exclude_modules:
        _check_patterns("exclude_modules", exclude_modules, sites)
    heads = _output_heads(model) if everything else set()
    chosen = []
    for site in sites:
        reason = site.reason
        if everything and site.kind == "embedding":
            reason = reason or "an embedding: name it, or target 'all'"
        elif everything and site.kind == "conv" and _is_stem(site.module):
            reason = reason or "it reads the few channels of an image: name it to compress it"
        elif any(id(module) in heads for module in site.modules):
            reason = reason or "the output head: name it in target_modules to compress it"
        elif named and not any(_matches(target_modules, name) for name in site.names):
            reason = reason or "not in target_modules"
        if exclude_modules and any(_matches(exclude_modules, name) for name in site.names):
            reason = reason or "in exclude_modules"
        chosen.append(dataclasses.replace(site, reason=reason))
    return chosen


def covers(patterns: Patterns, names: Iterable[str]) -> bool:
    """Whether `target_modules` names one of these; "all-linear" and "all" name everything."""
    word = patterns.lower() if isinstance(patterns, str) else ""
    return word in (ALL_LINEAR, ALL) or any(_matches(patterns, name) for name in names)


def _is_stem(conv: nn.Module) -> bool:
    """Whether a convolution reads pixels: few weights, on which everything after it depends."""
    return int(getattr(conv, "in_channels", 0)) <= STEM


def pattern_value(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first key that names one of `names`: a full name, its ending, or a regular expression."""
    every = list(names)
    for key in patterns:
        if any(_compiled(key, r"(.*\.)?({})").fullmatch(name) for name in every):
            return key
    return None


def check_rank_pattern(patterns: Mapping[str, object], sites: Sequence[Site]) -> None:
    """Every key has to name a site that may be factored.

    Raises:
        LowrankError: a key names no site (what was there is listed), or only sites that stay
            dense (the first one and its reason are named).
    """
    for key in patterns:
        named = [site for site in sites if pattern_value([key], site.names) is not None]
        if not named:
            raise _nothing("rank_pattern", key, sites)
        if all(site.reason for site in named):
            raise LowrankError(
                f"rank_pattern {key!r} names only layers that stay dense; "
                f"{named[0].title}: {named[0].reason}"
            )


def _site(modules: tuple[nn.Module, ...], names: tuple[str, ...], reason: str) -> Site:
    weight = layouts.matrix(modules[0])
    shape = (weight.shape[0], weight.shape[-1])
    kind = layouts.kind(modules[0]) or ""
    return Site(names[0], names, kind, modules, shape, layouts.dense_cost(*modules), reason)


def _output_heads(model: nn.Module) -> set[int]:
    """Ids of what transformers calls output embeddings, also where the model is wrapped."""
    accessors = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return {id(accessor()) for accessor in accessors if callable(accessor)} - {id(None)}


def _compiled(pattern: str, frame: str = "{}") -> re.Pattern[str]:
    try:
        return re.compile(frame.format(pattern))
    except (re.error, TypeError) as error:
        raise LowrankError(f"{pattern!r} is no regular expression: {error}") from error


def _matches(patterns: Patterns, name: str) -> bool:
    if isinstance(patterns, str):
        return bool(_compiled(patterns).fullmatch(name)) or _is_ending(patterns, name)
    return any(_is_ending(pattern, name) for pattern in patterns)


def _is_ending(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _check_patterns(what: str, patterns: Patterns, sites: Sequence[Site]) -> None:
    every: Collection[str] = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(every, Collection) or not all(isinstance(one, str) for one in every):
        raise LowrankError(
            f"{what} must be a name, a regular expression, a list of names or '{ALL_LINEAR}', "
            f"got {patterns!r}"
        )
    if not every:
        raise LowrankError(f"{what} is empty: name at least one module, or '{ALL_LINEAR}'")
    for pattern in every:
        one: Patterns = pattern if isinstance(patterns, str) else [pattern]
        if not any(_matches(one, name) for site in sites for name in site.names):
            raise _nothing(what, pattern, sites)


def _nothing(what: str, pattern: str, sites: Sequence[Site]) -> LowrankError:
    there = sorted({name.rpartition(".")[2] for site in sites for name in site.names} - {""})
    full = [name for site in sites for name in site.names if name]
    return LowrankError(
        f"{what} {pattern!r} matches none of {len(sites)} layers; "
        f"their last names: {listed(there) or 'none (the root is the layer)'}; "
        f"such as: {listed(full, 3) or '(root)'}"
    )


def address(tensor: Tensor) -> tuple[object, ...]:
    """Equal for parameters that are one object, or begin at the same place in memory."""
    return (id(tensor),) if tensor.is_meta else (str(tensor.device), tensor.data_ptr())


Holders = dict[tuple[object, ...], list[nn.Module]]


def holders(model: nn.Module) -> Holders:
    """Which modules hold each parameter, each module once."""
    by_address: Holders = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel():
                users = by_address.setdefault(address(parameter), [])
                if not any(user is module for user in users):
                    users.append(module)
    return by_address


def tie_obstacle(module: nn.Module, holders: Holders, names: Mapping[int, list[str]]) -> str:
    """Why a layer whose weight or bias others hold cannot be factored; "" if it can."""
    weight, bias = layouts.matrix(module), layouts.bias(module)
    tied = holders[address(module.weight)]  # type: ignore[arg-type]  # not a view: meta has ids
    pair = any(map(_is_table, tied))  # readers of a table keep the bias that they have
    for user in tied:
        where = f"{_first(names, user)} ({type(user).__name__})"
        if layouts.kind(user) is None or id(user) not in names:
            return f"its weight is tied to {where}"
        if obstacle := layouts.obstacle(user):
            return f"its weight is tied to {where}: {obstacle}"
        if user is module:
            continue
        if _is_table(user) and _is_table(module) and _options(user) != _options(module):
            return f"its weight is tied to {where}, which has other options"
        other = layouts.matrix(user)
        if (other.shape, other.stride()) != (weight.shape, weight.stride()):
            return f"its weight is tied to {where}, which holds it in another shape or order"
        if layouts.layout(user) != layouts.layout(module):
            return f"its weight is tied to {where}, which stores it the other way round"
        if not pair and layouts.bias(user) is not bias:
            return f"its weight is tied to {where}, which has another bias"
    others = holders.get(address(bias), []) if bias is not None and not pair else []
    others = [user for user in others if user not in tied]
    if others:
        return f"its bias is tied to {_first(names, others[0])} ({type(others[0]).__name__})"
    return ""


def _is_table(module: nn.Module) -> bool:
    return layouts.kind(module) == "embedding"


def _options(table: nn.Module) -> tuple[object, ...]:
    return type(table), table_options(table)


def _first(names: Mapping[int, list[str]], module: nn.Module) -> str:
    return names.get(id(module), ["a factored layer"])[0] or "(root)"


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
    method = values.get("quant_method")
    return str(getattr(method, "value", method) or "unknown")
