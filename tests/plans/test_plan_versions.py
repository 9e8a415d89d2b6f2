"""What a plan says of the libraries that it was made with."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from lowrank.plans import plan


def test_versions_of_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(package: str) -> str:
        if package == "lowrank":
            raise PackageNotFoundError
        return f"{package} 1"

    monkeypatch.setattr(plan, "installed", version)
    monkeypatch.setitem(sys.modules, "transformers", torch)  # whatever it is
    assert plan.versions() == {
        "python": platform.python_version(), "torch": torch.__version__,
        "lowrank": "source", "transformers": "transformers 1",
    }  # fmt: skip
    monkeypatch.delitem(sys.modules, "transformers")
    assert "transformers" not in plan.versions()  # it is not imported to find out
