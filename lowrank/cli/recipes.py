"""Recipes: one compression as a YAML file, to be run again; one is written beside the weights.

The keys are the arguments of `lowrank.compress` that have an option on the command line, with
`model`, `out`, `length` and `from_disk`. What was written beside weights also says which text and
which versions they came from, and a changed text is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..api.arguments import ARGUMENTS
from ..api.request import Compression
from ..calibration.statistics import SELF
from ..errors import LowrankError, unknown
from ..plans.plan import versions

FILE = "recipe.yaml"
OWN = {"model": str, "out": str, "plan": str, "length": int, "from_disk": bool}
LISTS = ("target_modules", "exclude_modules")
MADE = {"data_sha256": str, "made_with": dict}
ASKED = [f.name for f in fields(Compression) if f.name in ARGUMENTS and ARGUMENTS[f.name].flag]


class Recipe(NamedTuple):
    """One compression.

    Attributes:
        model, out: as on the command line; `out` may be "".
        plan: the file of a plan to apply, if any.
        chosen: the other options by name, None where not given.
    """

    model: str
    out: str
    plan: str | None
    length: int | None
    from_disk: bool | None
    chosen: dict[str, Any]


def read(path: Path) -> Recipe:
    """A recipe from a file; relative paths are those of its folder.

    Raises:
        LowrankError: it is no recipe, a key is unknown or a value of another kind, or the text that
            it names has changed since.
    """
    source = path / FILE if path.is_dir() else path
    if not source.is_file():
        raise LowrankError(f"there is no recipe at {source}")
    try:
        held = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LowrankError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(held, dict) or not held.get("model"):
        raise LowrankError(f"{source}: a recipe maps names to values, `model: PATH` among them")
    for key in held:
        if key not in {*OWN, *MADE, *ASKED}:
            raise unknown(f"{source}: key", str(key), [*OWN, *ASKED])
    _check_kinds(source, held)
    chosen = {name: _given(name, held.get(name)) for name in ASKED}
    where = source.absolute().parent
    if chosen["data"] not in (None, SELF):
        chosen["data"] = str(where / chosen["data"])
        _check_text(source, chosen["data"], held.get("data_sha256"))
    local = where / held["model"]
    return Recipe(
        model=str(local) if local.is_dir() else held["model"],
        out="" if held.get("out") is None else str(where / held["out"]),
        plan=None if held.get("plan") is None else str(where / held["plan"]),
        length=held.get("length"),
        from_disk=held.get("from_disk"),
        chosen=chosen,
    )


def write(folder: Path, recipe: Recipe) -> None:
    """Write a recipe beside weights, with absolute paths, the text's checksum and the versions."""
    model, data = Path(recipe.model), recipe.chosen.get("data")
    held: dict[str, Any] = {"model": str(model.absolute()) if model.is_dir() else recipe.model}
    held |= {name: recipe.chosen[name] for name in ASKED if recipe.chosen.get(name) is not None}
    if data not in (None, SELF):
        held["data"] = str(Path(data).absolute())
        held["data_sha256"] = _sha256(held["data"])
    held["plan"] = None if recipe.plan is None else str(Path(recipe.plan).absolute())
    held |= {"length": recipe.length, "from_disk": recipe.from_disk, "made_with": _versions()}
    held = {key: list(v) if isinstance(v, tuple) else v for key, v in held.items() if v is not None}
    head = "# lowrank run recipe.yaml --out FOLDER writes the same weights again.\n"
    text = yaml.safe_dump(held, sort_keys=False, allow_unicode=True)
    (folder / FILE).write_text(head + text, encoding="utf-8")


def _given(name: str, value: Any) -> Any:
    """A value as the command line gives it."""
    if value is None:
        return None
    if name in LISTS:
        return [value] if isinstance(value, str) else value
    return str(value) if name == "rank" else value


def _check_kinds(source: Path, held: Mapping[str, Any]) -> None:
    real, whole = ("ratio", "rank", "minutes"), ("align", "seed", "rows")
    numbers = {**dict.fromkeys(real, (int, float)), **dict.fromkeys(whole, int)}
    for key, value in held.items():
        wanted: Any = numbers.get(key, {**OWN, **MADE}.get(key, str))
        if key in LISTS:
            fits = isinstance(value, str) or (
                isinstance(value, list) and all(isinstance(one, str) for one in value)
            )
        else:
            is_flag = isinstance(value, bool)
            fits = isinstance(value, wanted) and (wanted is bool or not is_flag)
        if not fits and value is not None:
            raise LowrankError(f"{source}: {key}: {value!r} is not of the kind expected")


def _check_text(source: Path, data: str, wanted: str | None) -> None:
    if wanted and Path(data).is_file() and _sha256(data) != wanted:
        raise LowrankError(
            f"{source}: {data} has changed since: its SHA-256 is no longer {wanted[:12]}…; without "
            "data_sha256 the recipe takes any text"
        )


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    return {name: str(version) for name, version in versions().items()}  # torch's is a class
