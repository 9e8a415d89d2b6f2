"""Find, check and swap whole modules by name: what reading and writing have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import LowrankError, listed
from ..nn import Form, Geometry, LowRankEmbedding, build, describe
from ..nn.lowrank_embedding import table_options
from ..walk import layouts
from ..walk.surgery import adopt, factored, modules_of
from . import ties

Spec = dict[str, Any]


def specs_of(model: nn.Module) -> dict[str, Spec]:
    """What rebuilds each factored module empty, by name; readers of a table name it."""
    modules = factored(model)
    return {
        name: {**describe(module), **ties.name_owner(name, module, modules)}
        for name, module in modules.items()
    }


def check_specs(specs: object, source: str) -> dict[str, Spec]:
    """`specs` as a dict from safe names to dicts.

    Raises:
        LowrankError: it is no such dict, or a name is no name of a module; `source` is named.
    """
    if not isinstance(specs, Mapping):
        raise LowrankError(f"{source}: 'modules' must map names to specs, got {specs!r:.80}")
    for name, spec in specs.items():
        if not isinstance(name, str):
            raise LowrankError(f"{source}: a module name must be a string, got {name!r}")
        parts = name.split(".") if name else []
        if any(not part or set(part) & set("/\\\0") for part in parts):
            raise LowrankError(f"{source}: {name!r} is not a module name such as 'encoder.0.fc'")
        if not isinstance(spec, dict):
            raise LowrankError(f"{source}: {name}: expected a spec with a 'type', got {spec!r:.80}")
    return dict(specs)


def prepare(model: nn.Module, specs: Mapping[str, Spec], source: str) -> dict[int, Form]:
    """An empty factored module for the id of each dense layer that `specs` names.

    All checks are here, and nothing is changed: the names exist, the layers are plain ones with
    the sizes of their specs, and two names of one layer agree.

    Raises:
        LowrankError: a check fails; the module is named.
    """
    there = dict(modules_of(model))
    absent = [name for name in specs if name not in there]
    if absent:
        raise LowrankError(
            f"{source} names modules that {type(model).__name__} does not have: {listed(absent)}; "
            f"it has, for example: {listed(_candidates(there), 3)}"
        )
    built: dict[int, Form] = {}
    used: dict[int, str] = {}
    for name, spec in specs.items():
        dense, where = there[name], name or "(root)"
        first = used.setdefault(id(dense), name)
        if first != name:
            if specs[first] != spec:
                raise LowrankError(
                    f"{source}: {first} and {where} are one module, but their specs differ: "
                    f"{specs[first]} and {spec}"
                )
            continue
        empty = build(spec, where)
        _check_fits(dense, empty, spec, where)
        adopt(empty, dense)
        built[id(dense)] = empty
    ties.bind({name: built[id(there[name])] for name in specs}, specs, source)
    return built


def _candidates(there: Mapping[str, nn.Module]) -> list[str]:
    linear = [name for name, module in there.items() if layouts.kind(module)]
    return [name or "(root)" for name in linear or there]


NAMES = {"linear": "a linear layer", "embedding": "an embedding", "conv": "a convolution"}


def _check_fits(dense: nn.Module, form: Form, spec: Spec, where: str) -> None:
    """Raises LowrankError unless `dense` is a plain layer of the sizes and layout in `spec`."""
    wanted = form.KIND
    if layouts.kind(dense) != wanted:
        raise LowrankError(
            f"{where}: expected {NAMES[wanted]} to replace by {spec.get('type')!r}, "
            f"got {type(dense).__name__}"
        )
    reason = layouts.obstacle(dense)
    if reason:
        raise LowrankError(f"{where}: {type(dense).__name__} cannot be replaced: {reason}")
    layout = layouts.layout(dense)
    if spec.get("layout", "linear") != layout:
        raise LowrankError(
            f"{where}: stored for a layer of layout {spec.get('layout', 'linear')!r}, "
            f"but {type(dense).__name__} has layout {layout!r}"
        )
    if wanted == "conv":
        _check_geometry(dense, spec, where)
        return
    rows, columns = layouts.matrix(dense).shape
    stored = (spec.get("out_features"), spec.get("in_features"))
    if "num_embeddings" in spec:
        stored = (spec["num_embeddings"], spec.get("embedding_dim"))
    if stored != (rows, columns):
        raise LowrankError(
            f"{where}: stored as (out, in) = {stored}, but {type(dense).__name__} is "
            f"{(rows, columns)}: this is another architecture"
        )
    if isinstance(form, LowRankEmbedding):
        _check_options(dense, spec, where)


def _check_geometry(dense: nn.Module, spec: Spec, where: str) -> None:
    there = Geometry.of(dense).spec()
    stored = {key: spec.get(key) for key in there}
    if stored != there:
        raise LowrankError(
            f"{where}: stored as {stored}, but {type(dense).__name__} is {there}: this is another "
            "architecture"
        )


def _check_options(dense: nn.Module, spec: Spec, where: str) -> None:
    """A table that pads or pools in another way is another table."""
    sizes = {"type", "num_embeddings", "embedding_dim", "rank", "layout"}
    stored = {key: value for key, value in spec.items() if key not in sizes}
    if stored != table_options(dense):
        raise LowrankError(
            f"{where}: stored with the options {stored}, but {type(dense).__name__} has "
            f"{table_options(dense)}"
        )
