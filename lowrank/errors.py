"""The library's one error for users: what was wrong, what was expected, what to do, where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowrankError(ValueError):
    """Raised before anything is changed; the command line prints one line and exits with 2."""


FEW = 12  # names that one line holds


def unknown(what: str, got: str, known: Iterable[str]) -> LowrankError:
    """Error for a name that is not registered: close matches are suggested, or all names listed,
    and both where the names are few."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    every = "" if near and len(names) > FEW else f" (known: {listed(names, 2 * FEW)})"
    return LowrankError(f"unknown {what} {got!r}{hint}{every}")


def listed(names: Iterable[str], most: int = FEW) -> str:
    """`a, b, c … (+9 more)`: names, shortened for an error message."""
    every = list(names)
    more = f" … (+{len(every) - most} more)" if len(every) > most else ""
    return ", ".join(every[:most]) + more
