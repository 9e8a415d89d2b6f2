"""The inputs of layers in the dense model and in compressed ones, and their moments.

The models run side by side, batch by batch. A run ends with the layer whose inputs are asked for:
nothing behind it is computed. Neither is what comes before it again: each group of layers takes a
run of its block up to it, through layers that are finished, and what they returned is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.gathering import counted_rows
from ..calibration.processes import summed
from ..calibration.rare import weight_of
from ..calibration.running import first_tensor, quiet
from ..errors import LowrankError
from ..linalg import cross_sum, gram_sum
from ..linalg.mapped import give_back, kept, zeros
from ..nn.few_shapes import even_ranks
from ..types import Site, Statistics
from ..walk import layouts
from ..walk.surgery import module_at

Run = Callable[[], object]
MOST = 1 << 29  # bytes of outputs that are kept, of all models that run side by side


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of one distinct input in both streams, per token, float64.

    Attributes:
        count: number of tokens.
        gram: E[x'x'ᵀ] (in, in) of the compressed stream.
        cross: E[x x'ᵀ] (in, in), x of the dense stream.
        mean, dense_mean: E[x'] and E[x], (in,).
        error: E[d x'ᵀ] (out, in), d the error of the stream that the output is added to, dense less
            compressed; None if there is none.
        mean_error: E[d] (out,).
        paired: whether the same tokens reached the layer in both streams; if not, both are the
            compressed one.
    """

    count: int
    gram: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    paired: bool = True
    error: Tensor | None = None
    mean_error: Tensor | None = None

    def shrunk(self, dense: Statistics) -> Moments:
        """Those of a layer that is given some tokens of all, shrunk towards what the dense model's
        layer reads, which its siblings had a part in (calibration/rare.py)."""
        if self.paired or dense.gram is None or dense.mean is None:
            return self
        share = weight_of(self.count, len(self.gram))
        gram = self.gram.lerp(dense.gram.to(self.gram), share)
        mean = self.mean.lerp(dense.mean.to(self.mean), share)
        return Moments(self.count, gram, gram, mean, mean, paired=False)


class Streams:
    """The inputs of layers in the dense model and its students, batch by batch.

    Attributes:
        sums: of each layer, those of each student.
        outputs: what the dense runs returned, if they were to go on `to_the_end`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        dense: nn.Module,
        students: Sequence[nn.Module],
        *,
        added: Sequence[str | None] = (),
        calls: int = 0,
        routed: bool = False,
        to_the_end: bool = False,
    ) -> None:
        """
        Args:
            sites: layers none of which feeds another.
            added: of each, the module that reads the stream which its output is added to, or None
                (additions.py).
            calls: how often a run calls the layer; 0 if that is to be seen in the first one, or if
                there are several.
            routed: each is given some tokens of all, perhaps others in a student.
            to_the_end: the dense runs go on after the layers.
        """
        self.models = [dense, *students]
        added = [*added, *[None] * (len(sites) - len(added))]
        self.sums = [
            [_Sums(site, added=name is not None, paired=not routed) for _ in students]
            for site, name in zip(sites, added, strict=True)
        ]
        self._readers = [
            _Reader(
                [module_at(m, site.name) for site in sites],
                [None if name is None else module_at(m, name) for name in added],
                _can_be_left(m),
                calls,
            )
            for m in self.models
        ]
        self._readers[0].ends = self._readers[0].ends and not to_the_end
        self._keeps = to_the_end
        self.outputs: list[Any] = []

    def run(
        self,
        dense: Sequence[Run],
        lean: Sequence[Sequence[Run]],
        reals: Sequence[Sequence[Sequence[Tensor | None]]],
    ) -> None:
        """
        Args:
            reals: which positions are no padding: by batch, layer and call.
        """
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(quiet(model))
                stack.enter_context(even_ranks(model))
            for run, real, *runs in zip(dense, reals, *lean, strict=True):
                x, r, output = self._readers[0].read(run)
                if self._keeps:
                    self.outputs.append(kept(output) if isinstance(output, Tensor) else output)
                for student, lean_run in enumerate(runs):
                    y, s, _ = self._readers[1 + student].read(lean_run)
                    for sums, *given in zip(self.sums, x, y, real, r, s, strict=True):
                        sums[student].add(*given)
                    give_back()


class _Reached(Exception):
    """Ends a run with the layer whose inputs are asked for."""


class _Reader:
    """Reads layers' inputs from runs, which end with the last call of a single one once that is
    known."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        added: Sequence[nn.Module | None],
        ends: bool,
        calls: int,
    ) -> None:
        """
        Args:
            added: of each layer, the module whose input its output is added to.
        """
        self.layers, self.added = layers, added
        self.ends, self._calls = ends and len(layers) == 1, calls

    def read(self, run: Run) -> tuple[list[list[Tensor]], list[list[Tensor]], Any]:
        """Every input tensor of each layer, those of the modules that read what it is added to,
        cloned against later in-place changes, and the run's output."""
        tensors: list[list[Tensor]] = [[] for _ in self.layers]
        streams: list[list[Tensor]] = [[] for _ in self.layers]
        last = self._calls if self.ends else 0

        def hook(own: list[Tensor], last: int, _: nn.Module, args: object, kwargs: object) -> None:
            tensor = first_tensor((args, kwargs))
            if tensor is not None:
                own.append(tensor.clone())
            if last and len(own) == last:
                raise _Reached

        # A module may be both: its stream is to be read before the run ends with it.
        read = [(m, own, 0) for m, own in zip(self.added, streams, strict=True) if m is not None]
        read += [(layer, own, last) for layer, own in zip(self.layers, tensors, strict=True)]
        handles = [
            module.register_forward_pre_hook(partial(hook, own, end), with_kwargs=True)
            for module, own, end in read
        ]
        output = None
        try:
            with suppress(_Reached):
                output = run()
        finally:
            for handle in handles:
                handle.remove()
        self._calls = self._calls or len(tensors[0])
        return tensors, streams, output


def _can_be_left(model: nn.Module) -> bool:
    """Whether a forward pass may be ended early: accelerate's hooks put weights back behind it."""
    return not any(hasattr(module, "_hf_hook") for module in model.modules())


class _Sums:
    """Running sums of a layer's inputs in the dense and one compressed stream.

    Where other tokens reach it in the compressed model, as experts of a mixture, its rows have no
    partners: then both streams are the compressed one.
    """

    def __init__(self, site: Site, *, added: bool = False, paired: bool = True) -> None:
        """
        Args:
            added: the layer's output is added to a stream.
        """
        self.site, self.count, self.paired = site, 0, paired
        self.added, self._has_error = added, added
        # Gram matrix, cross moments, the two means; cross moments and mean of the stream's error.
        self.sums: list[Tensor] = []

    def add(
        self,
        dense: Sequence[Tensor],
        lean: Sequence[Tensor],
        real: Sequence[Tensor | None],
        stream: Sequence[Tensor] = (),
        lean_stream: Sequence[Tensor] = (),
    ) -> None:
        """Add what the layer read in one batch, call by call.

        Args:
            stream, lean_stream: what the layer's output is added to.
        """
        if not self.paired or [t.shape for t in dense] != [t.shape for t in lean]:
            dense, self.paired, real = lean, False, []
        alike = [[t.shape[:-1] for t in each] for each in (dense, stream, lean_stream)]
        self.added = self.added and self.paired and alike[0] == alike[1] == alike[2]
        for x, y in _pairs(self.site.module, dense, lean, real):
            self._begin(y)
            gram, cross, mean, dense_mean, *_ = self.sums
            _add(self.site, x, y, gram, cross)
            mean += y.double().sum(0)
            dense_mean += x.double().sum(0)
            self.count += len(y)
        if self.added:
            self._add_errors(stream, lean_stream, lean, real)

    def _add_errors(
        self,
        dense: Sequence[Tensor],
        lean: Sequence[Tensor],
        inputs: Sequence[Tensor],
        real: Sequence[Tensor | None],
    ) -> None:
        """Add the errors of the stream that the outputs are added to, call by call."""
        module = self.site.module
        rows = (y for _, y in _pairs(module, inputs, inputs, real))
        for (x, y), own in zip(_pairs(module, dense, lean, real), rows, strict=True):
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            error = x.to(wide) - y.to(wide)
            cross_sum(error, own, self.sums[4])
            self.sums[5] += error.double().sum(0)

    def _begin(self, rows: Tensor) -> None:
        """Zeros for rows (…, in), once."""
        if self.sums:
            return
        side, out = rows.shape[-1], self.site.shape[0]
        shapes: list[tuple[int, ...]] = [(side, side), (side, side), (side,), (side,)]
        shapes += [(out, side), (out,)] if self._has_error else []
        self.sums = [zeros(*s, dtype=torch.float64, device=rows.device) for s in shapes]

    def add_up(self, parts: Sequence[tuple[int, bool, bool]]) -> None:
        """Add the sums of the other processes.

        Args:
            parts: count, `paired` and `added` of each.
        """
        total = sum(count for count, *_ in parts)
        if total:
            self._begin(layouts.matrix(self.site.module))
            summed(*self.sums)
        self.count, self.paired = total, all(paired for _, paired, _ in parts)
        self.added = all(added for count, _, added in parts if count)

    def moments(self, shrinkage: float = 0.0) -> Moments | None:
        """None if it saw no token; the sums are used up.

        Args:
            shrinkage: so many times in / tokens are added to the diagonals of H' and C, relative to
                that of H': the fewer tokens, the closer a refit stays to W.
        """
        if not self.count:
            return None
        means = [total.div_(self.count) for total in self.sums]
        gram, cross, mean, dense_mean = means[:4]
        added = gram.diagonal() * (shrinkage * len(gram) / self.count)
        for each in (gram, cross):
            each.diagonal().add_(added)
        if not self.paired:
            cross, dense_mean = gram, mean
        error, mean_error = means[4:] if self.added and self.paired else (None, None)
        return Moments(self.count, gram, cross, mean, dense_mean, self.paired, error, mean_error)


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


def _add(site: Site, x: Tensor, y: Tensor, gram: Tensor, cross: Tensor) -> None:
    """Add the products of the rows (rows, in) of the dense stream x and the compressed stream y."""
    gram_sum(y, gram)
    cross_sum(x, y, cross)
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise LowrankError(
            f"{site.title}: its input holds NaN or Inf in the compressed model, but not in the "
            "dense one: run it in float32 or bfloat16, or exclude the layers before it"
        )


class Memo:
    """The outputs of a model's layers, by batch and name: of the first call in each run, whose
    input cannot depend on a layer that is finished later."""

    def __init__(self, most: int = MOST) -> None:
        """
        Args:
            most: bytes to keep; what comes after them is computed anew.
        """
        self._left = most
        self._outputs: dict[tuple[int, str], Tensor] = {}

    @contextmanager
    def used(self, model: nn.Module, batch: int, names: Collection[str]) -> Iterator[None]:
        """A context of one run, in which finished layers return what they did before.

        Args:
            names: the finished layers.
        """
        layers = {name: module_at(model, name) for name in names}
        before = {name: vars(layer).get("forward") for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                vars(layer)["forward"] = self._remembering((batch, name), layer.forward)
            yield
        finally:
            for name, layer in layers.items():
                vars(layer).pop("forward")
                if before[name] is not None:
                    vars(layer)["forward"] = before[name]

    def _remembering(self, key: tuple[int, str], forward: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            known = self._outputs.get(key) if calls == 1 else None
            if known is not None:
                return known.clone()  # what follows may change it in place
            output = forward(*args, **kwargs)
            if calls == 1 and isinstance(output, Tensor) and output.nbytes <= self._left:
                self._left -= output.nbytes
                own = kept(output)
                self._outputs[key] = output.clone() if own is output else own
            return output

        return run
