"""Quantized weights in files: as the plain tensors that torchao takes them apart into.

torchao quantizes a layer by putting a tensor of a class of its own in the place of its weight:
codes and scales that count as one tensor. Its functions for safetensors take such a tensor apart
and put it together again. A file then holds `up._weight_qdata` and `up._weight_scale` in the place
of `up.weight`, under torchao's names; how they go together is said beside the specs of the factored
modules, by the weight's name:

    "up.weight": {"type": "Int8Tensor",
                  "options": {"block_size": [1, 64], "dtype": "torch.float32", …},
                  "tensors": {"qdata": ["I8", [96, 64]], "scale": ["F32", [96, 1]], …}}

Files may come from strangers: only classes in torchao's own list are made, from JSON and plain
tensors; nothing is imported by a name in a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..walk.surgery import module_at, plain_name
from .tensors import NAMES, TensorEntry, dtype_name

Codes = dict[str, Any]  # name of a quantized weight -> its entry
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ALONE = "m.w"  # torchao takes state dicts apart; each weight is one of its own, under this name
ENTRIES = frozenset({"type", "options", "tensors"})
LOADED = "_is_hf_initialized"  # by which transformers marks every tensor that it found in a file


def check_storable(model: nn.Module) -> None:
    """Check that what was quantized since can be stored; asked before anything is written.

    Raises:
        LowrankError: a tensor is packed, or of a class that torchao does not know.
    """
    coded = [
        f"{plain_name(key)} ({type(value).__name__})"
        for key, value in model.state_dict(keep_vars=True).items()
        if not key.endswith("_extra_state") and _is_coded(value) and not is_known(value)
    ]
    if coded:
        raise LowrankError(
            f"{len(coded)} tensors are quantized and cannot be stored ({listed(coded, 2)}): "
            "quantize with torchao, whose int8 and other weights are stored; or save the factored "
            "model before it is quantized, and quantize it anew after each loading"
        )


def _is_coded(value: object) -> bool:
    """Whether it is what another library holds in place of a tensor; FSDP's are torch's own."""
    own = type(value).__module__.partition(".")[0] == "torch"
    return not isinstance(value, Tensor) or value.is_quantized or not own


def is_known(value: object) -> bool:
    """Whether it is a tensor of one of the classes that torchao stores in safetensors files."""
    cls = type(value)
    return cls.__module__.startswith("torchao.") and _class_named(cls.__name__) is cls


def codes_of(model: nn.Module) -> Codes:
    """Name -> entry of every weight that torchao quantized."""
    state = model.state_dict(keep_vars=True)
    return {plain_name(n): take_apart(t)[1] for n, t in state.items() if is_known(t)}


def flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the parts of quantized weights in their place; names of one tensor get
    the same parts."""
    apart: dict[int, dict[str, Tensor]] = {}
    found: dict[str, Any] = {}
    for name, value in state.items():
        if not is_known(value):
            found[name] = value
            continue
        if id(value) not in apart:
            apart[id(value)] = take_apart(value)[0]
        found.update({part_name(name, part): t for part, t in apart[id(value)].items()})
    return found


def take_apart(weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The plain tensors of a quantized weight, and the entry that says how they go together."""
    stored, notes = _torchao("support").flatten_tensor_state_dict({ALONE: weight.detach()})
    parts = {name.removeprefix(part_name(ALONE, "")): part for name, part in stored.items()}
    said = json.loads(notes[ALONE])
    kinds = {part: [dtype_name(t.dtype), list(t.shape)] for part, t in parts.items()}
    return parts, {"type": said["_type"], "options": _named(said["_data"]), "tensors": kinds}


def put_together(parts: Mapping[str, Tensor], entry: Mapping[str, Any], where: str) -> nn.Parameter:
    """The quantized weight of these parts, which needs no gradient.

    Raises:
        LowrankError: torchao is not installed, stores no such class, or cannot build it of these.
    """
    kind, options = str(entry["type"]), entry["options"]
    cls = _class_named(kind)
    if cls is None:
        raise LowrankError(
            f"{where}: the installed torchao stores no {kind!r:.80}: update torchao, or save again"
        )
    said = {"_type": kind, "_data": _unnamed(options), "_tensor_data_names": list(parts)}
    notes = {ALONE: json.dumps(said), "tensor_names": json.dumps([ALONE])}
    stored = {part_name(ALONE, part): tensor for part, tensor in parts.items()}
    try:
        weight = _torchao("support").unflatten_tensor_state_dict(stored, notes)[0][ALONE]
    except Exception as error:  # of any kind, for options that were edited
        raise LowrankError(f"{where}: no {kind} can be built: {error}: damaged file") from error
    if not isinstance(weight, Tensor) or type(weight) is not cls or not weight.is_floating_point():
        raise LowrankError(f"{where}: expected a {kind} of numbers, got {_kind_of(weight)}")
    return nn.Parameter(weight, requires_grad=False)


def _kind_of(value: object) -> str:
    return f"{type(value).__name__} {getattr(value, 'dtype', '')}"


def part_name(name: str, part: str) -> str:
    """torchao's name for a part of a weight: "up._weight_scale" for the scale of "up.weight"."""
    module, dot, leaf = name.rpartition(".")
    return f"{module}{dot}_{leaf}_{part}"


def check_codes(codes: object, source: str) -> Codes:
    """Validate the entries of quantized weights, of a file.

    Raises:
        LowrankError: one is not such an entry; `source` is named.
    """
    if not isinstance(codes, Mapping):
        raise LowrankError(f"{source}: 'quantized' must map names to entries, got {codes!r:.80}")
    for name, entry in codes.items():
        where = f"{source}: quantized: {name}"
        if not isinstance(name, str) or not isinstance(entry, dict) or set(entry) != ENTRIES:
            raise LowrankError(f"{where}: expected {sorted(ENTRIES)}, got {entry!r:.80}")
        kind, options, parts = entry["type"], entry["options"], entry["tensors"]
        if not isinstance(kind, str) or not isinstance(options, dict) or not _are_sound(options):
            raise LowrankError(f"{where}: damaged type or options: {kind!r:.40} {options!r:.80}")
        if not isinstance(parts, dict) or not parts or not all(map(_is_kind, parts.values())):
            raise LowrankError(
                f"{where}: 'tensors' must map parts to [dtype, shape]: {parts!r:.80}"
            )
    return dict(codes)


def _is_kind(kind: object) -> bool:
    """Whether it is [dtype, shape] as safetensors says them."""
    match kind:
        case [str(dtype), [*shape]]:
            return dtype in DTYPES and all(type(size) is int and size >= 0 for size in shape)
    return False


def _named(options: Any) -> Any:
    """torchao's options with dtypes as words; transformers rewrites objects called "dtype"."""
    if isinstance(options, list):
        return [_named(each) for each in options]
    if not isinstance(options, dict):
        return options
    if options.get("_type") == "torch.dtype":
        return f"torch.{options['_data']}"
    return {key: _named(value) for key, value in options.items()}


def _unnamed(options: Any) -> Any:
    """The inverse of `_named`; only dtypes of torch are made of words."""
    if isinstance(options, list):
        return [_unnamed(each) for each in options]
    if isinstance(options, str) and options.startswith("torch."):
        return {"_type": "torch.dtype", "_data": options.removeprefix("torch.")}
    if not isinstance(options, dict):
        return options
    return {key: _unnamed(value) for key, value in options.items()}


def _are_sound(options: Any) -> bool:
    """Whether all that is said of torch are dtypes."""
    if isinstance(options, dict):
        return options.get("_type") != "torch.dtype" and all(map(_are_sound, options.values()))
    if isinstance(options, list):
        return all(map(_are_sound, options))
    if not isinstance(options, str) or not options.startswith("torch."):
        return True
    return isinstance(getattr(torch, options.removeprefix("torch."), None), torch.dtype)


def taken_apart(wanted: Mapping[str, TensorEntry], codes: Codes, source: str) -> dict[str, Any]:
    """What a file holds in the place of what a model expects.

    Raises:
        LowrankError: the model has no such weight.
    """
    found = dict(wanted)
    for name, entry in codes.items():
        whole = found.pop(name, None)
        if whole is None or not (whole.parameter and whole.floating):
            raise LowrankError(f"{source}: quantized: {name}: the model has no such weight")
        for part, (dtype, shape) in entry["tensors"].items():
            same = hash((whole.identity, part))  # where two names are of one weight
            floating = DTYPES[dtype].is_floating_point
            found[part_name(name, part)] = TensorEntry(tuple(shape), floating, dtype, identity=same)
    return found


def joined(
    state: Mapping[str, Tensor],
    codes: Codes,
    wanted: Mapping[str, TensorEntry],
    source: str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """A state dict whose quantized weights are whole again; names of one share one parameter.

    Args:
        wanted: what the model expects.
        dtype: that every tensor is asked for in; None: as saved.

    Raises:
        LowrankError: a weight cannot be put together, or not for this dtype or this model.
    """
    found, whole = dict(state), dict[tuple[int, ...], nn.Parameter]()
    for name, entry in codes.items():
        parts = {part: found.pop(part_name(name, part)) for part in entry["tensors"]}
        where, key = f"{source}: {name}", tuple(map(id, parts.values()))
        if key not in whole:
            whole[key] = put_together(parts, entry, where)
        _check_shape(whole[key], wanted[name].shape, where)
        _check_dtypes({whole[key].dtype}, {dtype or whole[key].dtype}, where)
        found[name] = whole[key]
    return found


def _check_shape(weight: Tensor, wanted: tuple[int, ...], where: str) -> None:
    if tuple(weight.shape) != wanted:
        raise LowrankError(f"{where}: quantized as {list(weight.shape)} instead of {list(wanted)}")


def _check_dtypes(made: set[torch.dtype], wanted: set[torch.dtype], where: str) -> None:
    """Raises LowrankError if no dtype that weights were quantized in is wanted."""
    if made and made.isdisjoint(wanted):
        own, asked = (", ".join(sorted(map(str, dtypes))) for dtypes in (made, wanted))
        raise LowrankError(
            f"{where}: quantized in {own}, but asked for in {asked}: load it without a dtype, as "
            f"it was saved, or quantize the model in {asked}"
        )


class Placeholders:
    """Empty tensors in the places of quantized weights, by which a loader finds them in a file.

    While a model is on the meta device, each weight gives way to buffers with the names of its
    parts, which may lie in several files. `release` makes weights of them once they are loaded.
    """

    def __init__(self, model: nn.Module, codes: Codes, source: str) -> None:
        """
        Raises:
            LowrankError: the model has no such weight.
        """
        self._codes, self._source = codes, source
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._modules: dict[str, nn.Module] = {}
        self._dtypes: set[torch.dtype] = set()  # of the weights that the model would have
        owners: dict[tuple[int, str], str] = {}
        for name, entry in codes.items():
            path, _, leaf = name.rpartition(".")
            where = f"{source}: quantized: {name}"
            try:
                module = module_at(model, path)
            except LowrankError as error:
                raise LowrankError(f"{where}: {error}") from error
            if owners.setdefault((id(module), leaf), name) != name:
                continue  # another name of this module
            weight = module._parameters.get(leaf)
            if weight is None or not weight.is_floating_point():
                raise LowrankError(f"{where}: the model has no such weight")
            self._shapes[name], self._modules[name] = tuple(weight.shape), module
            self._dtypes.add(weight.dtype)
            module._parameters[leaf] = None
            vars(module)[leaf] = weight  # no parameter: of a tied bias its shape is asked
            setattr(module, LOADED, True)  # there is no weight to be drawn anew
            for part, (dtype, shape) in entry["tensors"].items():
                empty = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                module.register_buffer(part_name(leaf, part), empty)

    def release(self) -> None:
        """Put the weights together of what was loaded.

        Raises:
            LowrankError: a part is missing, does not fit, or is offloaded; or they were quantized
                in another dtype than that of the model.
        """
        made: set[torch.dtype] = set()
        for name, module in self._modules.items():
            where, leaf = f"{self._source}: {name}", name.rpartition(".")[2]
            hook = getattr(module, "_hf_hook", None)
            if getattr(hook, "offload", False):
                raise LowrankError(
                    f"{where} is quantized and cannot be offloaded: give the whole model devices "
                    "with memory for it (device_map)"
                )
            delattr(module, LOADED)
            vars(module).pop(leaf, None)
            take = partial(_taken, module, leaf)
            parts = {part: take(part, where) for part in self._codes[name]["tensors"]}
            weight = put_together(parts, self._codes[name], where)
            _check_shape(weight, self._shapes[name], where)
            module._parameters[leaf] = weight
            made.add(weight.dtype)
        _check_dtypes(made, self._dtypes, self._source)


def _taken(module: nn.Module, leaf: str, part: str, where: str) -> Tensor:
    """A loaded part, which the module no longer holds."""
    tensor = module._buffers.pop(part_name(leaf, part))
    if tensor is None or not getattr(tensor, LOADED, False):
        raise LowrankError(f"{where}: the files hold no {part}: damaged file")
    return tensor


def _class_named(name: str) -> type | None:
    """The class that torchao stores under a name; None if it stores none."""
    utils = _torchao("utils")
    cls = utils.ALLOWED_CLASSES.get(name) if name in utils.ALLOWED_TENSORS_SUBCLASSES else None
    return cls if isinstance(cls, type) else None


def _torchao(part: str) -> ModuleType:
    """One of torchao's two modules for safetensors.

    Raises:
        LowrankError: it is not installed, or has no such module.
    """
    try:
        from torchao.prototype.safetensors import safetensors_support, safetensors_utils
    except ImportError as error:
        raise LowrankError(
            f"the weights are quantized by torchao, which cannot be imported ({error}): "
            "pip install torchao"
        ) from error
    module: ModuleType = {"support": safetensors_support, "utils": safetensors_utils}[part]
    return module
