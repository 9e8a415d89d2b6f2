"""Both import orders, a reload, no transformers: each in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from lowrank.io import install, registration


@pytest.mark.slow
def test_lowrank_before_transformers(in_new_process) -> None:
    found = in_new_process("lowrank_first")
    assert not found["imported"], "import lowrank must not import transformers"
    assert (found["finders"], found["finders_reloaded"], found["finders_after"]) == (1, 1, 0)
    assert found["loader"] == "SourceFileLoader"
    assert (found["error"], found["again"]) == (0, 0)


@pytest.mark.slow
def test_transformers_before_lowrank(in_new_process) -> None:
    found = in_new_process("transformers_first")
    assert found == {"before": False, "finders": 0, "error": 0}


@pytest.mark.slow
def test_without_import_the_card_tells_the_truth(in_new_process) -> None:
    """Random weights and a report, as the card says; and its other way in, trust_remote_code."""
    found = in_new_process("without_lowrank")
    assert not found["imported"]
    assert "model.layers.0.self_attn.q_proj.weight" in found["missing"]
    assert "model.layers.0.self_attn.q_proj.up.weight" in found["unexpected"]
    assert found["trap_error"] > 1e-3
    for kind in ("llama", "mixtral"):
        assert (found[kind], found[f"{kind}_again"]) == (0, 0)
        assert not found[f"{kind}_map"], "the code is not copied, so the next folder has no map"
        # The stock class, so that checkpoint conversions (of experts) apply.
        assert found[f"{kind}_class"].startswith(f"transformers.models.{kind}.")


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
    assert not any(isinstance(finder, registration._Finder) for finder in sys.meta_path)


def test_unsuitable_transformers_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="lowrank could not register with transformers"):
        registration._register(SimpleNamespace())  # type: ignore[arg-type]


def test_finder_of_a_failing_import_stays(monkeypatch) -> None:
    """The next import of the module must still register."""
    finder = registration._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])

    def fail(module: object) -> None:
        raise ImportError("half installed")

    loader = SimpleNamespace(exec_module=fail)
    spec = SimpleNamespace(loader=loader)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    found = finder.find_spec(registration.TARGET, None)
    with pytest.raises(ImportError, match="half installed"):
        found.loader.exec_module(object())  # type: ignore[union-attr,arg-type]
    assert finder in sys.meta_path
