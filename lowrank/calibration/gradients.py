"""Gradients of a sampled loss, and the hooks that gather their moments at the layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import LowrankError
from ..linalg import gram_sum
from ..linalg.gram import full_precision
from ..linalg.mapped import zeros
from ..types import Site
from ..walk import layouts
from .batches import Batch
from .padding import Padding
from .processes import gathered, in_step, summed, world
from .running import SameTensor, Unpadded, first_tensor, predictions_of

ENTRIES = 2**22  # of the probabilities that labels are sampled from at once
WEIGHTS = 2**24  # entries of the weight gradients held at once


FISHER = frozenset({"out_gram", "row_fisher"})  # the needs that require gradients


class Moment(NamedTuple):
    """What a layer's gradients give, as in `Statistics`; None if it was not asked for."""

    out_gram: Tensor | None
    row_fisher: Tensor | None


Moments = dict[str, Moment]  # by site


def predicted(model: nn.Module, output: object) -> tuple[Tensor, bool]:
    try:
        return predictions_of(model, output)
    except LowrankError as error:
        raise LowrankError(
            f"the Fisher needs the model's predictions: {error}; method='whitened' with "
            "policy='uniform' does not"
        ) from None


def sampled_loss(
    outputs: Tensor, classes: bool, mask: Tensor | None, generator: torch.Generator
) -> tuple[Tensor | None, int]:
    """A loss whose gradients are sampled, None if all is padding; number of sequences.

    Of logits the summed cross entropy to sampled labels. Of other outputs y the sum of s · y with
    random signs s: E[g gᵀ] is then JᵀJ, the Gauss–Newton matrix of ½‖Δy‖².
    """
    flat = _counted(outputs, mask)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    sequences = len(outputs) if outputs.ndim > 1 else 1
    if not len(wide):
        return None, sequences
    with full_precision(wide):
        if classes:
            loss = cross_entropy(wide, _drawn(wide.detach(), generator), reduction="sum")
        else:
            loss = (wide * _signs(wide.shape, generator).to(wide)).sum()
    if not bool(torch.isfinite(loss.detach())):
        raise LowrankError(
            f"the model's {'logits' if classes else 'outputs'} hold NaN or Inf: check its last "
            "layers and the data; float16 overflows where float32 and bfloat16 do not"
        )
    return loss, sequences


def _counted(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """The outputs (positions, features) without padding."""
    flat = outputs.reshape(-1, outputs.shape[-1] if outputs.ndim else 1)
    if mask is not None and mask.shape == outputs.shape[:-1]:
        flat = flat[mask.flatten().to(flat.device)]
    return flat


class Draws(NamedTuple):
    """How many random numbers a loss takes: chances of labels, or signs of other outputs."""

    labels: int = 0
    signs: int = 0

    @classmethod
    def of(cls, outputs: Tensor, classes: bool, mask: Tensor | None) -> Draws:
        flat = _counted(outputs, mask)
        return cls(labels=len(flat)) if classes else cls(signs=flat.numel())

    def skip(self, generator: torch.Generator) -> None:
        """Advance the generator past them."""
        for start in range(0, self.labels, ENTRIES):
            rows = min(self.labels - start, ENTRIES)
            torch.rand(rows, generator=generator, dtype=torch.float64)
        for start in range(0, self.signs, ENTRIES):
            torch.randint(2, (min(self.signs - start, ENTRIES),), generator=generator)


class Turns:
    """The random numbers of each batch, the same whichever process runs it."""

    def __init__(self, generator: torch.Generator, count: Callable[[], dict[int, Draws]]) -> None:
        """
        Args:
            generator: of the labels of all batches, in their order.
            count: counts the draws of this process's batches; not called with one process.
        """
        self.generator = generator
        self._next = 0
        counted = in_step(count) if world() > 1 else []
        self._draws = {number: draws for each in counted for number, draws in each.items()}

    def come(self, number: int) -> torch.Generator:
        """The generator at the draws of this batch; numbers rise from call to call."""
        for other in range(self._next, number):
            self._draws[other].skip(self.generator)
        self._next = number + 1
        return self.generator


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random signs, drawn on the CPU, so that they are the same on every device."""
    return 2 * torch.randint(2, tuple(shape), generator=generator) - 1


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row (positions, classes), sampled from its softmax, (positions,) int64.

    By inverse transform sampling, so that every device samples the same labels.
    """
    labels = []
    for rows in logits.split(max(ENTRIES // logits.shape[-1], 1)):
        reached = rows.double().softmax(-1).cumsum(-1)
        chance = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(reached, chance.to(rows.device) * reached[:, -1:], right=True)
        labels.append(drawn[:, 0].clamp(max=rows.shape[-1] - 1))
    return torch.cat(labels)


def plain(batch: Batch) -> Batch:
    """The batch with copies of inference tensors, which autograd cannot save."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    return {name: plain(v) if isinstance(v, Tensor) else v for name, v in batch.items()}


class Gradients:
    """Hooks on the outputs of the sites. The graph starts at the first site that is called."""

    def __init__(
        self, sites: Sequence[Site], padding: Padding | Unpadded, needs: frozenset[str] = FISHER
    ) -> None:
        """
        Args:
            needs: which of `FISHER` to gather.
        """
        self._sums = {site.name: _Sums(site, needs) for site in sites}
        self._padding = padding
        self._read: tuple[SameTensor, Tensor] | None = None
        self._handles: list[Any] = []
        self._all_sequences = 0
        self.sequences = 0  # of this batch; to be set before the backward pass

    def finish(self) -> None:
        self._all_sequences += self.sequences
        self._read = None
        for sums in self._sums.values():
            sums.fold(self.sequences)  # calls without a gradient leave others waiting

    def result(self) -> Moments:
        """The means over the batches of all processes."""
        self._add_up()
        called = {name: sums for name, sums in self._sums.items() if sums.count}
        # A convolution's positions are summed, per token of a linear layer or per sample.
        tokens = max((s.count for s in called.values() if s.site.kind == "linear"), default=0)
        conv_tokens = tokens or self._all_sequences
        return {name: sums.means(self._all_sequences, conv_tokens) for name, sums in called.items()}

    def _add_up(self) -> None:
        """Add the sums of the other processes."""
        if world() == 1:
            return
        every = gathered([self._all_sequences, *(sums.count for sums in self._sums.values())])
        self._all_sequences, *counts = map(sum, zip(*every, strict=True))
        for sums, count in zip(self._sums.values(), counts, strict=True):
            sums.add_up(count)

    def __enter__(self) -> None:
        for sums in self._sums.values():
            for module in sums.site.modules:
                handle = module.register_forward_hook(self._hook(sums), with_kwargs=True)
                self._handles.append(handle)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, sums: _Sums) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            given = first_tensor((args, kwargs))
            if given is None or not isinstance(output, Tensor):
                return None
            leaf, keep = None, None
            if sums.site.kind == "linear":
                real = self._padding.real(sums.site.name, module, given)
                keep = None if real is None else real.flatten().to(output.device)
            sums.called(output, keep)
            if not torch.is_grad_enabled():
                return None  # the model's own no_grad: no gradient flows here
            if not output.requires_grad:  # a copy: a leaf could not be changed in place
                output = leaf = output.detach().requires_grad_().clone()
            inputs = self._copy(given) if "row_fisher" in sums.needs else given
            output.register_hook(lambda g: sums.add(inputs, g.detach(), keep, self.sequences))
            return leaf

        return hook

    def _copy(self, given: Tensor) -> Tensor:
        """A copy of the input, safe from in-place changes; one for all sites that read it."""
        if self._read is None or not self._read[0](given):
            self._read = (SameTensor(given), given.detach().clone())
        return self._read[1]


class _Sums:
    """Running sums of one site, in float64."""

    def __init__(self, site: Site, needs: frozenset[str]) -> None:
        self.site, self.needs = site, needs
        self.count = 0
        self._gram: Tensor | None = None
        self._rows: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._calls = 0

    def called(self, output: Tensor, keep: Tensor | None) -> None:
        outputs = output.numel() // self.site.shape[0]
        self.count += outputs if keep is None else int(keep.sum())
        self._calls += 1
        self._begin(output.device)

    def _begin(self, device: torch.device) -> None:
        out_features = self.site.shape[0]
        if "out_gram" in self.needs and self._gram is None:
            self._gram = zeros(out_features, out_features, dtype=torch.float64, device=device)
        if "row_fisher" in self.needs and self._rows is None:
            self._rows = torch.zeros(out_features, dtype=torch.float64, device=device)

    def add_up(self, count: int) -> None:
        """Add the sums of the other processes; `count` of all."""
        if count:
            self._begin(layouts.matrix(self.site.module).device)
            summed(*(total for total in (self._gram, self._rows) if total is not None))
        self.count = count

    def add(self, inputs: Tensor, gradient: Tensor, keep: Tensor | None, sequences: int) -> None:
        g = layouts.output_rows(self.site.module, gradient)
        if keep is not None:
            g = g.masked_fill(~keep[:, None], 0)
        if self._gram is not None:
            gram_sum(g, self._gram)
            self._check(self._gram.diagonal())
        if self._rows is None:
            return
        self._waiting.append((inputs, g))
        if len(self._waiting) == self._calls:  # the weight's gradient is the sum over all calls
            self.fold(sequences)

    def _check(self, squares: Tensor) -> None:
        if not bool(torch.isfinite(squares).all()):
            raise LowrankError(
                f"{self.site.title}: the gradient at its output holds NaN or Inf, or numbers too "
                "large to square"
            )

    def fold(self, sequences: int) -> None:
        """Add the squared weight gradients of every sequence, and drop what waited."""
        waiting = [(x, g) for x, g in self._waiting if len(g)]
        self._waiting, self._calls = [], 0
        if not waiting:
            return
        if self.site.kind == "conv":
            self._fold_patches(waiting)
            return
        waiting = [(x.reshape(-1, x.shape[-1]), g) for x, g in waiting]
        whole = all(len(g) % sequences == 0 for _, g in waiting)
        cut = (sequences, -1) if whole else (-1, 1)
        joined = int(whole)
        x = torch.cat([x.reshape(*cut, x.shape[-1]) for x, _ in waiting], joined)
        g = torch.cat([g.reshape(*cut, g.shape[-1]) for _, g in waiting], joined)
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        step = max(1, WEIGHTS // (x.shape[-1] * g.shape[-1]))
        with full_precision(g):
            for some_x, some_g in zip(x.split(step), g.split(step), strict=True):
                self._add_weights(some_g.to(wide).mT @ some_x.to(wide))

    def _fold_patches(self, waiting: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`fold` for a convolution: sample by sample, since patches are large."""
        module, samples = self.site.module, {len(x) for x, _ in waiting}
        if len(samples) > 1:  # calls with different batch sizes share no samples
            for call in waiting:
                self._fold_patches([call])
            return
        for index in range(*samples):
            each: Tensor | float = 0.0
            for x, g in waiting:
                own = g.view(len(x), -1, g.shape[-1])[index]
                rows = torch.cat(list(layouts.chunks(module, x[index : index + 1])))
                wide = torch.float64 if g.dtype == torch.float64 else torch.float32
                with full_precision(g):
                    each = each + own.to(wide).T @ rows.to(wide)
            assert isinstance(each, Tensor)
            self._add_weights(each[None])

    def _add_weights(self, gradients: Tensor) -> None:
        """Add the squares of weight gradients (sequences, out, in)."""
        assert self._rows is not None
        rows = torch.linalg.vector_norm(gradients, dim=2, dtype=torch.float64).square().sum(0)
        self._check(rows)
        self._rows += rows

    def means(self, sequences: int, tokens: int) -> Moment:
        """Means per token of this layer; for a convolution per `tokens`, its positions summed."""
        count = tokens if self.site.kind == "conv" else self.count
        gram = None if self._gram is None else self._gram.div_(max(count, 1))
        return Moment(gram, None if self._rows is None else self._rows / max(sequences, 1))
