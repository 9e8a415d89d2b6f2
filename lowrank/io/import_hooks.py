"""Act right after a module of another library has run, without importing it.

What is loaded already is served at once. For the rest an import hook waits; it removes itself after
the last one. `registration.py` says what is done after which module.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STEPS: dict[str, Callable[[ModuleType], None]] = {}  # by the name of the module
VERBS: dict[str, Callable[..., Any]] = {}  # from the rooms above, for what other libraries call


def install() -> None:
    """Register now, or as soon as the libraries are imported; idempotent."""
    for name, step in STEPS.items():
        module = sys.modules.get(name)
        # One that is still running has nothing to register with.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            step(module)
    _remove_finders()  # here, for a step may have installed, too
    if any(name not in sys.modules for name in STEPS):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a few modules through the other finders, and adds a step to their loading."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in STEPS or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            _act_after(spec.loader, fullname)
        return spec


def _act_after(loader: importlib.abc.Loader, name: str) -> None:
    """Make `loader` take the module's step after it has run the module.

    The loader object is kept, so that `inspect` and others see no difference. If the module fails
    to import, the finder stays for the next attempt.
    """
    run = loader.exec_module

    def run_and_act(module: ModuleType) -> None:
        run(module)
        STEPS[name](module)
        if all(other == name or other in sys.modules for other in STEPS):
            _remove_finders()

    loader.exec_module = run_and_act  # type: ignore[method-assign]


def _remove_finders() -> None:
    """Remove our finders, also those of an earlier import, whose class is another object."""
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if (type(finder).__module__, type(finder).__qualname__) != (__name__, _Finder.__qualname__)
    ]
