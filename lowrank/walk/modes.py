"""Checks and surroundings that every verb wants of a model before it looks inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import LowrankError


def check_module(model: Any) -> None:
    """Raises LowrankError unless it is a module; one that holds it, a pipeline say, is told so."""
    if isinstance(model, nn.Module):
        return
    inner = isinstance(getattr(model, "model", None), nn.Module)
    hint = ": pass its .model" if inner else ""
    raise LowrankError(f"expected a torch.nn.Module, got {type(model).__name__}{hint}")


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """A context, or a decorator, that leaves torch.inference_mode.

    What is made in that mode can never be trained: factors, which stay with the model, must not be.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            yield
    else:
        yield
