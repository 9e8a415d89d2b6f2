"""Whether a subclass of a torch layer computes what its base computes: tried out, not guessed.

The trial runs on a shallow copy with a few random weights in float64: it needs no memory, works on
the meta device and changes neither the layer nor the global random state.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDE, NARROW = 5, 7  # inputs and outputs of the trial's weight
NEAR = 1e-9  # relative; far above rounding in float64, far below any purpose
TABLES = (nn.Embedding, nn.EmbeddingBag)
Base = type[nn.Module]


def difference(module: nn.Module, base: Base) -> str:
    """How a layer of a subclass differs from its `base`; "" if it computes the same.

    It does if it has no other tensors, children or state, if its forward pass takes the same
    arguments, and if outputs and gradients at random inputs agree in training and in evaluation.
    """
    name, parent = type(module).__name__, base.__name__
    extra = sorted({*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"})
    scale = _scale(module, base)
    if scale:
        return f"{name} multiplies what it reads by {scale:.4g}, which factors would lose"
    if extra:
        return f"{name} has {', '.join(extra)} beside the weight of its base nn.{parent}"
    own = [key for key in ("__call__", "get_extra_state") if _overrides(type(module), key)]
    if own:
        return f"{name} overrides {' and '.join(own)} of nn.Module"
    if _arguments(type(module)) != _arguments(base):
        return f"{name} takes other arguments than its base nn.{parent}"
    for training in (False, True):
        try:
            same = all(_agree(module, base, x, training) for x in _inputs(module, base))
        except Exception as error:  # whatever a foreign forward pass raises
            return f"{name} is a subclass of nn.{parent} that could not be tried: {error!r:.80}"
        if not same:
            when = "in training" if training else "for random inputs"
            return f"{name} does not compute what its base nn.{parent} does {when}"
    return ""


def _overrides(cls: type, key: str) -> bool:
    return getattr(cls, key) is not getattr(nn.Module, key)


def _arguments(cls: type) -> list[tuple[object, object]]:
    """Kind and default of each argument of a forward pass; names may differ."""
    parameters = inspect.signature(cls.forward).parameters.values()  # type: ignore[attr-defined]
    return [(parameter.kind, parameter.default) for parameter in parameters]


def _agree(module: nn.Module, base: Base, x: Tensor, training: bool) -> bool:
    """Whether outputs and gradients of a layer and of its base agree at this input."""
    found: list[list[Tensor]] = []
    for cls in (type(module), base):
        # Where a trial runs must not matter: in inference mode there would be no gradients.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # not those of accelerators
            small = _small(module, base, training)
            given = x.clone().requires_grad_(x.is_floating_point())
            y: Tensor = cls.forward(small, given)
            leaves = [*small.parameters(), *([given] if x.is_floating_point() else [])]
            slopes = torch.autograd.grad(y.sin().sum(), leaves)
            found.append([y.detach(), *slopes])
    return len(found[0]) == len(found[1]) and all(map(_near, *found))


def _near(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and bool((one - other).norm() <= NEAR * other.norm())


def _small(module: nn.Module, base: Base, training: bool) -> nn.Module:
    """A shallow copy with a few random weights; convolutions keep their shape."""
    small = copy.copy(module)
    weight = module._parameters["weight"]
    shape = list(weight.shape)  # type: ignore[union-attr]
    if issubclass(base, TABLES):
        shape = [NARROW, WIDE]
        sizes = {"num_embeddings": NARROW, "embedding_dim": WIDE}
    elif len(shape) == 2 and issubclass(base, nn.Linear):
        shape, sizes = [NARROW, WIDE], {"in_features": WIDE, "out_features": NARROW}
    elif len(shape) == 2:  # transformers' Conv1D
        shape, sizes = [WIDE, NARROW], {"nx": WIDE, "nf": NARROW}
    else:
        sizes = {}
    if "padding_idx" in vars(module) and module.padding_idx is not None:
        sizes["padding_idx"] = 1
    outputs = NARROW if sizes else shape[0]
    bias = module._parameters.get("bias")
    fresh = {"weight": _drawn(*shape), "bias": None if bias is None else _drawn(outputs)}
    held = {key: nn.Parameter(t) if t is not None else None for key, t in fresh.items()}
    kept = {key: held[key] for key in module._parameters if key in held}
    vars(small).update(sizes, _parameters=kept, training=training)
    return small


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64, device="cpu")


def _inputs(module: nn.Module, base: Base) -> list[Tensor]:
    """A few inputs of different shapes, large numbers among them."""
    if issubclass(base, TABLES):
        ids = torch.arange(NARROW, device="cpu")
        return [ids[None], ids.flip(0)[:6].view(2, 3)]
    if not hasattr(module, "kernel_size"):
        return [_drawn(3, WIDE), 50 * _drawn(2, 4, WIDE, seed=1)]
    reach = [
        (size - 1) * spread + 1
        for size, spread in zip(module.kernel_size, module.dilation, strict=True)  # type: ignore[arg-type]
    ]
    channels = int(module.in_channels)  # type: ignore[arg-type]
    sides = ([side + 3 for side in reach], [side + 4 for side in reach])
    return [_drawn(2, channels, *side, seed=i) for i, side in enumerate(sides)]


def _scale(module: nn.Module, base: Base) -> float:
    """The factor between a table and its base, as of scaled embeddings; 0 if there is none."""
    if not issubclass(base, nn.Embedding):
        return 0.0
    numbers: Mapping[str, Tensor | None] = module._buffers
    known = [n for n in numbers.values() if n is not None and n.numel() == 1]
    if len(known) != 1 or known[0].is_meta:
        return 0.0
    try:
        x = _inputs(module, base)[0]
        with torch.no_grad():
            small: Any = _small(module, base, training=False)
            y, plain = type(module).forward(small, x), base.forward(small, x)
    except Exception:  # it is refused anyway, with another reason
        return 0.0
    factor = float((y * plain).sum() / plain.square().sum())
    return factor if bool((y - factor * plain).norm() <= 1e-4 * plain.norm()) else 0.0
