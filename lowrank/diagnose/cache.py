"""Sensitivities on disk: one safetensors file that records what it was computed for.

A file that is not a sensitivity cache, or one of another model or data, is never overwritten but
refused; only a damaged cache is recomputed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.digests import add_tensor, check_place, data_print, model_print, write_whole
from ..calibration.statistics import Calibration
from ..errors import LowrankError

__all__ = ["calibration_print", "check_place", "data_print", "model_print", "read", "write"]

FORMAT, VERSION = "lowrank-sensitivity", "1"
TENSORS = ("kl", "rank", "error")


def calibration_print(calibration: Calibration) -> str:
    """Digest of a calibration's statistics."""
    digest = hashlib.sha256()
    for name, stats in sorted(calibration.statistics.items()):
        digest.update(f"{name} {stats.count}".encode())
        for tensor in (stats.gram, stats.out_gram, stats.row_fisher):
            if tensor is not None:
                add_tensor(digest, name, tensor)
    return digest.hexdigest()


def read(
    path: Path, made_for: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The JSON and tensors of a cache; None if they have to be computed.

    Raises:
        LowrankError: the file is not a cache, or was made for something else, which is named.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    if not path.is_file():
        raise LowrankError(f"the cache {path} is a folder, expected the name of a file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        _broken(path, str(error))
        return None
    if stored.get("format") != FORMAT:
        raise LowrankError(f"{path} is not a sensitivity cache: choose another name")
    try:
        body = json.loads(stored["body"])
        before = body["made_for"]
        sites, ratios = len(body["sites"]), len(before["ratios"])
        sound = all(tensors[name].shape == (sites, ratios) for name in TENSORS)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        _broken(path, "its tables do not match")
        return None
    differing = sorted(key for key in made_for if before.get(key) != made_for[key])
    if stored.get("version") != VERSION:
        differing = ["format version"]
    if differing:
        raise LowrankError(
            f"the cache {path} was made for another {' and another '.join(differing)}: "
            "choose another name, or delete it"
        )
    return body, tensors


def write(path: Path, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the cache atomically."""
    write_whole(path, {"format": FORMAT, "version": VERSION, "body": json.dumps(body)}, tensors)


def _broken(path: Path, why: str) -> None:
    """Warn that a damaged cache will be recomputed.

    Raises:
        LowrankError: the file is not a cache of ours.
    """
    content = path.read_bytes()
    if content and FORMAT.encode() not in content:
        raise LowrankError(f"{path} is not a sensitivity cache: choose another name")
    warnings.warn(
        f"the cache {path} is damaged ({' '.join(why.split())}) and is recomputed", stacklevel=4
    )
