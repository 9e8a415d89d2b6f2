"""Both import orders, a reload, no transformers: each in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from lowrank.io import import_hooks, install, registration


@pytest.mark.slow
def test_lowrank_before_transformers(in_new_process) -> None:
    found = in_new_process("lowrank_first")
    assert not found["imported"], "import lowrank must not import transformers"
    # One finder stays for diffusers, which was not imported.
    assert (found["finders"], found["finders_reloaded"], found["finders_after"]) == (1, 1, 1)
    assert found["loader"] == "SourceFileLoader"
    assert (found["error"], found["again"]) == (0, 0)


@pytest.mark.slow
def test_transformers_before_lowrank(in_new_process) -> None:
    found = in_new_process("transformers_first")
    assert found == {"before": False, "finders": 1, "error": 0}


@pytest.mark.slow
def test_without_import_it_is_refused_or_trusted(in_new_process) -> None:
    """A guard is no weight, as the card says; and its other way in, trust_remote_code."""
    found = in_new_process("without_lowrank")
    assert not found["imported"]
    assert "ignore_mismatched_sizes" in found["said"]
    for kind in ("llama", "mixtral"):
        assert (found[kind], found[f"{kind}_again"]) == (0, 0)
        # The stock class, so that checkpoint conversions (of experts) apply.
        assert found[f"{kind}_class"].startswith(f"transformers.models.{kind}.")


@pytest.mark.slow
def test_a_stock_script_loads_it_where_lowrank_is_installed(in_new_process) -> None:
    found = in_new_process("stock")
    assert not found["early"], "every start of Python would pay for it"
    assert (found["error"], found["again"], found["waits"]) == (0, 0, False)


@pytest.mark.slow
def test_our_classes_before_those_of_transformers(in_new_process) -> None:
    assert in_new_process("hf_first") == {"error": 0, "ours": True}


@pytest.mark.slow
def test_without_transformers(in_new_process) -> None:
    found = in_new_process("no_transformers")
    assert found["output"] == 7 * 2 * 5
    assert found["said"] == "transformers is not installed: pip install transformers"


def test_install_again_changes_nothing() -> None:
    from transformers.quantizers import auto

    before = auto.AUTO_QUANTIZER_MAPPING["lowrank"]
    install()
    install()
    assert auto.AUTO_QUANTIZER_MAPPING["lowrank"] is before
    assert sum(isinstance(finder, import_hooks._Finder) for finder in sys.meta_path) <= 1


def test_unsuitable_transformers_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="lowrank could not register: it will not load"):
        registration._register(SimpleNamespace())  # type: ignore[arg-type]


def test_finder_of_a_failing_import_stays(monkeypatch) -> None:
    """The next import of the module must still register."""
    finder = import_hooks._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])

    def fail(module: object) -> None:
        raise ImportError("half installed")

    loader = SimpleNamespace(exec_module=fail)
    spec = SimpleNamespace(loader=loader)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    found = finder.find_spec("transformers.quantizers.auto", None)
    with pytest.raises(ImportError, match="half installed"):
        found.loader.exec_module(object())  # type: ignore[union-attr,arg-type]
    assert finder in sys.meta_path
