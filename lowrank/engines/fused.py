"""A layer of an inference engine, made of the layers of a checkpoint that it fuses.

Engines compute q, k and v, or gate and up, in one layer, and cut layers over devices. Each part may
be dense or factored, with a rank of its own. What reads the same input is stacked into one product:
the `down` of plain, shared and output-pivoted factors, and the weights of dense parts.

A checkpoint's tensors are kept whole as they arrive (`Arriving`), and cut once all are there, since
pivots do not follow the cuts: a part whose pivoted side is cut becomes plain factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..nn import FACTORED, LowRankLinear, PivotedLinear, SharedLowRankLinear, build
from ..nn.split_linear import SplitLinear
from .products import Fused, Matrix, PivotedInputs, PivotedOutputs, Product

Spec = Mapping[str, Any]
SERVED = (LowRankLinear, PivotedLinear, SharedLowRankLinear)
SPLIT = SplitLinear.__name__
SHARDS: Mapping[Any, int] = {None: 0, "q": 0, "k": 1, "v": 2}  # others are numbers


@dataclass(frozen=True)
class Cut:
    """The share of a layer that one device computes.

    Attributes:
        outputs: of each part, its rows here, in order; None: all of them.
        inputs: the columns here; None: all.
    """

    outputs: Sequence[Sequence[slice] | None]
    inputs: slice | None = None


def cut_of(
    parts: int,
    inputs: tuple[int, int],
    outputs: Sequence[int],
    whole: int,
    *,
    rank: int,
    world: int,
    replicas: int = 1,
) -> Cut:
    """The cut of one of `world` devices, in equal shares.

    Args:
        parts: of the checkpoint: as many as `outputs`, or one, if that holds all of them.
        inputs: the layer's width here, and in all.
        outputs: here, of each part.
        whole: outputs in all, those that several devices hold counted as often.
        replicas: how many devices hold the same second and third part (keys and values).

    Raises:
        LowrankError: the parts are not those that the engine fuses.
    """
    if parts not in (1, len(outputs)):
        raise LowrankError(f"{parts} layers of the checkpoint for {len(outputs)} of the engine's")
    here, all_inputs = inputs
    columns = slice(rank * here, (rank + 1) * here) if here < all_inputs else None
    if sum(outputs) >= whole:
        return Cut([None] * parts, columns)
    slices, start = [], 0
    for index, size in enumerate(outputs):
        times = replicas if index in (1, 2) else 1
        first = (rank // times) * size + (start if parts == 1 else 0)
        slices.append(slice(first, first + size))
        start += size * world // times
    return Cut([slices] if parts == 1 else [[part] for part in slices], columns)


@dataclass(frozen=True)
class Part:
    """A layer of the checkpoint.

    Attributes:
        spec: None where it is dense.
        path: its name below the engine's layer, if the checkpoint fuses and lowrank split it.
    """

    name: str
    spec: Spec | None
    path: str = ""

    @property
    def kind(self) -> str:
        return "" if self.spec is None else str(self.spec["type"])

    def tensors(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of each tensor in the checkpoint; None: whatever the engine's layer has."""
        if self.spec is None:
            return {"weight": None}
        return {
            key: tuple(t.shape) for key, t in build(dict(self.spec), self.name).state_dict().items()
        }


def parts_of(names: Sequence[str], specs: Mapping[str, Spec], engine: str) -> list[Part]:
    """The parts of a layer of the engine; none if all of them are dense.

    Raises:
        LowrankError: one has a form that is not served, or shares a basis outside of the layer.
    """
    whole = specs.get(names[0]) if len(names) == 1 else None
    if whole is not None and whole["type"] == SPLIT:
        paths = [str(i) for i in range(len(whole["sizes"]))]
        parts = [Part(f"{names[0]}.{i}", specs.get(f"{names[0]}.{i}"), i) for i in paths]
    else:
        parts = [Part(name, specs.get(name)) for name in names]
    if all(part.spec is None for part in parts):
        return []
    served = {cls.__name__ for cls in SERVED}
    for part in parts:
        if part.spec is not None and part.kind not in served:
            raise LowrankError(refusal(part, engine))
        if part.spec is not None and part.spec.get("layout", "linear") != "linear":
            raise LowrankError(
                f"{part.name} stands for a layer that holds its matrix transposed, "
                f"and {engine} turns all its tensors: serve what `lowrank merge` writes"
            )
        owner = None if part.spec is None else part.spec.get("shared")
        if owner is not None and owner not in names:
            raise LowrankError(
                f"{part.name} shares the basis of {owner}, which {engine} computes in another "
                "layer: compress without basis sharing, or serve what `lowrank merge` writes"
            )
    return parts


def refusal(part: Part, engine: str) -> str:
    """Why a part is not served, and what to do."""
    form = FACTORED.get(part.kind)
    stored = "" if form is None else f" (storage {form.STORAGE!r})"
    return (
        f"{part.name} is a {part.kind}{stored}, which {engine} cannot be given: compress with "
        "storage='factors' or 'pivoted' and leave embeddings dense, or serve the dense model that "
        "`lowrank merge` writes"
    )


class Arriving:
    """Collects a layer's tensors, under the names that they have in the checkpoint."""

    def __init__(self, prefix: str, parts: Sequence[Part]) -> None:
        self.prefix, self.parts = prefix, parts
        self._held: list[dict[str, Tensor]] = [{} for _ in parts]

    def names(self) -> list[str]:
        """Where tensors may arrive, `weight` among them: dense parts' and those that guard the
        place of a factored layer. A bias of the layer's own name is the engine's to load."""
        held = [key for part in self.parts if not part.path for key in part.tensors()]
        own = [key for key in held if key != "bias"]
        below = [f"{p.path}.{k}" for p in self.parts if p.path for k in (*p.tensors(), "bias")]
        return list(dict.fromkeys(["weight", *own, *below]))

    def keep(self, name: str, tensor: Tensor, shard: Any = None) -> None:
        """Take one tensor of the part that `shard` says.

        Raises:
            LowrankError: there is no such part, or tensor of it, or it has another shape.
        """
        if self.parts[0].path and name == "weight" and tensor.numel() == 1:
            return  # the guard of a split layer's place
        path, _, rest = name.partition(".")
        index = SHARDS.get(shard, shard)
        if self.parts[0].path and path.isdecimal():
            index, name = int(path), rest
        if not isinstance(index, int) or not 0 <= index < len(self.parts):
            raise LowrankError(f"{self.prefix}: no part {shard!r} among {len(self.parts)}")
        part = self.parts[index]
        if part.spec is not None and name == "weight" and tensor.numel() == 1:
            return  # the guard of a factored layer's place
        shapes = part.tensors()
        if part.path:
            shapes = {"bias": None, **shapes}
        if name not in shapes:
            raise LowrankError(
                f"{part.name}.{name} is in the files, but the config says {part.kind or 'dense'}"
            )
        shape = shapes[name]
        if shape is not None and tuple(tensor.shape) != shape:
            raise LowrankError(
                f"{part.name}.{name} has shape {tuple(tensor.shape)}, the config says {shape}"
            )
        self._held[index][name] = tensor.detach().clone()

    def fused(
        self, cut: Cut, dtype: torch.dtype, device: torch.device
    ) -> tuple[Fused, list[Tensor | None]]:
        """The layer on one device, and each part's bias there, where it arrived with the factors.

        Raises:
            LowrankError: a tensor never arrived.
        """
        missing = [
            f"{part.name}.{key}"
            for part, held in zip(self.parts, self._held, strict=True)
            for key in part.tensors()
            if key not in held and key != "bias"  # the engine's own, by this name
        ]
        if missing:
            raise LowrankError(f"{len(missing)} tensors are not in the files: {listed(missing, 3)}")
        pieces, rows, biases = nn.ModuleList(), [], []
        for index, (part, held) in enumerate(zip(self.parts, self._held, strict=True)):
            owner = None if part.spec is None else part.spec.get("shared")
            at = index if owner is None else [p.name for p in self.parts].index(owner)
            first, piece = _piece(part, held, _tensors(held, dtype, device), cut, index, at)
            pieces.append(piece)
            rows.append(first)
            bias = held.get("up.bias", held.get("bias"))
            biases.append(
                None if bias is None else _rows(bias.to(device, dtype), cut.outputs[index])
            )
        return Fused(rows, pieces), biases


def _tensors(
    held: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    return {
        key: tensor.to(device, dtype if tensor.is_floating_point() else torch.long)
        for key, tensor in held.items()
    }


def _piece(
    part: Part,
    held: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    cut: Cut,
    index: int,
    at: int,
) -> tuple[Tensor | None, nn.Module]:
    """A part's rows of the stacked product, None if it has none of its own, and what follows it.

    Args:
        at: the part whose rows of the product it reads.
    """
    outputs = cut.outputs[index]
    if part.spec is None:
        return _columns(_rows(tensors["weight"], outputs), cut.inputs), Product(at)
    if part.kind == "SharedLowRankLinear":
        return None, Product(at, _rows(tensors["up.weight"], outputs))
    if part.kind == "LowRankLinear":
        return _columns(tensors["down.weight"], cut.inputs), Product(
            at, _rows(tensors["up.weight"], outputs)
        )
    mix, order = tensors["mix.weight"], tensors["order"]
    eye = torch.eye(part.spec["rank"], dtype=mix.dtype, device=mix.device)
    if part.spec["side"] == "out":
        down = _columns(tensors["down.weight"], cut.inputs)
        if outputs is None:
            return down, PivotedOutputs(at, mix, order)
        return down, Product(at, _rows(torch.cat((eye, mix)).index_select(0, order), outputs))
    up = _rows(tensors["up.weight"], outputs)
    if cut.inputs is None:
        return None, PivotedInputs(mix, order, up)
    down = torch.cat((eye, mix), 1).index_select(1, order.argsort())
    return _columns(down, cut.inputs), Product(at, up)


def _rows(tensor: Tensor, slices: Sequence[slice] | None) -> Tensor:
    return tensor if slices is None else torch.cat([tensor[part] for part in slices])


def _columns(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None else tensor[:, part]


def placeholders(layer: nn.Module, arriving: Arriving, dtype: torch.dtype) -> None:
    """Empty parameters of the layer under the names in the checkpoint, which take what arrives.

    An engine's loader calls their `weight_loader(parameter, tensor, shard)`; the shard may also be
    an attribute of the tensor.
    """
    for name in arriving.names():
        *path, last = name.split(".")
        place = layer
        for step in path:
            if not hasattr(place, step):
                place.add_module(step, nn.Module())
            place = getattr(place, step)
        empty: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        empty.weight_loader = partial(_arrive, arriving, name)
        place.register_parameter(last, empty)


def _arrive(arriving: Arriving, name: str, _: Tensor, tensor: Tensor, shard: Any = None) -> None:
    arriving.keep(name, tensor, getattr(tensor, "shard_id", None) if shard is None else shard)


def put_fused(
    layer: Any,
    arriving: Arriving,
    cut: Cut,
    inputs: int,
    outputs: Sequence[int],
    dense: Any = None,
) -> None:
    """Put what arrived into an engine's layer, as `layer.lowrank`, in place of the placeholders.

    Args:
        inputs, outputs: the layer's width on this device, and that of each part of its outputs.
        dense: the engine's method of dense layers, for the products; None: torch's.

    Raises:
        LowrankError: a tensor is missing, or the widths differ.
    """
    device, dtype = layer.weight.device, layer.weight.dtype
    fused, biases = arriving.fused(cut, dtype, device)
    for matrix in fused.modules():
        if isinstance(matrix, Matrix) and dense is not None:
            matrix.give(dense)
    with torch.no_grad():
        width = fused(torch.zeros(1, inputs, dtype=dtype, device=device)).shape[-1]
        if width != sum(outputs):
            raise LowrankError(
                f"{arriving.prefix} has {sum(outputs)} outputs here, its parts have {width}"
            )
        start = 0
        for bias, size in zip(biases, outputs if len(biases) > 1 else [width], strict=True):
            if bias is not None:
                if layer.bias is None:
                    raise LowrankError(f"{arriving.prefix} has no bias, but its factors have one")
                layer.bias[start : start + size].copy_(bias)
            start += size
    for name in arriving.names():
        first = name.partition(".")[0]
        if first != "weight" and hasattr(layer, first):
            delattr(layer, first)
    layer.lowrank = fused
