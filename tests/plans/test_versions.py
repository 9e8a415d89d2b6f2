"""What a plan says of the libraries that it was made with."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from lowrank.plans import versions


def test_versions_of_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(package: str) -> str:
        if package == "lowrank":
            raise PackageNotFoundError
        return f"{package} 1"

    monkeypatch.setattr(versions, "installed", version)
    monkeypatch.setitem(sys.modules, "transformers", torch)  # whatever it is
    assert versions.versions() == {
        "python": platform.python_version(), "torch": torch.__version__,
        "lowrank": "source", "transformers": "transformers 1",
    }  # fmt: skip
    monkeypatch.delitem(sys.modules, "transformers")
    assert "transformers" not in versions.versions()  # it is not imported to find out
