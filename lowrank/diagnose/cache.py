"""Sensitivities on disk: one safetensors file that says what it was made for.

Nothing is ever overwritten that this file did not write: another file, or one made for another
model or data, is refused; only a broken copy of our own is made anew.
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
    """Digest of finished statistics."""
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
    """What is stored, its JSON and its tensors; None where it has to be computed.

    Raises:
        LowrankError: the file is something else, or was made for other things, which are named.
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
        raise LowrankError(f"{path} is no sensitivity cache: choose another name")
    try:
        body = json.loads(stored["body"])
        before = body["made_for"]
        sites, ratios = len(body["sites"]), len(before["ratios"])
        sound = all(tensors[name].shape == (sites, ratios) for name in TENSORS)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        _broken(path, "its tables do not fit together")
        return None
    differing = sorted(key for key in made_for if before.get(key) != made_for[key])
    if stored.get("version") != VERSION:
        differing = ["version of the format"]
    if differing:
        raise LowrankError(
            f"the cache {path} was made for another {' and another '.join(differing)}: "
            "choose another name, or delete it"
        )
    return body, tensors


def write(path: Path, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """In one step: a reader sees all of the file or nothing."""
    write_whole(path, {"format": FORMAT, "version": VERSION, "body": json.dumps(body)}, tensors)


def _broken(path: Path, why: str) -> None:
    """Warn, and let it be computed anew; a file that is not ours is left alone.

    Raises:
        LowrankError: nothing in the file says that it is ours.
    """
    content = path.read_bytes()
    if content and FORMAT.encode() not in content:
        raise LowrankError(f"{path} is no sensitivity cache: choose another name")
    warnings.warn(
        f"the cache {path} is broken ({' '.join(why.split())}): it is made anew", stacklevel=4
    )
