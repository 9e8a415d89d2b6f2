"""Products keep their precision where the caller's code runs under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A `with` block in which autocast is off on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)
