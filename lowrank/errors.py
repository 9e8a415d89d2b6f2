"""The one error that users are meant to read: what was got, expected, to be done, and where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowrankError(ValueError):
    """Raised before anything is changed; the command line prints it as one line, exit code 2."""


def unknown(what: str, got: str, known: Iterable[str]) -> LowrankError:
    """Error for a name that a registry does not hold; near matches are named."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return LowrankError(f"unknown {what} {got!r}{hint} (known: {', '.join(names)})")


def listed(names: Iterable[str], most: int = 12) -> str:
    """`a, b, c … (+9 more)`: names for an error message that must stay readable."""
    every = list(names)
    more = f" … (+{len(every) - most} more)" if len(every) > most else ""
    return ", ".join(every[:most]) + more
