"""The layers that the laws are tried on, and what the laws share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..nn.geometry import CONVS, Geometry
from ..types import Cost, Curve, Factored, Method, Option, Site, Size, Statistics
from ..walk import layouts
from .memo import Memo, snapshot

Matrix = NDArray[np.float64]
Planted = Callable[[int, int, torch.Generator], tuple[Tensor, Size]]
MANY = 16  # options of a curve that the laws look at for which all of them would take long
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """A layer with all that a method may ask for.

    A method's curve and modules are made once for a case, and all laws read the same ones: a law
    that changes a module works on a copy of it, one that needs another run on a `fresh` case.

    Attributes:
        name: what is special about it, and its dtype: for messages.
        site: with the live module.
        stats: of `inputs`, as a calibration would have gathered them.
        inputs: what the layer was run on, (tokens, in), in its dtype; ids (tokens,) of a table;
            samples (samples, channels, *space) of a convolution.
    """

    name: str
    site: Site
    stats: Statistics
    inputs: Tensor
    _memo: Memo[Method, Factored] = field(
        default_factory=Memo, init=False, repr=False, compare=False
    )

    @property
    def module(self) -> nn.Module:
        return self.site.module

    @property
    def rounding(self) -> float:
        """What rounding to the layer's dtype may add to an error, relatively."""
        return 8 * torch.finfo(layouts.matrix(self.module).dtype).eps

    def outputs(self, weight: Tensor, x: Tensor) -> Tensor:
        """What a layer of this weight gives for inputs like `inputs`."""
        if self.site.kind == "embedding":
            return nn.functional.embedding(x, weight)
        if self.site.kind == "conv":
            dense = Geometry.of(self.module).dense(weight, shift := layouts.bias(self.module))
            dense.bias = shift  # type: ignore[assignment]
            outputs: Tensor = dense(x)
            return outputs
        return nn.functional.linear(x, weight, layouts.bias(self.module))

    def batch(self) -> Tensor:
        """Four of the inputs, with an axis more where a layer takes any number of axes."""
        some = self.inputs[:4]
        return some if self.site.kind == "conv" else some.reshape(2, 2, *some.shape[1:])

    def positions(self, output: Tensor) -> int:
        """Output vectors in an output."""
        return output.numel() // self.site.shape[0] if self.site.kind == "conv" else len(output)

    def at(self, option: Option) -> str:
        """Where a law was broken."""
        return f"{self.name}, size {option.size}"

    def fresh(self) -> Case:
        """The same layer, statistics and inputs, of which nothing was made yet."""
        return replace(self)

    def curve(self, method: Method) -> Curve:
        """Of this layer, made once for a method object."""
        return self._memo.curve(method, self._curve, self._look)

    def built(self, method: Method, most: int | None = None) -> Iterator[tuple[Option, Factored]]:
        """The method's options but for the dense one, each with its module, made once.

        No copies: a law has to see on which memory a tensor lies.

        Args:
            most: of a curve of more options only so many, evenly, with the first and the last.
        """
        options = factored_options(self.curve(method), self.name, most)
        return self._memo.built(method, options, self._factored, self._look)

    def changed(self, method: Method) -> list[str]:
        """What the method changed that it was only to read, up to now."""
        return self._memo.changed(method)

    def _look(self) -> Mapping[str, Any]:
        return snapshot(self.module, self.stats)

    def _curve(self, method: Method) -> Curve:
        missing = [need for need in method.needs if getattr(self.stats, need, None) is None]
        require(not missing, f"{self.name}: the suite has no statistics {missing}")
        return method.curve(self.site, self.stats)

    def _factored(self, method: Method, option: Option) -> Factored:
        return factored_module(method.factor(self.module, option, self.stats), self.at(option))


def linear_case(
    name: str,
    weight: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bias: bool = True,
    conv1d: bool = False,
    tokens: int = 64,
    dead: int | None = None,
    part: bool = False,
) -> Case:
    """A case around a weight (out, in): an nn.Linear, or transformers' Conv1D.

    Args:
        tokens: fewer than `in` make the Gram matrix singular.
        dead: an input that is always zero.
        part: the weight is a transposed view of one of several, as that of an expert may be.
    """
    out_features, in_features = weight.shape
    inputs = _normal(tokens, in_features, 1) @ _normal(in_features, in_features, 2) / in_features
    if dead is not None:
        inputs[:, dead] = 0
    inputs = inputs.to(device, dtype)
    dense = _conv1d(weight) if conv1d else nn.Linear(in_features, out_features, bias=bias)
    module = dense.to(device, dtype).eval()
    with torch.no_grad():
        layouts.matrix(module).copy_(weight)
        shift = layouts.bias(module)
        if shift is not None:
            shift.copy_(_normal(out_features, 1, 3)[:, 0])
    if part:
        _hold_part(module, transposed=True)
    exact = inputs.double()
    gradients = _normal(tokens, out_features, 21) @ _normal(out_features, out_features, 22)
    gradients = gradients.to(device)
    stats = Statistics(
        count=tokens,
        gram=exact.T @ exact / tokens,
        mean=exact.mean(0),
        out_gram=gradients.T @ gradients / tokens,
        row_fisher=gradients.square().mean(0),
    )
    size = out_features * in_features
    cost = Cost(size, size * dtype.itemsize, size)
    site = Site("layer", ("layer", "alias"), "linear", (module,), (out_features, in_features), cost)
    return Case(f"{name}, {str(dtype).removeprefix('torch.')}", site, stats, inputs)


def conv_case(
    name: str,
    weight: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    kernel: tuple[int, ...] = (3, 2),
    space: int = 5,
    part: bool = False,
    **options: Any,
) -> Case:
    """A case around a convolution with the matrix `weight` (O, I · K).

    Args:
        kernel: one number a dimension.
        space: extent of the samples in each dimension.
        part: the weight and the bias are views of those of several groups.
        options: stride, padding, dilation, padding_mode and bias, as of nn.Conv2d.
    """
    channels = weight.shape[1] // math.prod(kernel)
    make: Any = CONVS[len(kernel)]
    module = make(channels, len(weight), kernel, **options).to(device, dtype).eval()
    with torch.no_grad():
        layouts.matrix(module).copy_(weight)
        if module.bias is not None:
            module.bias.copy_(_normal(len(weight), 1, 3)[:, 0])
    if part:
        _hold_part(module)
    rng = torch.Generator().manual_seed(23)
    inputs = torch.randn(6, channels, *[space] * len(kernel), generator=rng, dtype=torch.float64)
    inputs = inputs.to(device, dtype)
    rows = torch.cat(list(layouts.chunks(module, inputs.double())))
    gradients = _normal(len(rows), len(weight), 21).to(device)
    stats = Statistics(
        count=len(rows),
        gram=rows.T @ rows / len(rows),
        mean=rows.mean(0),
        out_gram=gradients.T @ gradients / len(rows),
        row_fisher=gradients.square().mean(0),
    )
    size = weight.numel()
    cost = Cost(size, size * dtype.itemsize, size)
    shape = (len(weight), weight.shape[1])
    site = Site("conv", ("conv", "alias"), "conv", (module,), shape, cost)
    return Case(f"{name}, {str(dtype).removeprefix('torch.')}", site, stats, inputs)


def _hold_part(module: nn.Module, *, transposed: bool = False) -> None:
    """Let a layer's parameters be the second third of larger ones, with the same values."""
    for name, own in list(module.named_parameters()):
        value = own.detach()
        turn = transposed and value.ndim > 1
        several = torch.stack([torch.full_like(value.T if turn else value, 7.0)] * 3)
        several[1] = value.T if turn else value
        setattr(module, name, nn.Parameter(several[1].T if turn else several[1]))


def low_rank_weight(rank: int, *, positive: bool = False) -> Planted:
    """A weight of this rank, which a low-rank method must reproduce at this size.

    Args:
        positive: its left factor is, for methods that make it so.
    """

    def planted(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
        up = torch.randn(out_features, rank, generator=rng, dtype=torch.float64)
        up = up.abs() if positive else up
        return up @ torch.randn(rank, in_features, generator=rng, dtype=torch.float64), (rank,)

    return planted


def require(condition: bool, otherwise: str) -> None:
    """An assertion that `python -O` keeps."""
    if not condition:
        raise AssertionError(otherwise)


def factored_module(new: nn.Module, where: str) -> Factored:
    if not isinstance(new, Factored):
        raise AssertionError(f"{where}: {type(new).__name__} is no Factored: see lowrank.types")
    return new


def module_of(new: Factored) -> nn.Module:
    if not isinstance(new, nn.Module):
        raise AssertionError(f"{type(new).__name__} is no nn.Module")
    return new


def factored_options(curve: Curve, where: str, most: int | None = None) -> list[Option]:
    """All but the dense one, or `most` of them, evenly spread."""
    options = [option for option in curve.options if not option.dense]
    require(bool(options), f"{where}: the curve holds no form smaller than the dense weight")
    if most is None or len(options) <= most:
        return options
    return [options[round(i * (len(options) - 1) / (most - 1))] for i in range(most)]


def numbers(tensor: Tensor) -> Matrix:
    return np.asarray(tensor.detach().double().cpu().numpy())


def _conv1d(weight: Tensor) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer: nn.Module = Conv1D(*weight.shape)
    return layer


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def embedding_case(
    name: str,
    table: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    head: bool = False,
    padding: int | None = None,
) -> Case:
    """A case around an nn.Embedding (V, D), its ids drawn unevenly.

    Args:
        head: the table is an output head too, so that its input's Gram matrix is known.
        padding: a row that is zero, and is never looked up.
    """
    rows, columns = table.shape
    chance = torch.arange(rows, dtype=torch.float64).add(1).reciprocal()
    if padding is not None:
        chance[padding] = 0
    generator = torch.Generator().manual_seed(14)
    ids = torch.multinomial(chance, 64, replacement=True, generator=generator)
    module = nn.Embedding(rows, columns, padding_idx=padding).to(device, dtype).eval()
    with torch.no_grad():
        module.weight.copy_(table)
        if padding is not None:
            module.weight[padding] = 0
    hidden = _normal(64, columns, 15) @ _normal(columns, columns, 16)
    stats = Statistics(
        count=64,
        gram=(hidden.T @ hidden / 64).to(device) if head else None,
        freq=torch.bincount(ids, minlength=rows).double().to(device),
    )
    cost = Cost(table.numel(), table.numel() * dtype.itemsize, 0)
    site = Site("table", ("table", "alias"), "embedding", (module,), (rows, columns), cost)
    title = f"{name}, {str(dtype).removeprefix('torch.')}"
    return Case(title, site, stats, ids.to(device))


# What a case is called -> (dtype=, device=) -> a fresh one.
CASES: Mapping[str, Callable[..., Case]] = {
    "wide": partial(linear_case, "wide", _normal(10, 18, 4)),
    "tall": partial(linear_case, "tall", _normal(18, 10, 5)),
    "square": partial(linear_case, "square", _normal(12, 12, 6)),
    "rank one": partial(linear_case, "rank one", _normal(10, 1, 7) @ _normal(1, 14, 8)),
    "no bias": partial(linear_case, "no bias", _normal(10, 12, 9), bias=False),
    "zero": partial(linear_case, "zero", torch.zeros(12, 10)),
    "orthogonal": partial(linear_case, "orthogonal", torch.linalg.qr(_normal(12, 12, 10)).Q),
    "dead input": partial(linear_case, "dead input", _normal(14, 10, 11), dead=3),
    "few tokens": partial(linear_case, "few tokens", _normal(10, 14, 12), tokens=5),
    "expert": partial(linear_case, "expert", _normal(10, 14, 29), part=True),
    "embedding": partial(embedding_case, "embedding", _normal(18, 10, 17)),
    "few rows": partial(embedding_case, "few rows", _normal(8, 12, 18)),
    "padding": partial(embedding_case, "padding", _normal(14, 10, 19), padding=2),
    "zero table": partial(embedding_case, "zero table", torch.zeros(12, 10)),
    "tied head": partial(embedding_case, "tied head", _normal(16, 10, 20), head=True),
    "Conv1D": partial(linear_case, "Conv1D", _normal(10, 16, 13), conv1d=True),
    "conv": partial(conv_case, "conv", _normal(8, 12, 24), padding=1),
    "strided conv": partial(
        conv_case, "strided conv", _normal(14, 6, 25), stride=2, dilation=2, bias=False
    ),
    "1-d conv": partial(
        conv_case, "1-d conv", _normal(8, 9, 26), kernel=(3,), padding=2, padding_mode="circular"
    ),
    "3-d conv": partial(conv_case, "3-d conv", _normal(6, 16, 27), kernel=(2, 2, 2), space=3),
    "group": partial(conv_case, "group", _normal(8, 12, 30), part=True, padding=1),
    "1x1 conv": partial(conv_case, "1x1 conv", _normal(10, 8, 28), kernel=(1, 1)),
}
