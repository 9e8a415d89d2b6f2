"""The inputs of layers in the dense model and in compressed ones, and their moments.

The models run side by side, batch by batch. A run ends with the layer whose inputs are asked for:
nothing behind it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.gathering import counted_rows
from ..calibration.processes import summed
from ..calibration.running import first_tensor, quiet, without_cache
from ..errors import LowrankError
from ..linalg import cross_sum, gram_sum
from ..types import Site
from ..walk import layouts
from ..walk.surgery import module_at

Run = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one distinct input in both streams, per token, float64.

    Attributes:
        count: number of tokens.
        gram: E[x'x'ᵀ] (in, in) of the compressed stream.
        cross: E[x x'ᵀ] (in, in), x of the dense stream.
        mean, dense_mean: E[x'] and E[x], (in,).
    """

    count: int
    gram: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor


class Streams:
    """The inputs of one layer in the dense model and its students, batch by batch.

    Attributes:
        sums: of each student.
        outputs: what the dense runs returned, if they were to go on `to_the_end`.
    """

    def __init__(
        self,
        site: Site,
        dense: nn.Module,
        students: Sequence[nn.Module],
        *,
        calls: int = 0,
        to_the_end: bool = False,
    ) -> None:
        """
        Args:
            calls: how often a run calls the layer; 0 if that is to be seen in the first one.
            to_the_end: the dense runs go on after the layer.
        """
        self.models = [dense, *students]
        self.sums = [_Sums(site) for _ in students]
        layers = [module_at(model, site.name) for model in self.models]
        self._readers = [
            _Reader(layer, _can_be_left(m), calls)
            for m, layer in zip(self.models, layers, strict=True)
        ]
        self._readers[0].ends = self._readers[0].ends and not to_the_end
        self._keeps = to_the_end
        self.outputs: list[Any] = []

    def run(
        self,
        dense: Sequence[Run],
        lean: Sequence[Sequence[Run]],
        reals: Sequence[Sequence[Tensor | None]],
    ) -> None:
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(quiet(model))
                stack.enter_context(without_cache(model))
            for run, real, *runs in zip(dense, reals, *lean, strict=True):
                x, output = self._readers[0].read(run)
                if self._keeps:
                    self.outputs.append(output)
                for sums, reader, lean_run in zip(self.sums, self._readers[1:], runs, strict=True):
                    sums.add(x, reader.read(lean_run)[0], real)


class _Reached(Exception):
    """Ends a run with the layer whose inputs are asked for."""


class _Reader:
    """Reads a layer's inputs from runs, which end with its last call once that is known."""

    def __init__(self, layer: nn.Module, ends: bool, calls: int) -> None:
        self.layer, self.ends, self._calls = layer, ends, calls

    def read(self, run: Run) -> tuple[list[Tensor], Any]:
        """Every input tensor, cloned against later in-place changes, and the run's output."""
        tensors: list[Tensor] = []
        last = self._calls if self.ends else 0

        def hook(_module: nn.Module, args: object, kwargs: object) -> None:
            tensor = first_tensor((args, kwargs))
            if tensor is not None:
                tensors.append(tensor.clone())
            if last and len(tensors) == last:
                raise _Reached

        handle, output = self.layer.register_forward_pre_hook(hook, with_kwargs=True), None
        try:
            with suppress(_Reached):
                output = run()
        finally:
            handle.remove()
        self._calls = self._calls or len(tensors)
        return tensors, output


def _can_be_left(model: nn.Module) -> bool:
    """Whether a forward pass may be ended early: accelerate's hooks put weights back behind it."""
    return not any(hasattr(module, "_hf_hook") for module in model.modules())


class _Sums:
    """Running sums of a layer's inputs in the dense and one compressed stream.

    Where other tokens reach it in the compressed model, as experts of a mixture, its rows have no
    partners: then both streams are the compressed one.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.count, self.paired = site, 0, True
        self.sums = [torch.zeros(())] * 4

    def add(
        self, dense: Sequence[Tensor], lean: Sequence[Tensor], real: Sequence[Tensor | None]
    ) -> None:
        """Add what the layer read in one batch, call by call."""
        if [t.shape for t in dense] != [t.shape for t in lean]:
            dense, self.paired, real = lean, False, []
        for x, y in _pairs(self.site.module, dense, lean, real):
            new = _sums(self.site, x, y)
            if self.count:
                new = tuple(s.add_(n) for s, n in zip(self.sums, new, strict=True))
            self.sums = list(new)
            self.count += len(y)

    def add_up(self, parts: Sequence[tuple[int, bool]]) -> None:
        """Add the sums of the other processes.

        Args:
            parts: count and `paired` of each.
        """
        total = sum(count for count, _ in parts)
        if total and not self.count:
            matrix = layouts.matrix(self.site.module)
            mean = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
            gram = torch.zeros(*[len(mean)] * 2, dtype=mean.dtype, device=mean.device)
            self.sums = [gram, gram.clone(), mean, mean.clone()]
        if total:
            summed(*self.sums)
        self.count, self.paired = total, all(paired for _, paired in parts)

    def moments(self) -> Moments | None:
        """None if it saw no token; the sums are used up."""
        if not self.count:
            return None
        gram, cross, mean, dense_mean = (total.div_(self.count) for total in self.sums)
        if not self.paired:
            cross, dense_mean = gram, mean
        return Moments(self.count, gram, cross, mean, dense_mean)


def _pairs(
    module: nn.Module,
    dense: Sequence[Tensor],
    lean: Sequence[Tensor],
    real: Sequence[Tensor | None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Input vectors (rows, in) of a layer in both streams, in chunks, without padding."""
    masks = real if len(real) == len(dense) else [None] * len(dense)
    for x, y, mask in zip(dense, lean, masks, strict=True):
        yield from zip(counted_rows(module, x, mask), counted_rows(module, y, mask), strict=True)


def _sums(site: Site, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Sums over the rows (rows, in) of the dense stream x and the compressed stream y."""
    sums = (gram_sum(y), cross_sum(x, y), y.double().sum(0), x.double().sum(0))
    if not bool(torch.isfinite(sums[0].diagonal()).all()):
        raise LowrankError(
            f"{site.title}: its input holds NaN or Inf in the compressed model, but not in the "
            "dense one: run it in float32 or bfloat16, or exclude the layers before it"
        )
    return sums
