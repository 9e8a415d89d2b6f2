"""Specs of factored modules by name, shared by saving and loading: find, check, build, tie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.observation import inside
from ..errors import LowrankError, listed
from ..nn import Form, Geometry, LowRankEmbedding, RoutedMLP, build, describe, is_factored
from ..nn.table_form import TableForm, table_options
from ..walk import layouts
from ..walk.mlps import check_replaces
from ..walk.surgery import adopt, factored, modules_of
from .containers import containers_of, fused_names
from .flattening import LOADED
from .tensors import TensorEntry, dtype_name

Spec = dict[str, Any]
VERSION = 1  # of the declaration in a config.json
TELLS: ContextVar[bool] = ContextVar("tells", default=False)  # the caller of all that is amiss
SHORT, LONG = torch.int16, torch.int32
Names = Mapping[str, Form]


def specs_of(model: nn.Module) -> dict[str, Spec]:
    """Module name -> spec that rebuilds it empty; modules sharing a table name its owner.

    Raises:
        LowrankError: a factored module holds another, which no spec describes.
    """
    modules = factored(model)
    for name, module in modules.items():
        if any(is_factored(part) for part in module.modules() if part is not module):
            raise LowrankError(
                f"{name or '(root)'} is factored, and so is a layer inside it: merge first "
                "(lowrank.to_dense), or exclude it where it was factored again"
            )
    described = {
        name: {**describe(module), **name_owner(name, module, modules)}
        for name, module in modules.items()
    }
    return {**containers_of(model), **described}


def check_version(version: object, source: str) -> None:
    """Raises LowrankError unless this is the format version that we read."""
    if version != VERSION or isinstance(version, bool):
        raise LowrankError(
            f"{source}: format version {version!r} is unknown, expected {VERSION}: "
            f"update lowrank, or save the model again"
        )


def guards(
    model: nn.Module, state: Mapping[str, Any], quantized: Iterable[str] = ()
) -> dict[str, Tensor]:
    """A tensor of one element under the name of the weight that each factored module stands for.

    Whoever loads the file as a dense model meets it as a weight of another size, and raises, where
    he would else go on with random weights.

    Args:
        state: the tensors saved beside them, whose names are kept free.
        quantized: names of weights that are stored in parts.
    """
    dtypes = [t.dtype for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()]
    dtype = dtypes[0] if dtypes else None
    names = stands_for(model, quantized)
    return {name: torch.zeros(1, dtype=dtype) for name in names if name not in state}


def stands_for(model: nn.Module, quantized: Iterable[str] = ()) -> list[str]:
    """The names of the dense weights in whose places factored modules are, or quantized weights
    outside of them."""
    modules, held = factored(model), list(containers_of(model))
    whole = [n for n in quantized if not any(inside(n, part) for part in (*modules, *held))]
    whole += fused_names(model)
    names = []
    for name, module in modules.items():
        is_part = any(inside(name, container) for container in held)
        if isinstance(module, RoutedMLP):
            continue  # read as a dense model its tensors are one
        if not isinstance(module.owner, LowRankEmbedding) and not is_part:
            names.append(f"{name}.weight" if name else "weight")
    return [*whole, *names]


def check_specs(specs: object, source: str) -> dict[str, Spec]:
    """Validate `specs` as a dict of module names to spec dicts.

    Raises:
        LowrankError: it is not such a dict, or a key is not a module name; `source` is named.
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
        if not isinstance(spec.get("shared", ""), str | None):
            raise LowrankError(
                f"{source}: {name}: 'shared' must be a module's name, got {spec['shared']!r:.80}"
            )
    return dict(specs)


def check_values(model: nn.Module, source: str) -> None:
    """Check what no header says, once the tensors of a model are loaded; `lengthen` them first.

    Raises:
        LowrankError: a parameter is not floating-point, the tensors of a factored module do not go
            together, or an index is out of range.
    """
    lengthen(model)
    bad = [f"{n} {p.dtype}" for n, p in model.named_parameters() if not p.is_floating_point()]
    if bad:
        raise LowrankError(f"{source}: weights are not floating-point: {listed(bad)}: damaged file")
    for name, module in factored(model).items():
        fault = mixed(module, name)
        if not fault and not any(t.is_meta for t in module.state_dict().values()):
            fault = module.fault()
        if fault:
            raise LowrankError(f"{source}: {name or '(root)'}: {fault}: damaged file")


def check_finite(model: nn.Module, source: str) -> None:
    """Raises LowrankError for factors that are not finite. Attention may hide it: its kernels on
    the CPU give finite outputs for queries that are NaN."""
    bad = [
        f"{name}.{key}" if name else key
        for name, module in factored(model).items()
        for key, factor in module.named_parameters()
        if not layouts.sound(factor)
    ]
    if bad:
        raise LowrankError(f"{source}: NaN or Inf in {listed(bad, 3)}: damaged file")


def check_found(model: nn.Module, source: str) -> None:
    """Raises LowrankError for factors that transformers did not find in the files, and drew: it
    only warns. Not where several devices hold the model: accelerate drops the marks."""
    if TELLS.get() or len({*getattr(model, "hf_device_map", {}).values()}) > 1:
        return
    found = {
        f"{name}.{key}" if name else key: getattr(factor, LOADED, False) or factor.is_meta
        for name, form in factored(model).items()
        for key, factor in form.named_parameters()
        if not key.endswith("bias")  # that of a new head is in no file
    }
    lost = [name for name, is_found in found.items() if not is_found]
    if 0 < len(lost) < len(found):  # without any mark they are unknown
        raise LowrankError(f"{source}: the weights do not fit config.json; missing: {listed(lost)}")


def never_drawn(model: nn.Module) -> None:
    """Tell transformers, before it loads a model, not to draw layers without a bias inside of
    factored ones: it would for a model that gives all its own a bias, and fail."""
    for form in factored(model).values():
        for part in form.children():
            if part._parameters.get("bias", part) is None:
                setattr(part, LOADED, True)


def lengthen(model: nn.Module) -> None:
    """Give indices four bytes that a file of an earlier version holds in two."""
    for form in factored(model).values():
        for key in form.LONGER:
            path, _, leaf = key.rpartition(".")
            held = form.get_submodule(path)._buffers
            index = held[leaf]
            if index is not None and index.dtype == SHORT:
                held[leaf] = index.to(LONG)


def as_longer(stored: Mapping[str, TensorEntry], named: Names) -> dict[str, TensorEntry]:
    """The entries of a file with those of two bytes that `lengthen` will give four, as if they had.

    Args:
        named: the factored modules that the file is for.
    """
    keys = {f"{name}.{key}" if name else key for name, form in named.items() for key in form.LONGER}
    return {
        name: replace(entry, dtype=dtype_name(LONG))
        if name in keys and entry.dtype == dtype_name(SHORT)
        else entry
        for name, entry in stored.items()
    }


def mixed(module: Form, name: str) -> str:
    """Which tensors of a factored module have a dtype that does not fit the others; "" if none."""
    held = module.state_dict()
    wanted = build(describe(module), name).state_dict()
    first = next((t.dtype for t in held.values() if t.is_floating_point()), None)
    wrong = [
        f"{key} {held[key].dtype}"
        for key, empty in wanted.items()
        if key in held and held[key].dtype != (first if empty.is_floating_point() else empty.dtype)
    ]
    return f"of another dtype than expected: {listed(wrong)}" if wrong else ""


def prepare(model: nn.Module, specs: Mapping[str, Spec], source: str) -> dict[int, Form]:
    """Empty factored modules, by the id of the dense layer each replaces.

    Runs all checks and changes nothing: the names exist, the layers are plain and have the sizes
    in their specs, and the specs of a layer with two names agree.

    Raises:
        LowrankError: a check fails; the module is named.
    """
    modules = dict(modules_of(model))
    absent = [name for name in specs if name not in modules]
    if absent:
        raise LowrankError(
            f"{source} names modules that {type(model).__name__} does not have: {listed(absent)}; "
            f"it has, for example: {listed(_candidates(modules), 3)}"
        )
    built: dict[int, Form] = {}
    names: dict[int, str] = {}
    for name, spec in specs.items():
        dense, where = modules[name], name or "(root)"
        first = names.setdefault(id(dense), name)
        if first != name:
            if specs[first] != spec:
                raise LowrankError(
                    f"{source}: {first} and {where} are the same module, but their specs differ: "
                    f"{specs[first]} and {spec}"
                )
            continue
        empty = build(spec, where)
        _check_fits(dense, empty, spec, where)
        adopt(empty, dense)
        built[id(dense)] = empty
    bind({name: built[id(modules[name])] for name in specs}, specs, source)
    return built


def _candidates(modules: Mapping[str, nn.Module]) -> list[str]:
    linear = [name for name, module in modules.items() if layouts.kind(module)]
    return [name or "(root)" for name in linear or modules]


NAMES = {"linear": "a linear layer", "embedding": "an embedding", "conv": "a convolution"}


def _check_fits(dense: nn.Module, form: Form, spec: Spec, where: str) -> None:
    """Raises LowrankError unless `dense` is a plain layer with the sizes and layout of `spec`."""
    if isinstance(form, RoutedMLP):
        check_replaces(dense, form, where)
        return
    wanted = form.KIND
    if layouts.kind(dense) != wanted:
        raise LowrankError(
            f"{where}: expected {NAMES[wanted]} to replace with {spec.get('type')!r}, "
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
            f"{(rows, columns)}: the architectures differ"
        )
    if isinstance(form, TableForm):
        _check_options(dense, form, where)


def _check_geometry(dense: nn.Module, spec: Spec, where: str) -> None:
    expected = Geometry.of(dense).spec()
    stored = {key: spec.get(key) for key in expected}
    if stored != expected:
        raise LowrankError(
            f"{where}: stored as {stored}, but {type(dense).__name__} is {expected}: the "
            "architectures differ"
        )


def _check_options(dense: nn.Module, form: TableForm, where: str) -> None:
    """Raises LowrankError if the embedding's options (padding, pooling) differ from the form's."""
    stored = form.options()
    if stored != table_options(dense):
        raise LowrankError(
            f"{where}: stored with options {stored}, but {type(dense).__name__} has "
            f"{table_options(dense)}"
        )


def name_owner(name: str, module: Form, modules: Names) -> dict[str, str]:
    """The "shared" entry in the spec of a module that shares a table; {} for other modules.

    Raises:
        LowrankError: the owner is not in the model.
    """
    owner = module.owner
    if owner is None:
        return {}
    for owner_name, candidate in modules.items():
        if candidate is owner:
            return {"shared": owner_name}
    raise LowrankError(
        f"{name or '(root)'} shares a {module.READS} that is not in this model: "
        f"save the whole model, or merge it first (lowrank.to_dense)"
    )


def bind(built: Names, specs: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Bind modules that share a table or basis to the owners named in their specs.

    Raises:
        LowrankError: the owner is missing, or has other sizes.
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
