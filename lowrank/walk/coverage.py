"""What no site covers: matrices that a module holds itself, outside any layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..errors import listed
from ..nn import is_factored
from ..types import Site
from .layouts import sound
from .surgery import modules_of

PLAIN = (list, tuple, dict)
OWN = frozenset(vars(nn.Module()))  # what every module has


def uncovered(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """Parameters per kind, such as "LSTM.weight_ih_l0", of matrices that belong to no site.

    Fused experts, the projections inside nn.MultiheadAttention and recurrent layers are such.
    Vectors are left out, and so are layers that are factored already.
    """
    known = {id(layer._parameters.get("weight")) for site in sites for layer in site.modules}
    found: dict[str, int] = {}
    for _, module in modules_of(model):
        if is_factored(module):
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in known:
                continue
            known.add(id(parameter))
            if sum(side > 1 for side in parameter.shape) > 1:
                name = f"{type(module).__name__}.{key}"
                found[name] = found.get(name, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def unsound(model: nn.Module, targets: Sequence[Site]) -> list[str]:
    """A note about tensors that hold NaN or Inf outside of the targets, which may not; none
    without.

    Inf in a buffer is none: masks hold it.
    """
    known = {id(layer._parameters.get("weight")) for site in targets for layer in site.modules}
    own = {n: p for n, p in model.named_parameters() if id(p) not in known}
    found = [name for name, parameter in own.items() if not sound(parameter)]
    plain = ((n, b) for n, b in model.named_buffers() if type(b) is Tensor and not b.is_meta)
    found += [name for name, buffer in plain if bool(buffer.isnan().any())]
    if not found:
        return []
    return [f"{len(found)} tensors hold NaN or Inf, and keep them: {listed(found, 3)}"]


def held_elsewhere(model: nn.Module) -> set[int]:
    """Ids of the modules that a module also holds in a plain list, tuple or dict: calls through it
    reach the old layer, whatever takes its place. Whether there are such calls only data shows."""
    kept = (v for m in model.modules() for k, v in vars(m).items() if k not in OWN)
    held = (v.values() if isinstance(v, dict) else v for v in kept if isinstance(v, PLAIN))
    return {id(item) for items in held for item in items if isinstance(item, nn.Module)}


def told(counts: Mapping[str, int]) -> str:
    """A sentence about them; "" if there are none."""
    if not counts:
        return ""
    parts = listed((f"{name} ({count:,})" for name, count in counts.items()), 4)
    return f"in no layer that can be factored: {sum(counts.values()):,} parameters, {parts}"
