"""For all tests: nothing is fetched, and no test leaves a global switch behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch


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
