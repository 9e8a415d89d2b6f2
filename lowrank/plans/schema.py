"""Field-by-field checks of JSON that may have been edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..errors import LowrankError
from ..types import Cost

Checks = Mapping[str, tuple[Callable[[Any], bool], str]]
COST = "params, bytes and macs as integers >= 0"


def require_fields(item: Any, checks: Checks, what: str) -> None:
    """Raises LowrankError unless `item` has exactly these fields, and all pass their checks."""
    if not isinstance(item, dict):
        raise LowrankError(f"{what} must be an object, got {item!r:.80}")
    where = f"{what} ({item['sites']!r:.80})" if "sites" in item else what
    for fault, keys in (("missing", checks.keys() - item), ("unknown", item.keys() - checks)):
        if keys:
            raise LowrankError(f"{where}: {fault} field {', '.join(sorted(map(repr, keys)))}")
    for key, (valid, expected) in checks.items():
        if not valid(item[key]):
            raise LowrankError(f"{where}: {key} must be {expected}, got {item[key]!r:.80}")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_integers(value: Any) -> bool:
    """A list of integers >= 0."""
    return isinstance(value, list) and all(is_integer(each) and each >= 0 for each in value)


def is_number(value: Any) -> bool:
    """A finite number >= 0, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (known and 0 <= value < math.inf)


def is_cost(value: Any) -> bool:
    names = {field.name for field in fields(Cost)}
    return isinstance(value, dict) and set(value) == names and are_integers(list(value.values()))


def are_parts(value: Any) -> bool:
    """An object of lists of at least two integers > 0, or None."""
    return value is None or (
        isinstance(value, dict)
        and all(are_integers(cut) and len(cut) > 1 and all(cut) for cut in value.values())
    )


def is_counts(value: Any) -> bool:
    """An object of integers >= 0, or None."""
    return value is None or (isinstance(value, dict) and are_integers(list(value.values())))
