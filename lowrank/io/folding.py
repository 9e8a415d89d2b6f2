"""Adapters beside whole layers, back into factors: up·down + s·B A = [up, s·B]·[down; A]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..nn import LowRankLinear
from ..nn.lowrank_linear import DownUp, own
from ..nn.lowrank_sparse import LowRankSparseLinear
from ..walk import layouts
from ..walk.checks import adapted_layers, check_module, check_no_adapters
from ..walk.surgery import factored, module_at, swap
from .residuals import adapter_layers, weight_of

SLACK = 1e-6  # share by which a base may differ from the weight that it was made of, rounding aside


def fold_adapters(live: Any, model: nn.Module | None = None) -> nn.Module:
    """Back into factors: those of the layers, widened by those of the adapters, are their sum.

    A layer of rank r with an adapter of rank l gets rank r + l, exactly: down = [down; A], up =
    [up, s B]. To dense layers lead peft's own `merge_and_unload` and `to_dense`.

    Args:
        live: as `residual_adapters` returns it, or with plain LoRA beside the merged layers.
        model: the factored model that was merged into the base; changed in place. Its dense layers
            take their adapters into their weights. None: every base is zero, and each adapter
            becomes a factored layer, in place of the adapted one.

    Returns:
        The factored model, without adapters.

    Raises:
        LowrankError: something other than LoRA is trained, a base is not the layer's weight, or a
            layer is stored in a form whose factors cannot be widened. Nothing is then changed.
    """
    layers = _foldable(live)
    if model is None:
        base: nn.Module = live.get_base_model()
        made = {id(layer): _alone(name, layer) for name, layer in layers.items()}
        return swap(base, made)
    check_module(model)
    check_no_adapters(model)
    targets = {name: module_at(model, name) for name in layers}
    readers = [m.owner for m in factored(model).values() if m.owner is not None]
    for name, target in targets.items():
        _check_widens(name, target, layers[name], any(target is owner for owner in readers))
    with torch.no_grad():
        for name, target in targets.items():
            down, up = _factors(layers[name])
            _widen(target, down, up)
            bias = layouts.bias(layers[name].get_base_layer())
            if bias is not None:
                layouts.bias(target).data.copy_(bias)  # type: ignore[union-attr]
    return model


def _foldable(live: Any) -> dict[str, Any]:
    """The adapted layers, if nothing but plain LoRA was added.

    Raises:
        LowrankError: see `fold_adapters`.
    """
    base = live.get_base_model() if hasattr(live, "get_base_model") else None
    if base is None:
        raise LowrankError(f"expected a peft model with adapters, got {type(live).__name__}")
    layers = adapter_layers(base)
    other = set(adapted_layers(base)) - layers.keys()
    inside = tuple(f"{name}." for name in layers)
    odd = sorted(name for name in other if not name.startswith(inside))
    for name, layer in layers.items():
        plain = all(hasattr(layer, part) for part in ("lora_A", "lora_B", "scaling"))
        plain = plain and bool(_active(layer)) and not layer.merged and not layer.disable_adapters
        plain = plain and not any(a in getattr(layer, "lora_variant", ()) for a in _active(layer))
        plain = plain and not any(layer.lora_bias[a] for a in _active(layer))
        odd += [] if plain and layouts.kind(layer.get_base_layer()) == "linear" else [name]
    if odd or not layers:
        raise LowrankError(
            f"only plain, active LoRA of linear layers can become factors, got else at "
            f"{listed(odd, 3) or 'none of the layers'}: merge with peft (live.merge_and_unload())"
        )
    return layers


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """down (l, in) and up (out, l) of all active adapters of a layer."""
    names = _active(layer)
    down = torch.cat([layer.lora_A[name].weight for name in names])
    up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], 1)
    return down.detach(), up.detach()


def _alone(name: str, layer: Any) -> nn.Module:
    """The adapters of a layer whose base is zero, as a factored layer."""
    base = layer.get_base_layer()
    if bool(weight_of(base).any()):
        raise LowrankError(
            f"the base of {name} is not zero: give the factored model that was merged into it, or "
            "merge with peft (live.merge_and_unload())"
        )
    down, up = (factor.to(base.weight.dtype) for factor in _factors(layer))
    made = LowRankLinear.from_factors(down, up, layouts.bias(base))
    made.layout = layouts.layout(base)
    return made.train(layer.training)


def _check_widens(name: str, target: nn.Module, layer: Any, is_owner: bool) -> None:
    """Raises LowrankError unless the adapter can go into that layer, the base of which it is."""
    plain = isinstance(target, DownUp) and not target.not_linear and not is_owner
    mixed = isinstance(target, LowRankSparseLinear) and target.gamma is not None
    if layouts.kind(target) != "linear" and (not plain or mixed):
        why = ", whose basis others read," if is_owner else ""
        raise LowrankError(
            f"{name} is a {type(target).__name__}{why} and cannot be widened: merge with peft "
            "(live.merge_and_unload()) and compress the result"
        )
    base = layer.get_base_layer()
    held, weight = weight_of(base), weight_of(target)
    rounding = torch.finfo(base.weight.dtype).eps / 2 if base.weight.is_floating_point() else 0.0
    near = max(SLACK, rounding) * weight.norm()
    if held.shape != weight.shape or (held - weight).norm() > near:
        raise LowrankError(
            f"the base of {name} is not the weight of that layer in the model: give the factored "
            "model that was merged into it, unchanged, or merge with peft "
            "(live.merge_and_unload())"
        )


def _widen(target: Any, down: Tensor, up: Tensor) -> None:
    """Add up · down to a layer, in place: beside its factors, or to its dense weight."""
    if not isinstance(target, DownUp):
        weight = layouts.matrix(target)
        weight.copy_(weight.double() + up.double() @ down.double())
        return
    for child, more, axis in ((target.down, down, 0), (target.up, up, 1)):
        wide = own(torch.cat([child.weight, more.to(child.weight)], axis))
        child.weight = wide.requires_grad_(child.weight.requires_grad)
    target.down.out_features = target.up.in_features = len(target.down.weight)
