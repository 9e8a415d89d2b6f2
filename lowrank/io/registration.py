"""Register "lowrank" checkpoints with transformers, without importing transformers.

If `transformers.quantizers.auto` is loaded, our classes are registered at once. Otherwise an import
hook waits for that module, registers right after it has run, and removes itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"
METHOD = "lowrank"


def install() -> None:
    """Register now, or as soon as transformers is imported; idempotent."""
    _remove_finders()
    module = sys.modules.get(TARGET)
    if module is None:
        sys.meta_path.insert(0, _Finder())
    else:
        _register(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders, and adds a step to its loading."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != TARGET or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: importlib.abc.Loader) -> None:
    """Make `loader` register our classes after it has run the module.

    The loader object is kept, so that `inspect` and others see no difference. If the module fails
    to import, the finder stays for the next attempt.
    """
    run = loader.exec_module

    def run_and_register(module: ModuleType) -> None:
        run(module)
        _remove_finders()
        _register(module)

    loader.exec_module = run_and_register  # type: ignore[method-assign]


def _register(auto: ModuleType) -> None:
    """Register both classes; a failure here must not break the import of transformers."""
    try:
        from .hf import LowRankConfig, LowRankHfQuantizer

        configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
        for mapping in (configs, quantizers):
            # Ours may be registered from before a reload; the decorators refuse to replace it.
            if METHOD in mapping and mapping[METHOD].__module__ == LowRankConfig.__module__:
                del mapping[METHOD]
        auto.register_quantization_config(METHOD)(LowRankConfig)
        auto.register_quantizer(METHOD)(LowRankHfQuantizer)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        warnings.warn(
            f"lowrank could not register with transformers, which will load lowrank checkpoints "
            f"with random weights: {error}",
            stacklevel=2,
        )


def _remove_finders() -> None:
    """Remove our finders, also those of an earlier import, whose class is another object."""
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if (type(finder).__module__, type(finder).__qualname__) != (__name__, _Finder.__qualname__)
    ]
