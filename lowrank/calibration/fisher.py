"""The true Fisher at the layers' outputs: gradients for labels sampled from the model.

For a model with predictions p(y | x), the curvature of its KL to itself is E_{y ~ p}[∇L ∇Lᵀ], L the
cross entropy to the sampled label (Martens, arXiv 1412.1193); labels from the data would give the
"empirical" Fisher, a different matrix. One backward pass per batch, gathered by hooks: G = E[g gᵀ]
per token, and for FWSVD (arXiv 2207.00112) the squared weight gradients of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import LowrankError
from ..linalg import gram_sum
from ..linalg.gram import full_precision
from ..linalg.mapped import kept, zeros
from ..types import Site
from ..walk import layouts
from ..walk.sites import find_sites, select_sites
from .batches import Batch, Forward, is_padded, rebatched
from .chain import Chain, NotInBlocks, Recording, Recordings, bypassed
from .observation import Observation
from .padding import Padding
from .running import (
    SameTensor,
    Unpadded,
    few_rows,
    first_tensor,
    forward,
    predictions_of,
    quiet,
    without_cache,
)
from .statistics import Calibration, followed

FISHER = frozenset({"out_gram", "row_fisher"})  # the needs that require this pass
ROWS = 16  # rows per backward pass
ENTRIES = 2**22  # of the probabilities that labels are sampled from at once


def with_fisher(
    model: nn.Module,
    calibration: Calibration,
    sites: Sequence[Site] | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
    recordings: Recordings | None = None,
) -> Calibration:
    """The calibration with `out_gram` and `row_fisher` of the linear and conv sites that it saw.

    Sites that have them already are skipped; if all have, the calibration is returned as it is. A
    `gram` of the inputs stays one tensor for the sites that share it.

    Args:
        sites: None: every linear layer but the output head, whose `out_gram` would be vocabulary ×
            vocabulary; `compress` passes its targets.
        seed: of the labels, sampled on the CPU.
        recordings: to be filled with those of the model's chain, whose batches have `ROWS` rows.

    Raises:
        LowrankError: as `gradient_moments`.
    """
    chosen = select_sites(find_sites(model), model) if sites is None else sites
    known = calibration.statistics
    wanted = [
        site
        for site in chosen
        if not site.reason and site.kind in ("linear", "conv") and site.name in known
        if known[site.name].count and known[site.name].out_gram is None
    ]
    if not wanted:
        return calibration
    fishers = gradient_moments(
        model, calibration.batches, wanted, calibration.observation,
        seed=seed, progress=progress, recordings=recordings,
    )  # fmt: skip
    added = {
        name: replace(known[name], out_gram=gram, row_fisher=rows)
        for name, (gram, rows) in fishers.items()
    }
    return replace(calibration, statistics={**known, **added})


def gradient_moments(
    model: nn.Module,
    batches: list[Batch] | Forward,
    sites: Sequence[Site],
    observation: Observation | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
    recordings: Recordings | None = None,
) -> Moments:
    """G = E[g gᵀ] (out, out) and the rows' Fisher (out,), both float64, by names of sites.

    g is the gradient, at one token's output, of the cross entropies *summed* over all predictions;
    the row's Fisher is Σ_j (∂L/∂W_ij)², L the loss of one sequence (the first axis of the logits),
    averaged over sequences. If a layer's tokens are not a multiple of the sequences, each token
    counts as one. Labels are sampled at every position of the logits (…, classes) from their
    softmax; padded positions are left out. A layer that was never called is missing; one that the
    logits do not depend on has zeros.

    The model runs in evaluation mode, its parameters frozen: flags, gradients, modes and random
    states are restored. `no_grad` and `inference_mode` around the call do not matter, unless the
    parameters were created in inference mode.

    Args:
        batches: from `materialise`; at most `ROWS` rows are run at a time.
        observation: of the model, if known. Where the sites lie in one chain of blocks, or after
            it, gradients flow back block by block, in the memory of one block; they are the same.
        seed: of the labels, sampled on the CPU.

    Raises:
        LowrankError: the data is a callable; the model gives no logits, or fewer than two classes,
            or no gradient to any of the sites; or a gradient is NaN or Inf (its site is named).
    """
    if callable(batches):
        raise LowrankError(
            "output gradients need batches, not a callable: pass tensors, dicts or a loader"
        )
    rows = rebatched(batches, ROWS)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), quiet(model), without_cache(model), _frozen(model):
        names = () if observation is None else _one_chain(sites, observation)
        if names:
            with suppress(NotInBlocks):
                recording = Recording(tuple(names))
                found = _by_block(model, rows, sites, recording, generator, progress)
                if recordings is not None:
                    recordings[recording.names] = recording
                return found
            generator.manual_seed(seed)
        return _whole(model, rows, sites, generator, progress)


def _one_chain(sites: Sequence[Site], observation: Observation) -> Sequence[str]:
    """The chain of blocks that holds all linear sites but those called after it; () if none."""
    order = {name: position for position, name in enumerate(observation.order)}
    for chain in observation.chains:
        inside = [order[name] for name in order if _block_of(name, chain)]
        others = [site for site in sites if not _block_of(site.name, chain)]
        if len(chain) == 1:
            continue
        later = all(order.get(site.name, -1) > max(inside, default=0) for site in others)
        if later and inside and all(s.kind == "linear" and len(s.names) == 1 for s in sites):
            return chain
    return ()


def _block_of(name: str, chain: Sequence[str]) -> str:
    return next((block for block in chain if f"{name}.".startswith(f"{block}.")), "")


def _whole(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    generator: torch.Generator,
    progress: bool,
) -> Moments:
    """One backward pass through the whole model per batch."""
    from tqdm.auto import tqdm

    padding, batches = followed(model, batches)
    gather = Gradients(sites, padding)
    reached = not sites
    with padding, gather:
        for batch in tqdm(batches, "fisher", delay=2, disable=not progress, leave=False):
            padding.start(batch)
            with torch.enable_grad():
                outputs, classes = _predictions(model, forward(model, _plain(batch)))
                loss, sequences = _loss(outputs, classes, padding.predicted(outputs), generator)
            gather.sequences = sequences
            if loss is not None and loss.requires_grad:
                reached = True
                loss.backward()
            gather.finish()
        if not reached:
            raise LowrankError(
                f"no gradient flows from the predictions to any of {len(sites)} layers: does the "
                "model run under no_grad, or did the data not reach them?"
            )
        return gather.result()


def _by_block(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    recording: Recording,
    generator: torch.Generator,
    progress: bool,
) -> Moments:
    """The same, block by block from the last to the first, each run again on its stored input.

    Raises:
        NotInBlocks: what comes after the chain cannot be run alone, or no gradient flows back.
    """
    from tqdm.auto import tqdm

    if any(is_padded(batch) for batch in batches):
        raise NotInBlocks("padding is followed through the whole model")
    names = recording.names
    inputs: list[list[Tensor]] = []  # by block and batch
    gradients: list[Tensor] = []
    sequences: list[int] = []
    with torch.no_grad():
        try:
            for number, batch in enumerate(batches):
                recording.record(model, number, batch)
            chain = Chain(model, recording, range(len(batches)))
            for index in range(len(names)):
                inputs.append([kept(hidden) for hidden in chain.hidden])
                chain.hidden = chain.outputs(index)
        except LowrankError as error:
            raise NotInBlocks(str(error)) from None
    _check_bypass(model, recording, batches[0], chain.hidden[0])
    later = Gradients([s for s in sites if not _block_of(s.name, names)], Unpadded())
    with later:
        for number, batch in enumerate(batches):
            hidden = chain.hidden[number]
            tail = _tail_gradient(model, recording, number, batch, hidden, generator, later)
            gradients.append(tail[0])
            sequences.append(tail[1])
    found = later.result()
    bar = tqdm(total=len(names), desc="fisher", delay=2, disable=not progress, leave=False)
    with bar:
        for index in reversed(range(len(names))):
            own = [site for site in sites if _block_of(site.name, names) == names[index]]
            gather = Gradients(own, Unpadded())
            with gather, torch.enable_grad():
                for number, hidden in enumerate(inputs.pop()):
                    gather.sequences = sequences[number]
                    leaf = hidden.clone().requires_grad_(hidden.is_floating_point())
                    output = chain.run(index, number, leaf.clone())
                    if output.requires_grad:
                        output.backward(gradients[number])
                    elif index:
                        raise NotInBlocks(f"{names[index]} cuts the gradient")
                    gather.finish()
                    slope = leaf.grad
                    gradients[number] = torch.zeros_like(leaf) if slope is None else slope
            found.update(gather.result())
            bar.update()
    return found


def _check_bypass(model: nn.Module, recording: Recording, batch: Batch, hidden: Tensor) -> None:
    """Raises NotInBlocks unless what comes after the chain gives the same when it runs alone."""
    part, piece = _parts(model, recording, 0, batch, hidden)[0]
    with torch.no_grad():
        expected, _ = _predictions(model, forward(model, _plain(part)))
        with bypassed(model, recording, 0, piece):
            found, _ = _predictions(model, forward(model, _plain(part)))
    if found.shape != expected.shape or not torch.allclose(found, expected, 1e-3, 1e-4):
        raise NotInBlocks("the predictions depend on more than the last block's output")


def _parts(
    model: nn.Module, recording: Recording, number: int, batch: Batch, hidden: Tensor
) -> list[tuple[Batch, Tensor]]:
    """A few rows at a time, with their hidden states: the logits of a large vocabulary are the
    largest tensor of all."""
    rows = few_rows(model, batch)
    parts = rebatched([batch], rows)
    if sum(map(_length, parts)) != len(hidden) or not recording.is_plain(number):
        return [(batch, hidden)]
    return list(zip(parts, hidden.split(rows), strict=True))


def _tail_gradient(
    model: nn.Module,
    recording: Recording,
    number: int,
    batch: Batch,
    hidden: Tensor,
    generator: torch.Generator,
    later: Gradients,
) -> tuple[Tensor, int]:
    """The gradient at the last block's output, and the number of sequences."""
    gradients, total = [], 0
    for part, piece in _parts(model, recording, number, batch, hidden):
        leaf = piece.detach().clone().requires_grad_()
        with torch.enable_grad(), bypassed(model, recording, number, leaf.clone()):
            outputs, classes = _predictions(model, forward(model, _plain(part)))
            loss, sequences = _loss(outputs, classes, None, generator)
        total += sequences
        later.sequences = sequences
        if loss is not None and not loss.requires_grad:
            raise NotInBlocks("no gradient flows from the predictions to the last block")
        if loss is not None:
            loss.backward()
        later.finish()
        gradients.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return torch.cat(gradients), total


def _length(batch: Batch) -> int:
    tensor = first_tensor(batch)
    return 0 if tensor is None or not tensor.ndim else len(tensor)


def _predictions(model: nn.Module, output: object) -> tuple[Tensor, bool]:
    try:
        return predictions_of(model, output)
    except LowrankError as error:
        raise LowrankError(
            f"the Fisher needs the model's predictions: {error}; method='whitened' with "
            "policy='uniform' does not"
        ) from None


def _loss(
    outputs: Tensor, classes: bool, mask: Tensor | None, generator: torch.Generator
) -> tuple[Tensor | None, int]:
    """A loss whose gradients are sampled, None if all is padding; number of sequences.

    Of logits the summed cross entropy to sampled labels. Of other outputs y the sum of s · y with
    random signs s: E[g gᵀ] is then JᵀJ, the Gauss–Newton matrix of ½‖Δy‖².
    """
    features = outputs.shape[-1] if outputs.ndim else 1
    flat = outputs.reshape(-1, features)
    if mask is not None and mask.shape == outputs.shape[:-1]:
        flat = flat[mask.flatten().to(flat.device)]
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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter gets a gradient; the flags are restored."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _plain(batch: Batch) -> Batch:
    """The batch with copies of inference tensors, which autograd cannot save."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    return {name: _plain(v) if isinstance(v, Tensor) else v for name, v in batch.items()}


WEIGHTS = 2**24  # entries of the weight gradients held at once

Moments = dict[str, tuple[Tensor, Tensor]]  # by site: E[g gᵀ] (out, out), the rows' Fisher (out,)


class Gradients:
    """Hooks on the outputs of the sites. The graph starts at the first site that is called."""

    def __init__(self, sites: Sequence[Site], padding: Padding | Unpadded) -> None:
        self._sums = {site.name: _Sums(site) for site in sites}
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
        called = {name: sums for name, sums in self._sums.items() if sums.count}
        # A convolution's positions are summed, per token of a linear layer or per sample.
        tokens = max((s.count for s in called.values() if s.site.kind == "linear"), default=0)
        conv_tokens = tokens or self._all_sequences
        return {name: sums.means(self._all_sequences, conv_tokens) for name, sums in called.items()}

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
            inputs = self._copy(given)
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
            sides = (out_features, out_features)
            self._gram = zeros(*sides, dtype=torch.float64, device=output.device)
            self._rows = self._gram.new_zeros(out_features)

    def add(self, inputs: Tensor, gradient: Tensor, keep: Tensor | None, sequences: int) -> None:
        g = layouts.output_rows(self.site.module, gradient)
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
        assert self._rows is not None
        with full_precision(g):
            for some_x, some_g in zip(x.split(step), g.split(step), strict=True):
                each = some_g.to(wide).mT @ some_x.to(wide)  # (sequences, out, in)
                rows = torch.linalg.vector_norm(each, dim=2, dtype=torch.float64)
                self._rows += rows.square().sum(0)

    def _fold_patches(self, waiting: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`fold` for a convolution: sample by sample, since patches are large."""
        assert self._rows is not None
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
            norms = torch.linalg.vector_norm(each, dim=1, dtype=torch.float64)
            self._rows += norms.square()

    def means(self, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Means per token of this layer; for a convolution per `tokens`, its positions summed."""
        assert self._gram is not None
        assert self._rows is not None
        count = tokens if self.site.kind == "conv" else self.count
        return self._gram.div_(max(count, 1)), self._rows / max(sequences, 1)
