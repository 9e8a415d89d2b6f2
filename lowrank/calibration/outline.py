"""What a model does on one row of tokens, found without running it: for estimates beforehand.

Shapes alone are computed (torch's fake tensors), so that the weights may be on the meta device.
Layers that read one tensor, blocks and products are found as they are in a run. A model that cannot
be followed so is described by its layers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Site
from ..walk.surgery import modules_of
from .batches import Batch
from .observation import inside
from .running import FAILED, first_tensor, forward, predictions_of, quiet


@dataclass(frozen=True)
class Outline:
    """One row of tokens in a model. FLOPs are multiplications and additions.

    Attributes:
        traced: whether the model could be followed; else each layer counts as reading a tensor of
            its own at every token, and attention is left out.
        flops: of one forward pass.
        blocks: FLOPs by name of block, of the chain that holds most sites; empty without one.
        groups: names of the sites that read one tensor, in the order of calls.
        tokens: by site, number of input vectors.
        hidden: numbers in the output of a block.
        predictions: numbers in the model's predictions.
    """

    traced: bool
    flops: int
    blocks: dict[str, int]
    groups: tuple[tuple[str, ...], ...]
    tokens: dict[str, int]
    hidden: int
    predictions: int


def outlined(model: nn.Module, sites: Sequence[Site], length: int) -> Outline:
    """The outline for a row of `length` token ids.

    Args:
        sites: of the model, embeddings aside.
    """
    blocks = _blocks(model, sites)
    try:
        return _traced(model, sites, length, blocks)
    except FAILED:
        return _untraced(sites, length, blocks)


def _traced(model: nn.Module, sites: Sequence[Site], length: int, blocks: Sequence[str]) -> Outline:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)
    modules = {site.name: site.module for site in sites}
    parts = dict(modules_of(model))
    plain = sdpa_kernel(SDPBackend.MATH)  # the products of fused attention are not counted
    with fake, quiet(model), plain, counter:
        with _first_inputs(modules) as read, _outputs(parts, blocks[:1]) as hidden:
            output = forward(model, _row(model, length))
        predictions = predictions_of(model, output)[0].numel()
    counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    root = type(model).__name__
    groups: dict[int, list[str]] = {}
    for name, tensor in read.items():
        groups.setdefault(id(tensor), []).append(name)
    return Outline(
        traced=True,
        flops=counter.get_total_flops(),
        blocks={name: counts.get(f"{root}.{name}", 0) for name in blocks},
        groups=tuple(map(tuple, groups.values())),
        tokens={name: tensor.numel() // tensor.shape[-1] for name, tensor in read.items()},
        hidden=sum(tensor.numel() for tensor in hidden),
        predictions=predictions,
    )


def _untraced(sites: Sequence[Site], length: int, blocks: Sequence[str]) -> Outline:
    flops = {site.name: 2 * length * site.cost.macs for site in sites}
    own = {b: sum(n for name, n in flops.items() if inside(name, b)) for b in blocks}
    held = [site.shape[1] for site in sites if any(inside(site.name, block) for block in blocks)]
    return Outline(
        traced=False,
        flops=sum(flops.values()),
        blocks=own,
        groups=tuple((site.name,) for site in sites),
        tokens={site.name: length for site in sites},
        hidden=length * min(held, default=0),
        predictions=length * max((site.shape[0] for site in sites), default=0),
    )


def _row(model: nn.Module, length: int) -> Batch:
    """One row of token ids, on the device of the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"input_ids": ids, "labels": ids}
    return ids


def _blocks(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """The members with sites of the ordered container that has most sites in several of them."""
    best: tuple[int, tuple[str, ...]] = (0, ())
    for name, container in modules_of(model):
        if isinstance(container, nn.ModuleList | nn.Sequential):
            members = [f"{name}.{key}".lstrip(".") for key in container._modules]
            held = {m: sum(inside(site.name, m) for site in sites) for m in members}
            chosen = tuple(member for member, count in held.items() if count)
            if len(chosen) > 1:
                best = max(best, (sum(held.values()), chosen), key=lambda each: each[0])
    return best[1]


@contextmanager
def _first_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """A context in which the first input of each module is noted, by name, in order of calls."""
    read: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = first_tensor((args, kwargs))
            if tensor is not None:
                read.setdefault(name, tensor)  # kept alive, so that no other takes its id

        return note

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _outputs(parts: dict[str, nn.Module], names: Sequence[str]) -> Iterator[list[Tensor]]:
    """A context in which the first tensor of what these modules return is noted."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            found.append(tensor)

    handles = [parts[name].register_forward_hook(note) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
