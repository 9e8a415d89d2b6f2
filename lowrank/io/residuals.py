"""Start adapters from what compression took away: W ≈ base + B A.

As LoftQ (arXiv 2310.08659) does for quantised weights: the base is what is stored, B A the best
approximation of rank r of the residual W − base, from its SVD; with statistics H = E[x xᵀ] in the
norm ‖· H^½‖. In either norm B A projects the residual, so that no layer is farther from W than its
base was. Adapters on the two factors of a layer cannot hold a residual of their product: factored
layers are merged first, and what results is peft's alone. Unlike there, B A starts at zero and the
best of the iterations is kept, not the last.
"""

from __future__ import annotations

import copy as copies
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..calibration.statistics import Calibration
from ..errors import LowrankError
from ..nn import Form
from ..nn.children import linear_weight
from ..walk import layouts
from ..walk.checks import check_module, check_no_adapters
from ..walk.surgery import copied, module_at, swap, unchanged_on_error
from .export_formats import to_dense

Quantize = Callable[[Tensor], Tensor]


def residual_adapters(
    model: nn.Module,
    dense: nn.Module | None = None,
    rank: Any = 16,
    *,
    calibration: Calibration | None = None,
    quantize: Quantize | None = None,
    iterations: int = 1,
    folder: str | Path | None = None,
    copy: bool = False,
) -> Any:
    """A peft model whose LoRA starts from the residual of every layer: W ≈ base + B A.

    Args:
        model: the base; factored layers of it are merged (`to_dense`), also those that get no
            adapter, such as experts that transformers holds in one parameter. Its layers may be
            quantised by others, if peft takes them. Changed in place unless `copy`.
        dense: the model with the weights W, under the same names; None: those of `model` itself.
        rank: of the adapters of all linear layers, which then scale by one; or a `peft.LoraConfig`
            that says more, with `init_lora_weights` and `use_dora` left as they are by default.
        calibration: statistics of the inputs, by the same names; a layer that saw nothing counts
            all its inputs alike.
        quantize: given a weight (out, in) in the dtype of the base, returns what the base is to
            hold, of the same shape, for every layer with an adapter; `torch.zeros_like` leaves all
            to the adapters.
        iterations: of LoftQ, with `quantize`: base = quantize(W − B A), B A from W − base.
        folder: where a transformers model's base is saved, which the adapter's config then names.
        copy: work on a deep copy.

    Returns:
        A `peft.PeftModel`, which peft alone saves, loads and merges.

    Raises:
        LowrankError: peft is missing; a model holds adapters; layers of the two do not fit; an
            adapter is no LoRA of a linear layer; there is no residual. The model is then as it
            was.
    """
    _check(model, dense, quantize, iterations)
    config = _config(rank)
    model = copied(model) if copy else model
    with _as_before_on_error(model):
        base = to_dense(model)
        live = _adapted(base, config)
        for name, layer in adapter_layers(base).items():
            wanted = _peer(name, layer, base if dense is None else dense)
            gram = _gram(name, calibration, wanted.shape[1])
            _start(name, layer, wanted, gram, quantize, iterations)
    if folder is not None:
        _save_base(base, folder)
        live.peft_config["default"].base_model_name_or_path = str(folder)
    return live


@contextmanager
def _as_before_on_error(model: nn.Module) -> Iterator[None]:
    """A context that restores what peft and `to_dense` write into a model if its body raises."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    written = [one for one in (model, getattr(model, "config", None)) if one is not None]
    held = [(one, dict(vars(one))) for one in written]
    try:
        with unchanged_on_error(model):
            yield
    except BaseException:
        for one, attributes in held:
            vars(one).clear()
            vars(one).update(attributes)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


def _check(
    model: nn.Module, dense: nn.Module | None, quantize: Quantize | None, iterations: int
) -> None:
    for one in (model, dense):
        if one is not None:
            check_module(one)
            check_no_adapters(one)
    if dense is None and quantize is None:
        raise LowrankError(
            "there is no residual: give the dense model, or quantize= for what the base is to hold"
        )
    if iterations < 1 or (iterations > 1 and quantize is None):
        raise LowrankError(
            f"iterations must be at least 1, and 1 without quantize=, got {iterations}"
        )
    if isinstance(model, Form):
        raise LowrankError("the model is itself one layer: adapters need a model around it")


def _config(rank: Any) -> Any:
    """A LoraConfig of one's own that starts at zero."""
    try:
        import peft
    except ImportError as error:
        raise LowrankError("adapters need peft: pip install peft") from error
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    if not isinstance(rank, peft.LoraConfig):
        raise LowrankError(f"rank must be a positive integer or a peft.LoraConfig, got {rank!r}")
    if rank.init_lora_weights is not True or rank.use_dora:
        raise LowrankError(
            "the residual sets where the adapters start: leave init_lora_weights=True and "
            f"use_dora=False, got {rank.init_lora_weights!r} and {rank.use_dora!r}"
        )
    return copies.deepcopy(rank)


def _adapted(model: nn.Module, config: Any) -> Any:
    import peft

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Which of the two layouts a layer has, peft sees and sets by itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set")
        return peft.get_peft_model(model, config)


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by the names that they have without."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (out, in) as it acts, float64."""
    if isinstance(layer, Form):
        return layer.dense_weight(torch.float32).double()
    plain = layouts.layout(layer) == "conv1d"
    return (layouts.matrix(layer) if plain else linear_weight(layer)).double()


@torch.no_grad()
def _peer(name: str, layer: Any, dense: nn.Module) -> Tensor:
    """The weight W (out, in) of the layer of that name, float64."""
    other = module_at(dense, name)
    inner = getattr(other, "base_layer", other)
    kind = inner.KIND if isinstance(inner, Form) else layouts.kind(inner)
    quantised = hasattr(inner, "in_features") and hasattr(inner, "out_features")
    if kind not in ("linear", None) or (kind is None and not quantised):
        raise LowrankError(
            f"{name} is a {type(inner).__name__}: residuals are those of linear layers; leave it "
            "out of target_modules"
        )
    weight = weight_of(inner)
    sizes = (layer.out_features, layer.in_features)
    if weight.shape != sizes:
        raise LowrankError(
            f"{name} has the shape {tuple(weight.shape)} in the dense model, {sizes} in the other: "
            "give the model that was compressed"
        )
    return weight


def _gram(name: str, calibration: Calibration | None, inputs: int) -> Tensor | None:
    stats = None if calibration is None else calibration.statistics.get(name)
    gram = stats.gram if stats is not None and stats.count else None
    if gram is not None and len(gram) != inputs:
        raise LowrankError(
            f"{name}: the calibration saw inputs of width {len(gram)}, the layer reads {inputs}: "
            "it was made for another model"
        )
    return gram


@torch.no_grad()
def _start(
    name: str,
    layer: Any,
    wanted: Tensor,
    gram: Tensor | None,
    quantize: Quantize | None,
    iterations: int,
) -> None:
    """Set base and adapter of a layer. Surplus rows of A keep their start; B is zero there."""
    base = layer.get_base_layer()
    rank = min(layer.r["default"], *wanted.shape)
    held, best = weight_of(base), float("inf")
    low = torch.zeros_like(wanted)
    for _ in range(iterations):
        if quantize is not None:
            held = _quantised(name, quantize, wanted - low, base)
        up, down = linalg.factor(wanted - held, rank, gram)
        low = (up @ down).double()
        error = linalg.squared_error(wanted, held + low, gram)
        if error < best:
            best, chosen = error, (held, up, down)
    held, up, down = chosen
    if quantize is not None:
        stored = held.T if layouts.layout(base) == "conv1d" else held
        # A new parameter: the old one is put back if a later layer fails.
        base.weight = nn.Parameter(stored.to(base.weight.dtype).contiguous(), requires_grad=False)
    layer.lora_A["default"].weight[:rank].copy_(down)
    layer.lora_B["default"].weight[:, :rank].copy_(up / layer.scaling["default"])


def _quantised(name: str, quantize: Quantize, weight: Tensor, base: nn.Module) -> Tensor:
    """What the base holds of a weight (out, in), float64, rounded as the base stores it."""
    place = layouts.matrix(base)
    given = quantize(weight.to(place.dtype))
    if not isinstance(given, Tensor) or given.shape != weight.shape:
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise LowrankError(
            f"{name}: quantize= must return a tensor {tuple(weight.shape)} as it was given, got "
            f"{got}; layers that are quantised already are passed as the model"
        )
    stored = given.to(place.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise LowrankError(f"{name}: quantize= returned numbers that are not finite")
    return stored.to(weight)


def _save_base(model: Any, folder: str | Path) -> None:
    """Save the model without its adapters."""
    layers = adapter_layers(model).values()
    swap(model, {id(layer): layer.base_layer for layer in layers})
    try:
        model.save_pretrained(folder)
    finally:
        swap(model, {id(layer.base_layer): layer for layer in layers})
