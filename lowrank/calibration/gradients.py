"""Gradients at the outputs of layers, gathered by hooks and summed: what `fisher.py` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg import gram_sum
from ..linalg.precision import full_precision
from ..types import Site
from ..walk import patches
from .running import SameTensor, first_tensor

ENTRIES = 2**24  # of the weight gradients held at once

Found = dict[str, tuple[Tensor, Tensor]]  # by site: E[g gᵀ] (out, out), the rows' Fisher (out,)


class Gradients:
    """Hooks on the outputs of the sites. The graph starts at the first site that is called."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sums = {site.name: _Sums(site) for site in sites}
        self._mask: Tensor | None = None
        self._read: tuple[SameTensor, Tensor] | None = None
        self._handles: list[Any] = []
        self._all_sequences = 0
        self.sequences = 0  # of this batch; to be set before the backward pass

    def start(self, mask: Tensor | None) -> None:
        self._mask = mask

    def finish(self) -> None:
        self._all_sequences += self.sequences
        self._read = None
        for sums in self._sums.values():
            sums.fold(self.sequences)  # calls that got no gradient leave others waiting

    def found(self) -> Found:
        called = {name: sums for name, sums in self._sums.items() if sums.count}
        # A convolution's positions add up to what a token of a linear layer, or a sample, does.
        tokens = max((s.count for s in called.values() if s.site.kind == "linear"), default=0)
        whole = tokens or self._all_sequences
        return {name: sums.means(self._all_sequences, whole) for name, sums in called.items()}

    def __enter__(self) -> None:
        for sums in self._sums.values():
            for module in sums.site.modules:
                handle = module.register_forward_hook(self._hook(sums), with_kwargs=True)
                self._handles.append(handle)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, sums: _Sums) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            given = first_tensor((args, kwargs))
            if given is None or not isinstance(output, Tensor):
                return None
            mask, leaf = self._mask, None
            fits = mask is not None and output.shape[:-1] in (mask.shape, (mask.numel(),))
            fits = fits and sums.site.kind == "linear"
            keep = mask.flatten().to(output.device) if mask is not None and fits else None
            sums.called(output, keep)
            if not torch.is_grad_enabled():
                return None  # the model's own no_grad: nothing can flow here
            if not output.requires_grad:  # a copy: a leaf could not be changed in place
                output = leaf = output.detach().requires_grad_().clone()
            inputs = self._copy(given)
            output.register_hook(lambda g: sums.add(inputs, g.detach(), keep, self.sequences))
            return leaf

        return hook

    def _copy(self, given: Tensor) -> Tensor:
        """What was read, safe from later changes in place; one copy for all that read it."""
        if self._read is None or not self._read[0](given):
            self._read = (SameTensor(given), given.detach().clone())
        return self._read[1]


class _Sums:
    """Running sums of one site, in float64."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.count = 0
        self._gram: Tensor | None = None
        self._rows: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._calls = 0

    def called(self, output: Tensor, keep: Tensor | None) -> None:
        outputs = output.numel() // self.site.shape[0]
        self.count += outputs if keep is None else int(keep.sum())
        self._calls += 1
        if self._gram is None:
            out_features = self.site.shape[0]
            self._gram = output.new_zeros((out_features, out_features), dtype=torch.float64)
            self._rows = self._gram.new_zeros(out_features)

    def add(self, inputs: Tensor, gradient: Tensor, keep: Tensor | None, sequences: int) -> None:
        g = patches.output_rows(self.site.module, gradient)
        if keep is not None:
            g = g.masked_fill(~keep[:, None], 0)
        assert self._gram is not None
        self._gram += gram_sum(g)
        if not bool(torch.isfinite(self._gram.diagonal()).all()):
            raise LowrankError(
                f"{self.site.title}: the gradient at its output holds NaN or Inf, or numbers too "
                "large to square"
            )
        self._waiting.append((inputs, g))
        if len(self._waiting) == self._calls:  # the weight's gradient is the sum over all calls
            self.fold(sequences)

    def fold(self, sequences: int) -> None:
        """Squared weight gradients of every sequence; what waited is let go."""
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
        step = max(1, ENTRIES // (x.shape[-1] * g.shape[-1]))
        assert self._rows is not None
        with full_precision(g):
            for some_x, some_g in zip(x.split(step), g.split(step), strict=True):
                each = some_g.to(wide).mT @ some_x.to(wide)  # (sequences, out, in)
                rows = torch.linalg.vector_norm(each, dim=2, dtype=torch.float64)
                self._rows += rows.square().sum(0)

    def _fold_patches(self, waiting: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Of a convolution: sample by sample, for patches are many."""
        assert self._rows is not None
        module, samples = self.site.module, {len(x) for x, _ in waiting}
        if len(samples) > 1:  # calls of other sizes have no samples in common
            for call in waiting:
                self._fold_patches([call])
            return
        for index in range(*samples):
            each: Tensor | float = 0.0
            for x, g in waiting:
                own = g.view(len(x), -1, g.shape[-1])[index]
                rows = torch.cat(list(patches.chunks(module, x[index : index + 1])))
                wide = torch.float64 if g.dtype == torch.float64 else torch.float32
                with full_precision(g):
                    each = each + own.to(wide).T @ rows.to(wide)
            assert isinstance(each, Tensor)
            norms = torch.linalg.vector_norm(each, dim=1, dtype=torch.float64)
            self._rows += norms.square()

    def means(self, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Per token of this layer; of a convolution per `tokens`, its positions summed."""
        assert self._gram is not None
        assert self._rows is not None
        count = tokens if self.site.kind == "conv" else self.count
        return self._gram / max(count, 1), self._rows / max(sequences, 1)
