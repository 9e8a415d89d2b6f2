"""The one place that replaces modules."""

from __future__ import annotations

import copy
from itertools import chain as joined

from torch import nn


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer: it costs no memory.

    Modules can be replaced in one of the two without the other noticing.
    """
    shared = {id(tensor): tensor for tensor in joined(model.parameters(), model.buffers())}
    return copy.deepcopy(model, dict(shared))
