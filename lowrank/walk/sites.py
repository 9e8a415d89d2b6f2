"""Find the weights that may be factored, and select them by pattern.

Patterns work as in peft: a list holds names or their endings, a string is a regular expression for
the full name (or one name), "all-linear" means every linear layer and convolution except the output
head and convolutions that read an image, "all" these and embeddings too.
No architecture is hard-coded: everything is read from the modules themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..nn.table_form import table_options
from ..types import Site
from . import layouts
from .checks import check_no_adapters
from .heads import FEW, last_heads, named_heads
from .surgery import modules_of

ALL_LINEAR = "all-linear"
ALL = "all"
HEAD = "the output head: name it in target_modules to compress it"
NOT_NAMED = "not in target_modules"
Patterns = str | Collection[str]


def find_sites(model: nn.Module) -> list[Site]:
    """Every weight of a known kind, in the model's order; tied weights are one site.

    An embedding and the head tied to it are one site of kind "embedding", whose first module and
    name are the embedding's. A site that cannot be factored has a reason. Layers inside factored
    modules are skipped: they result from an earlier compression.
    """
    modules: dict[int, nn.Module] = {}
    names: dict[int, list[str]] = {}
    for name, module in modules_of(model):
        modules[id(module)] = module
        names.setdefault(id(module), []).append(name)
    held = holders(model)
    sites: list[Site] = []
    visited: set[int] = set()
    for key, module in modules.items():
        if layouts.kind(module) is None or key in visited:
            continue
        users = held.get(address(module.weight), [module])  # type: ignore[arg-type]
        tied = [user for user in users if layouts.kind(user) and id(user) in modules]
        tied.sort(key=lambda user: layouts.kind(user) != "embedding")
        visited.update(map(id, tied))
        all_names = tuple(name for user in tied for name in names[id(user)])
        reason = layouts.obstacle(module) or tie_obstacle(module, held, names)
        sites.append(_site(tuple(tied), all_names, reason))
    return sites


def tied_heads(model: nn.Module, tables: Iterable[Site]) -> dict[str, Site]:
    """The output heads tied to these tables, as sites, by the names of the tables' sites."""
    names: dict[int, list[str]] = {}
    for name, module in modules_of(model):
        names.setdefault(id(module), []).append(name)
    heads = {}
    for site in tables:
        linear = tuple(m for m in site.modules if layouts.kind(m) != "embedding")
        if linear:
            all_names = tuple(name for module in linear for name in names[id(module)])
            heads[site.name] = _site(linear, all_names, "")
    return heads


def select_sites(
    sites: Sequence[Site],
    model: nn.Module,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    *,
    adapts: bool = False,
) -> list[Site]:
    """All sites; those that the patterns do not select get a reason.

    Args:
        adapts: ranks will adapt in training, which finds by itself what a classifier needs: only
            heads of a vocabulary are left out.

    Raises:
        LowrankError: a pattern matches no site (existing names are listed), or the model holds
            adapters.
    """
    check_no_adapters(model)
    word = target_modules.lower() if isinstance(target_modules, str) else ""
    everything = word == ALL_LINEAR
    named = word not in (ALL_LINEAR, ALL)
    if named:
        _check_patterns("target_modules", target_modules, sites)
    if exclude_modules:
        _check_patterns("exclude_modules", exclude_modules, sites)
    heads = named_heads(model) if everything else set()
    if everything and not adapts:
        heads |= _spared(model, sites, heads)
    selected = []
    for site in sites:
        reason = site.reason
        if everything and site.kind == "embedding":
            reason = reason or "an embedding: name it, or target 'all'"
        elif everything and _is_stem(site.module):
            reason = reason or "it reads the few channels of an image: name it to compress it"
        elif any(id(module) in heads for module in site.modules):
            reason = reason or HEAD
        elif named and not any(_matches(target_modules, name) for name in site.names):
            reason = reason or NOT_NAMED
        if exclude_modules and any(_matches(exclude_modules, name) for name in site.names):
            reason = reason or "in exclude_modules"
        selected.append(dataclasses.replace(site, reason=reason))
    return selected


def covers(patterns: Patterns, names: Iterable[str]) -> bool:
    """Whether `target_modules` matches one of these names; "all-linear" and "all" match any."""
    word = patterns.lower() if isinstance(patterns, str) else ""
    return word in (ALL_LINEAR, ALL) or any(_matches(patterns, name) for name in names)


def _spared(model: nn.Module, sites: Sequence[Site], named: set[int]) -> set[int]:
    """Ids of the last layers that are heads; none where nothing else could be compressed."""
    last = {id(module) for site in last_heads(model, sites) for module in site.modules}
    others = (
        site
        for site in sites
        if not site.reason and site.kind != "embedding" and not _is_stem(site.module)
    )
    left = any((last | named).isdisjoint(map(id, site.modules)) for site in others)
    return last if left else set()


def _is_stem(layer: nn.Module) -> bool:
    """Whether a convolution reads an image: few weights, on which all later layers depend."""
    return layouts.kind(layer) == "conv" and int(getattr(layer, "in_channels", 0)) <= FEW


def pattern_value(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first key that matches one of `names`: a name, its ending, or a regular expression."""
    all_names = list(names)
    for key in patterns:
        if any(_compiled(key, r"(.*\.)?({})").fullmatch(name) for name in all_names):
            return key
    return None


def check_rank_pattern(patterns: Mapping[str, object], sites: Sequence[Site]) -> None:
    """Check that every key matches a site that may be factored.

    Raises:
        LowrankError: a key matches no site (existing names are listed), or only sites that stay
            dense (the first one and its reason are given).
    """
    for key in patterns:
        matching = [site for site in sites if pattern_value([key], site.names) is not None]
        if not matching:
            raise _nothing("rank_pattern", key, sites)
        if all(site.reason for site in matching):
            raise LowrankError(
                f"rank_pattern {key!r} matches only layers that stay dense; "
                f"{matching[0].title}: {matching[0].reason}"
            )


def site_of(layer: nn.Module, names: tuple[str, ...]) -> Site:
    """The site of one layer that may be factored, under these names."""
    return _site((layer,), names, "")


def _site(modules: tuple[nn.Module, ...], names: tuple[str, ...], reason: str) -> Site:
    weight = layouts.matrix(modules[0])
    shape = (weight.shape[0], weight.shape[-1])
    kind = layouts.kind(modules[0]) or ""
    return Site(names[0], names, kind, modules, shape, layouts.dense_cost(*modules), reason)


def _compiled(pattern: str, frame: str = "{}") -> re.Pattern[str]:
    try:
        return re.compile(frame.format(pattern))
    except (re.error, TypeError) as error:
        raise LowrankError(f"{pattern!r} is not a regular expression: {error}") from error


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
            f"got {patterns!r:.80}"
        )
    if not every:
        raise LowrankError(f"{what} is empty: name at least one module, or '{ALL_LINEAR}'")
    for pattern in every:
        one: Patterns = pattern if isinstance(patterns, str) else [pattern]
        if not any(_matches(one, name) for site in sites for name in site.names):
            raise _nothing(what, pattern, sites)


def _nothing(what: str, pattern: str, sites: Sequence[Site]) -> LowrankError:
    last_names = sorted({name.rpartition(".")[2] for site in sites for name in site.names} - {""})
    full = [name for site in sites for name in site.names if name]
    return LowrankError(
        f"{what} {pattern!r} matches none of {len(sites)} layers; "
        f"their last names: {listed(last_names) or 'none (the root is the layer)'}; "
        f"for example: {listed(full, 3) or '(root)'}"
    )


def address(tensor: Tensor) -> tuple[object, ...]:
    """A key, equal for parameters that are one object or start at the same address."""
    if tensor.is_meta:
        return (id(tensor),)
    return str(tensor.device), tensor.data_ptr() or id(tensor)  # 0: it is made of other tensors


def _place(tensor: Tensor | None) -> tuple[object, ...] | None:
    return None if tensor is None else address(tensor)


Holders = dict[tuple[object, ...], list[nn.Module]]


def holders(model: nn.Module) -> Holders:
    """The modules that hold each parameter, each module once."""
    by_address: Holders = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel():
                users = by_address.setdefault(address(parameter), [])
                if not any(user is module for user in users):
                    users.append(module)
    return by_address


def tie_obstacle(module: nn.Module, holders: Holders, names: Mapping[int, list[str]]) -> str:
    """Why a layer with a tied weight or bias cannot be factored; "" if it can."""
    weight, bias = layouts.matrix(module), layouts.bias(module)
    tied = holders[address(module.weight)]  # type: ignore[arg-type]  # no view: meta goes by id
    pair = any(map(_is_table, tied))  # modules tied to a table keep their own biases
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
        user_weight = layouts.matrix(user)
        if (user_weight.shape, user_weight.stride()) != (weight.shape, weight.stride()):
            return f"its weight is tied to {where}, which holds it in another shape or order"
        if layouts.layout(user) != layouts.layout(module):
            return f"its weight is tied to {where}, which stores it transposed"
        if not pair and _place(layouts.bias(user)) != _place(bias):
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
