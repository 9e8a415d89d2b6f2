"""Versions of this library and of those that shape the numbers."""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import torch


def versions() -> dict[str, str]:
    """Of Python and of the libraries that shape the numbers; those not loaded are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lowrank", "transformers"):
        if package in sys.modules:
            try:
                found[package] = installed(package)
            except PackageNotFoundError:  # run from a source tree that was never installed
                found[package] = "source"
    return found


def version() -> str:
    """Of this library. The package is asked by name: io lies below the public surface."""
    package = importlib.import_module(__name__.partition(".")[0])
    return str(getattr(package, "__version__", "unknown"))
