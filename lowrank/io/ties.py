"""Weights that transformers ties: a pair that is factored as one table must not be tied again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .specs import Names


class _OtherTies(dict[str, str]):
    """`_tied_weights_keys` without factored pairs; the type marks what `retie` must undo."""


def is_pair(modules: Names, target: str, source: str) -> bool:
    """Whether two tied weights are one factored table; a head's bias is its own."""
    if not (target.endswith("weight") and source.endswith("weight")):
        return False
    ends = [modules.get(key.rpartition(".")[0]) for key in (target, source)]
    if None in ends:
        return False
    owners = [end.owner or end for end in ends if end is not None]
    return owners[0] is owners[1]


def untie(model: nn.Module, modules: Names, quantized: Collection[str] = ()) -> None:
    """Stop transformers from tying factored pairs in `model`; undone by `retie`.

    Args:
        quantized: names of weights that are no longer tied: quantizing one of a pair gave it
            numbers of its own.
    """
    _restore(model)  # pairs may have been merged since
    for part, kept in _without_pairs(model, modules, quantized):
        vars(part)["_tied_weights_keys"] = kept
    _recompute(model)


def other_ties(model: nn.Module, modules: Names) -> dict[str, str]:
    """The weights that transformers ties in `model` (target -> source), without factored pairs."""
    expand = getattr(model, "get_expanded_tied_weights_keys", None)
    if expand is None:
        return {}
    before = [(part, dict(vars(part))) for part, _ in _without_pairs(model, modules)]
    try:
        for part, kept in _without_pairs(model, modules):
            vars(part)["_tied_weights_keys"] = kept
        return dict(expand(all_submodels=True))
    finally:
        for part, held in before:
            vars(part).pop("_tied_weights_keys", None)
            vars(part).update(held)


def _without_pairs(
    model: nn.Module, modules: Names, quantized: Collection[str] = ()
) -> list[tuple[nn.Module, _OtherTies]]:
    """Submodules that tie a factored or quantized pair, each with the keys that remain."""
    parts = []
    for prefix, part in model.named_modules(remove_duplicate=False):
        keys = getattr(part, "_tied_weights_keys", None)
        if not isinstance(keys, dict):
            continue
        start = f"{prefix}." if prefix else ""
        inner = {n.removeprefix(start): m for n, m in modules.items() if n.startswith(start)}
        apart = {t for t, s in keys.items() if {start + t, start + s} & {*quantized}}
        kept = _OtherTies(
            {t: s for t, s in keys.items() if t not in apart and not is_pair(inner, t, s)}
        )
        if len(kept) < len(keys):
            parts.append((part, kept))
    return parts


def share_buffers(model: nn.Module) -> None:
    """Share the buffers of factored modules in parts that are tied whole: transformers ties only
    parameters, and stores both under the source's name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for target, source in other_ties(model, {}).items():
        (at, _, name), (origin, _, other) = target.rpartition("."), source.rpartition(".")
        here, there = modules[at]._buffers, modules[origin]._buffers
        if name in here and other in there:
            here[name] = there[other]


def retie(model: nn.Module) -> None:
    """Undo `untie`: let transformers tie the pairs again, now that they are dense."""
    if _restore(model):
        _recompute(model)


def _restore(model: nn.Module) -> bool:
    """Remove what `untie` wrote; returns whether there was anything."""
    ours = [m for m in model.modules() if isinstance(vars(m).get("_tied_weights_keys"), _OtherTies)]
    for part in ours:
        del vars(part)["_tied_weights_keys"]
    return bool(ours)


def _recompute(model: nn.Module) -> None:
    """Update `all_tied_weights_keys`, which transformers caches."""
    for part in model.modules():
        if "all_tied_weights_keys" in vars(part):
            keys = part.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
            # transformers takes every tied tensor for a parameter
            own = dict(part.named_parameters(remove_duplicate=False))
            ties: Any = {t: s for t, s in keys.items() if t in own and s in own}
            part.all_tied_weights_keys = ties
