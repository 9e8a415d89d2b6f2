"""All laws on one case: every one that is broken is named, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar


class Named(Protocol):
    """A case of one layer, or of several."""

    @property
    def name(self) -> str: ...


M = TypeVar("M")
C = TypeVar("C", bound=Named)


def check_laws(method: M, case: C, laws: Mapping[str, Callable[[M, C], None]]) -> None:
    """Hold a method against these laws on one case, for which everything is made once.

    Raises:
        AssertionError: laws are broken: a line for each names law, case, dtype and size.
        Exception: the method itself fails; those lines are its note.
    """
    who, lines, failure = type(method).__name__, [], None
    for name, law in laws.items():
        try:
            law(method, case)
        except AssertionError as error:
            lines.append(f"{who} breaks the law {name!r}: {error}")
        except Exception as error:
            lines.append(f"{who} fails under the law {name!r}: {case.name}: {error!r}")
            failure = failure or error
    if failure is not None:
        failure.add_note("\n".join(lines))
        raise failure
    if lines:
        raise AssertionError("\n".join(lines))
