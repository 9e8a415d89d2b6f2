"""Calibrations in files: statistics, spectra and rows, to be used again.

One safetensors file, or a folder with one file for each distinct input, whose matrices are read
from disk when they are used; never pickle. It belongs to one model, known by the digest of its
tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost, Curve, Option, Statistics
from .batches import Batch
from .digests import add_tensor, check_place, model_print, write_whole
from .observation import Observation
from .statistics import Calibration

FORMAT, VERSION = "lowrank-calibration", "1"
INDEX = "calibration.safetensors"  # of a folder
MATRICES = ("gram", "mean", "freq", "out_gram", "row_fisher")  # of Statistics


def save_calibration(calibration: Calibration, path: str | Path, model: nn.Module) -> None:
    """Save a calibration of `model`; an existing one is replaced.

    Args:
        path: of a file, or of a folder if it has no suffix. Loading a folder reads no matrix: each
            is mapped into memory, and read when it is used.

    Raises:
        LowrankError: its data is a callable or holds more than tensors, or the place is taken by
            something else.
    """
    path = Path(path)
    check_place(path)
    is_folder = path.is_dir() or not (path.suffix or path.exists())
    index = path / INDEX if is_folder else path
    if index.exists():
        _opened(index)
    elif path.exists() and not (path.is_dir() and _is_begun(path)):
        raise LowrankError(f"{path} is not a lowrank calibration: choose another name")
    store = _Store()
    body = _body(calibration, store, path if is_folder else None)
    about = {"format": FORMAT, "version": VERSION, "model": model_print(model)}
    write_whole(index, {**about, "body": json.dumps(body)}, store.tensors)
    if is_folder:  # only now: an older index refers to older files
        named = {part["file"] for part in body["statistics"]}
        for old in path.glob("statistics-*.safetensors"):
            if old.name not in named:
                old.unlink()


def _is_begun(folder: Path) -> bool:
    """Whether a folder is empty, or holds a calibration that was not written to its end."""
    return all(path.name.startswith(("statistics-", "tmp")) for path in folder.iterdir())


def _body(calibration: Calibration, store: _Store, folder: Path | None) -> dict[str, Any]:
    """A calibration as JSON; its tensors go to the store, statistics to files of the folder."""
    if callable(calibration.batches):
        raise LowrankError("a calibration from a callable cannot be saved: pass batches or texts")
    own: dict[int, int] = {}
    parts: list[dict[str, Any]] = []
    if folder is not None:
        folder.mkdir(exist_ok=True)
    for stats in calibration.statistics.values():
        if id(stats) not in own:
            own[id(stats)] = len(parts)
            matrices = {name: getattr(stats, name) for name in MATRICES}
            stored = (
                {name: store.put(matrix) for name, matrix in matrices.items()}
                if folder is None
                else {"file": _write_part(folder, matrices)}
            )
            parts.append({"count": stats.count, **stored})
    observation = calibration.observation
    return {
        "statistics": parts,
        "sites": {name: own[id(stats)] for name, stats in calibration.statistics.items()},
        "order": observation.order, "groups": observation.groups, "chains": observation.chains,
        "bypassed": observation.bypassed, "calls": observation.calls,
        "irreplaceable": observation.irreplaceable,
        "shapes": {name: list(shape) for name, shape in observation.shapes.items()},
        "cuts": {name: list(sizes) for name, sizes in observation.cuts.items()},
        "batches": [_batch(batch, store) for batch in calibration.batches],
        "held_out": [_batch(batch, store) for batch in calibration.held_out],
        "tokens": calibration.tokens, "min_tokens": calibration.min_tokens,
        "source": calibration.source, "padded": calibration.padded,
        "whole": calibration.whole, "rows_read": calibration.rows_read,
        "spectra": {
            key: [own[id(stats)], _curve(curve, store)]
            for key, (stats, curve) in calibration.spectra.items()
            if id(stats) in own
        },
    }  # fmt: skip


def _write_part(folder: Path, matrices: Mapping[str, Tensor | None]) -> str:
    """Write the matrices of one distinct input; the name says their digest."""
    tensors = {name: m.detach().cpu().contiguous() for name, m in matrices.items() if m is not None}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        add_tensor(digest, name, tensor)
    name = f"statistics-{digest.hexdigest()[:32]}.safetensors"
    if not (folder / name).exists():
        write_whole(folder / name, {}, tensors)
    return name


def _read_part(path: Path) -> dict[str, Tensor | None]:
    """The matrices of one distinct input, mapped into memory.

    Raises:
        LowrankError: the file is missing or broken.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            return {n: file.get_tensor(n) if n in names else None for n in MATRICES}
    except (SafetensorError, OSError) as error:
        raise LowrankError(f"{path} is missing or broken ({error}): delete the folder") from error


def load_calibration(path: str | Path, model: nn.Module) -> Calibration:
    """Load a calibration, accepted as `data=` everywhere; nothing is run.

    Raises:
        LowrankError: the file is missing, something else, broken, or made for another model.
    """
    path = Path(path)
    index = path / INDEX if path.is_dir() else path
    if not index.is_file():
        raise LowrankError(f"there is no calibration {path}")
    about, tensors = _opened(index)
    if about.get("version") != VERSION:
        raise LowrankError(f"{path} was written by another version of lowrank: delete it")
    if about.get("model") != model_print(model):
        raise LowrankError(
            f"{path} was made for another model, or other weights: choose another name, or "
            "delete it"
        )
    try:
        return _restored(json.loads(about["body"]), tensors, index.parent)
    except LowrankError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise LowrankError(f"{path} is broken ({error!r:.80}): delete it") from error


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a calibration file; raises LowrankError for any other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LowrankError(f"{path} is not a lowrank calibration, or broken ({error})") from error
    if about.get("format") != FORMAT:
        raise LowrankError(f"{path} is not a lowrank calibration: choose another name")
    return about, tensors


class _Store:
    """Tensors by number; a shared one is stored once, and restored as one."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def put(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self._alive.append(tensor)
            own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self.tensors[str(len(self.tensors))] = own
        return self._numbers[id(tensor)]


def _batch(batch: Batch, store: _Store) -> Any:
    if isinstance(batch, Tensor):
        return store.put(batch)
    if not all(isinstance(value, Tensor) for value in batch.values()):
        raise LowrankError("only batches of tensors can be saved")
    return {name: store.put(value) for name, value in batch.items()}


def _curve(curve: Curve, store: _Store) -> dict[str, Any]:
    """A curve with its options as tables, since there is one per rank."""
    option_kinds = [(o.method, o.storage, o.size and len(o.size)) for o in curve.options]
    kinds = list(dict.fromkeys(option_kinds))
    width = max(len(o.size or ()) for o in curve.options)
    numbers = [
        [
            kinds.index(kind),
            *(getattr(o.cost, f.name) for f in fields(Cost)),
            *((o.size or ()) + (0,) * width)[:width],
        ]
        for o, kind in zip(curve.options, option_kinds, strict=True)
    ]
    errors = [o.error for o in curve.options]
    return {
        "sites": curve.sites, "kinds": kinds, "total": curve.total, "norm": curve.norm,
        "exact": curve.exact,
        "spectrum": store.put(curve.spectrum), "tails": store.put(curve.tails),
        "options": store.put(torch.tensor(numbers, dtype=torch.int64)),
        "errors": store.put(torch.tensor(errors, dtype=torch.float64)),
    }  # fmt: skip


def _restored(body: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Calibration:
    def get(number: int | None) -> Tensor | None:
        return None if number is None else tensors[str(number)]

    parts = [
        Statistics(
            part["count"],
            **(
                _read_part(folder / Path(part["file"]).name)
                if "file" in part
                else {name: get(part[name]) for name in MATRICES}
            ),
        )
        for part in body["statistics"]
    ]
    shapes = {name: tuple(shape) for name, shape in body["shapes"].items()}
    observed = Observation(
        tuple(body["order"]), _names(body["groups"]), _names(body["chains"]), shapes,
        tuple(body["bypassed"]), dict(body.get("calls", {})),
        {name: tuple(sizes) for name, sizes in body.get("cuts", {}).items()},
        tuple(body.get("irreplaceable", ())),
    )  # fmt: skip
    return Calibration(
        statistics={name: parts[number] for name, number in body["sites"].items()},
        observation=observed,
        batches=[_batch_back(batch, tensors) for batch in body["batches"]],
        tokens=body["tokens"],
        min_tokens=body["min_tokens"],
        source=body["source"],
        held_out=tuple(_batch_back(batch, tensors) for batch in body["held_out"]),
        padded=tuple(body.get("padded", ())),
        whole=bool(body.get("whole", False)),
        rows_read=int(body.get("rows_read", 0)),
        spectra={
            key: (parts[number], _curve_back(curve, tensors))
            for key, (number, curve) in body["spectra"].items()
        },
    )


def _names(nested: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names) for names in nested)


def _batch_back(batch: Any, tensors: Mapping[str, Tensor]) -> Batch:
    if isinstance(batch, dict):
        return {name: tensors[str(number)] for name, number in batch.items()}
    return tensors[str(batch)]


def _curve_back(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Curve:
    def get(name: str) -> Tensor | None:
        return None if body[name] is None else tensors[str(body[name])]

    rows, errors = tensors[str(body["options"])].tolist(), tensors[str(body["errors"])].tolist()
    options = []
    for (kind, params, stored, macs, *size), error in zip(rows, errors, strict=True):
        method, storage, length = body["kinds"][kind]
        shown = None if length is None else tuple(size[:length])
        options.append(Option(method, shown, storage, Cost(params, stored, macs), error))
    return Curve(
        sites=tuple(body["sites"]), options=tuple(options), total=body["total"],
        spectrum=get("spectrum"), norm=body["norm"], exact=body["exact"], tails=get("tails"),
    )  # fmt: skip
