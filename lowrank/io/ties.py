"""Factors that several modules share, towards files and towards transformers.

In memory the tie is structural: readers hold the owner, which is the factored embedding of a tied
head (nn/tied.py) or the first layer of a shared basis (nn/shared_linear.py). In a spec it is a
name. From transformers, which would tie `lm_head.weight` to `embed_tokens.weight`, neither of which
exists any more, the entries of such pairs are taken out, on the instance. The config keeps saying
tie_word_embeddings=True, for that is what the model does, and some architectures read the flag for
other ends: T5 scales its decoder's output by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..nn import Form

Names = Mapping[str, Form]


class _Kept(dict[str, str]):
    """`_tied_weights_keys` without the factored pairs; marks what is ours to undo."""


def name_owner(name: str, module: Form, modules: Names) -> dict[str, str]:
    """The entry "shared" of a reader's spec; {} for other modules.

    Raises:
        LowrankError: the owner is not in the model.
    """
    owner = module.owner
    if owner is None:
        return {}
    for there, candidate in modules.items():
        if candidate is owner:
            return {"shared": there}
    raise LowrankError(
        f"{name or '(root)'} shares a {module.READS} that is not in this model: "
        f"save the whole model, or merge it first (lowrank.to_dense)"
    )


def bind(built: Names, specs: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Bind the readers among `built` (by name) to the owners that their specs name.

    Raises:
        LowrankError: there is no such owner, or it has other sizes.
    """
    for name, spec in specs.items():
        reader, owner = built[name], spec.get("shared")
        if not reader.READS and "shared" not in spec:
            continue
        if reader.READS and owner not in built:
            raise LowrankError(
                f"{source}: {name} must name the {reader.READS} that it shares, got {owner!r}; "
                f"it is not among the factored modules: save or load the whole model"
            )
        try:
            reader.bind(built.get(str(owner), reader))
        except LowrankError as error:
            raise LowrankError(f"{source}: {name}: {error}") from error


def is_pair(modules: Names, target: str, source: str) -> bool:
    """Whether two names of tied weights stand for one factored table; a bias is a head's own."""
    if not (target.endswith("weight") and source.endswith("weight")):
        return False
    ends = [modules.get(key.rpartition(".")[0]) for key in (target, source)]
    if None in ends:
        return False
    owners = [end.owner or end for end in ends if end is not None]
    return owners[0] is owners[1]


def untie(model: nn.Module, modules: Names) -> None:
    """Take factored pairs out of what transformers ties in `model`; undone by `retie`."""
    _restore(model)  # pairs may have been merged since
    for part, kept in _without_pairs(model, modules):
        vars(part)["_tied_weights_keys"] = kept
    _recompute(model)


def other_ties(model: nn.Module, modules: Names) -> dict[str, str]:
    """What transformers ties in `model` (target -> source), factored pairs left out."""
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


def _without_pairs(model: nn.Module, modules: Names) -> list[tuple[nn.Module, _Kept]]:
    """The parts of a model that tie a factored pair, each with the keys that it keeps."""
    found = []
    for prefix, part in model.named_modules(remove_duplicate=False):
        keys = getattr(part, "_tied_weights_keys", None)
        if not isinstance(keys, dict):
            continue
        start = f"{prefix}." if prefix else ""
        inner = {n.removeprefix(start): m for n, m in modules.items() if n.startswith(start)}
        kept = _Kept({t: s for t, s in keys.items() if not is_pair(inner, t, s)})
        if len(kept) < len(keys):
            found.append((part, kept))
    return found


def retie(model: nn.Module) -> None:
    """What `untie` took out is tied by transformers again: the pairs are dense by now."""
    if _restore(model):
        _recompute(model)


def _restore(model: nn.Module) -> bool:
    """Take away what `untie` wrote; whether there was anything."""
    ours = [m for m in model.modules() if isinstance(vars(m).get("_tied_weights_keys"), _Kept)]
    for part in ours:
        del vars(part)["_tied_weights_keys"]
    return bool(ours)


def _recompute(model: nn.Module) -> None:
    """What `all_tied_weights_keys` says was computed before."""
    for part in model.modules():
        if "all_tied_weights_keys" in vars(part):
            keys = part.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
            part.all_tied_weights_keys = keys
