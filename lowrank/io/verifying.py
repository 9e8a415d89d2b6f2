"""Check a saved model without building it: sizes, dtypes, ranges, finite numbers, checksum."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LowrankError, listed
from ..nn import build
from . import tensors
from .checkpoint import CONFIG, INDEX, WEIGHTS, index_of
from .flattening import Codes, check_codes, part_name, put_together
from .specs import Spec, check_specs, lengthen, mixed
from .tensors import TensorEntry


@dataclass(frozen=True)
class Verified:
    """What was checked in a sound folder.

    Attributes:
        dtypes: number of tensors of each dtype, as safetensors calls them.
        modules: factored modules.
        checksum: whether one was saved, and compared.
        quantized: weights that torchao quantized.
    """

    files: int
    tensors: int
    dtypes: Mapping[str, int]
    modules: int
    checksum: bool
    quantized: int = 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        summed = "checksum equal" if self.checksum else "no checksum was saved"
        files = "1 file" if self.files == 1 else f"{self.files} files"
        coded = f", {self.quantized} quantized weights" if self.quantized else ""
        return (
            f"sound: {files}, {self.tensors} tensors ({kinds}), {self.modules} factored modules"
            f"{coded}; "
            f"sizes and dtypes fit, indices in range, all numbers finite, {summed}"
        )


def verify(folder: str | Path) -> Verified:
    """Check a folder that `save` or `save_pretrained` wrote; nothing is changed.

    Raises:
        LowrankError: a file is missing, damaged or does not fit the others, or holds NaN or Inf.
    """
    source = Path(folder)
    if not source.is_dir():
        raise LowrankError(f"there is no folder {source}")
    if (source / INDEX).exists():
        specs, index = index_of(source / INDEX)
        paths = [source / WEIGHTS]
    else:
        specs, codes = _pretrained(source)
        index, paths = {"aliases": {}, "quantized": codes}, sorted(_shards(source))
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        entries.update(tensors.header(path))
    tensors.check_dtypes(entries, index, paths[0])
    summed = _checksum(paths[0], index.get("sha256"))
    _check_finite(paths)
    files = _Files(paths, entries, index["aliases"], index["quantized"])
    for name in files.codes:
        files.check_quantized(name)
    for name, spec in specs.items():
        _check_module(name, spec, files)
    dtypes = Counter(entry.dtype for entry in entries.values())
    coded = len(index["quantized"])
    return Verified(len(paths), len(entries), dict(dtypes), len(specs), summed, coded)


def _pretrained(source: Path) -> tuple[dict[str, Spec], Codes]:
    """The specs and quantized weights of a transformers model; {} of a dense one."""
    if not (source / CONFIG).exists():
        raise LowrankError(f"{source} is not a saved model: neither {INDEX} nor {CONFIG} in it")
    config = _json(source / CONFIG)
    entry = config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != "lowrank":
        return {}, {}
    codes = check_codes(entry.get("quantized", {}), CONFIG)
    return check_specs(entry.get("modules"), CONFIG), codes


def _shards(source: Path) -> set[Path]:
    """The weight files that transformers loads: one, or those that its index names."""
    index = source / f"{WEIGHTS}.index.json"
    if (source / WEIGHTS).exists() or not index.exists():
        return {source / WEIGHTS}
    shards = _json(index).get("weight_map")
    named = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
    if not named or not shards or any(Path(name).name != name for name in shards.values()):
        raise LowrankError(f"{index}: 'weight_map' must map tensors to files of this folder")
    return {source / name for name in shards.values()}


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise LowrankError(f"{path} is not valid JSON ({error}): save the model again") from error
    if not isinstance(body, dict):
        raise LowrankError(f"{path}: expected an object, got {body!r:.80}")
    return body


def _checksum(path: Path, saved: object) -> bool:
    """Whether a checksum was saved; it is compared then."""
    if saved is not None and saved != tensors.sha256(path):
        raise LowrankError(f"{path} is not the file that was saved: its checksum differs")
    return saved is not None


def _check_finite(paths: list[Path]) -> None:
    bad: list[str] = []
    for path in paths:
        for name, tensor in tensors.each(path):
            numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            if tensor.is_floating_point() and not bool(numbers.isfinite().all()):
                bad.append(name)
    if bad:
        raise LowrankError(f"{paths[0].parent}: NaN or Inf in {listed(bad)}")


@dataclass(frozen=True)
class _Files:
    """The tensors of a folder, by the names that a model has for them.

    Attributes:
        aliases: name -> that under which the tensor is stored.
        codes: what is stored in parts.
        shapes: of the whole weights that `check_quantized` found sound.
    """

    paths: list[Path]
    entries: Mapping[str, TensorEntry]
    aliases: Mapping[str, str]
    codes: Codes
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; None where there is none."""
        if name in self.codes:
            return self.shapes[name]
        held = self.entries.get(self.aliases.get(name, name))
        return None if held is None else held.shape

    def values(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of these tensors that there are, each read once."""
        plain = {n: self.aliases.get(n, n) for n in names if n not in self.codes}
        found: dict[str, Tensor] = {}
        for path in self.paths:
            found.update(dict(tensors.each(path, set(plain.values()))))
        whole = {n: self.weight(n) for n in names if n in self.codes}
        return {**{n: found[full] for n, full in plain.items() if full in found}, **whole}

    def weight(self, name: str) -> Tensor:
        """A quantized weight, put together."""
        entry = self.codes[name]
        full = {part: part_name(name, part) for part in entry["tensors"]}
        parts = self.values(full.values())
        kept = {part: parts[each] for part, each in full.items()}
        return put_together(kept, entry, f"{self.paths[0].parent}: {name}")

    def check_quantized(self, name: str) -> None:
        """Raises LowrankError unless the parts of a quantized weight are there and give numbers."""
        where, kinds = f"{self.paths[0].parent}: {name}", self.codes[name]["tensors"]
        for part, (dtype, shape) in kinds.items():
            full = part_name(name, part)
            held = self.entries.get(self.aliases.get(full, full))
            found = None if held is None else [held.dtype, list(held.shape)]
            if found != [dtype, shape]:
                raise LowrankError(f"{where}: {part} is {found} instead of {[dtype, shape]}")
        weight = self.weight(name)
        try:
            numbers: Tensor = weight.dequantize()
        except Exception as error:  # of any kind, for options that were edited
            raise LowrankError(f"{where}: its codes give no numbers: {error}") from error
        if numbers.shape != weight.shape or not bool(numbers.isfinite().all()):
            raise LowrankError(f"{where}: NaN or Inf, or {list(numbers.shape)} numbers, in codes")
        self.shapes[name] = tuple(weight.shape)


def _check_module(name: str, spec: Spec, files: _Files) -> None:
    """Raises LowrankError unless the stored tensors of a factored module fit its spec."""
    module = build(spec, name or "(root)")
    wanted, where = module.state_dict(), f"{files.paths[0].parent}: {name or '(root)'}"
    named = {key: f"{name}.{key}" if name else key for key in wanted}
    shapes = {key: files.shape(full) for key, full in named.items()}
    # A bias may be stored under the name of another layer that it is tied to.
    absent = [named[k] for k, s in shapes.items() if s is None and not k.endswith("bias")]
    wrong = [
        f"{named[key]} {list(shape)} instead of {list(wanted[key].shape)}"
        for key, shape in shapes.items()
        if shape is not None and shape != tuple(wanted[key].shape)
    ]
    if absent or wrong:
        raise LowrankError(
            f"{where} does not fit its files: "
            f"{listed([f'{each} is missing' for each in absent] + wrong)}"
        )
    found = files.values(set(named.values()))
    state = {key: found[full] for key, full in named.items() if full in found}
    module.requires_grad_(False)
    module.load_state_dict(state, strict=False, assign=True)
    lengthen(module)
    fault = mixed(module, name) or module.fault()
    if fault:
        raise LowrankError(f"{where}: {fault}: damaged file")
