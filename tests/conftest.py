"""For all tests: nothing is fetched, and no test leaves a global switch behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

# Coverage is measured by the tests of the single rooms. What crosses many rooms enters every line
# again and again: traced, it would take half as long again and show nothing more.
UNTRACED = ("test_roster", "test_families", "test_own_forms", "test_plugs", "test_docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in UNTRACED or item.get_closest_marker("slow"):
            item.add_marker("no_cover")


def switches() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture(autouse=True)
def global_switches_stay() -> Iterator[None]:
    """Seeded, and the library flips no global flag."""
    torch.manual_seed(0)
    before = switches()
    yield
    assert switches() == before
