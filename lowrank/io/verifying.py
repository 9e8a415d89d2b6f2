"""Check a saved model without building it: sizes, dtypes, ranges, finite numbers, checksum."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LowrankError, listed
from ..nn import build
from . import tensors
from .checkpoint import CONFIG, INDEX, WEIGHTS, index_of
from .specs import Spec, check_specs, mixed
from .tensors import TensorEntry


@dataclass(frozen=True)
class Verified:
    """What was checked in a sound folder.

    Attributes:
        dtypes: number of tensors of each dtype, as safetensors calls them.
        modules: factored modules.
        checksum: whether one was saved, and compared.
    """

    files: int
    tensors: int
    dtypes: Mapping[str, int]
    modules: int
    checksum: bool

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        summed = "checksum equal" if self.checksum else "no checksum was saved"
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return (
            f"sound: {files}, {self.tensors} tensors ({kinds}), {self.modules} factored modules; "
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
        specs, index, paths = _pretrained(source), {"aliases": {}}, sorted(_shards(source))
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        entries.update(tensors.header(path))
    tensors.check_dtypes(entries, index, paths[0])
    summed = _checksum(paths[0], index.get("sha256"))
    _check_finite(paths)
    aliases = index["aliases"]
    for name, spec in specs.items():
        _check_module(name, spec, paths, entries, aliases)
    dtypes = Counter(entry.dtype for entry in entries.values())
    return Verified(len(paths), len(entries), dict(dtypes), len(specs), summed)


def _pretrained(source: Path) -> dict[str, Spec]:
    """The specs of a transformers model; {} of a dense one."""
    if not (source / CONFIG).exists():
        raise LowrankError(f"{source} is not a saved model: neither {INDEX} nor {CONFIG} in it")
    config = _json(source / CONFIG)
    entry = config.get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != "lowrank":
        return {}
    return check_specs(entry.get("modules"), CONFIG)


def _shards(source: Path) -> set[Path]:
    """The weight files of a transformers model: one, or those that its index names."""
    index = source / f"{WEIGHTS}.index.json"
    if not index.exists():
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


def _check_module(
    name: str,
    spec: Spec,
    paths: list[Path],
    entries: Mapping[str, TensorEntry],
    aliases: Mapping[str, str],
) -> None:
    """Raises LowrankError unless the stored tensors of a factored module fit its spec."""
    module = build(spec, name or "(root)")
    wanted = module.state_dict()
    named = {key: f"{name}.{key}" if name else key for key in wanted}
    held = {key: aliases.get(full, full) for key, full in named.items()}
    # A bias may be stored under the name of another layer that it is tied to.
    absent = [n for key, n in held.items() if n not in entries and not key.endswith("bias")]
    wrong = [
        f"{full} {list(entries[full].shape)} instead of {list(wanted[key].shape)}"
        for key, full in held.items()
        if full in entries and entries[full].shape != tuple(wanted[key].shape)
    ]
    if absent or wrong:
        raise LowrankError(
            f"{paths[0].parent}: {name or '(root)'} does not fit its files: "
            f"{listed([f'{each} is missing' for each in absent] + wrong)}"
        )
    found: dict[str, Tensor] = {}
    for path in paths:
        found.update(dict(tensors.each(path, set(held.values()))))
    state = {key: found[full] for key, full in held.items() if full in found}
    module.requires_grad_(False)
    module.load_state_dict(state, strict=False, assign=True)
    fault = mixed(module, name) or module.fault()
    if fault:
        raise LowrankError(f"{paths[0].parent}: {name or '(root)'}: {fault}: damaged file")
