"""Quality of a model: perplexity, and KL divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ..calibration.batches import LENGTH, ROWS, Batch, Data, materialise, text_rows
from ..calibration.running import forward, logits_of, predictions_of, quiet
from ..calibration.statistics import Calibration, followed
from ..errors import LowrankError
from ..linalg.mapped import give_back
from ..nn.few_shapes import even_ranks
from ..plans.progress import steps
from ..walk.checks import check_module

ENTRIES = 1 << 22  # of the probabilities that are compared at once
KEPT_BYTES = 1 << 30  # cache of the reference's logits
KL, ERROR = "KL", "relative squared error"  # how outputs are compared


class NotFinite(LowrankError):
    """NaN or Inf in predictions that a choice depends on."""


def perplexity(
    model: nn.Module, tokenizer: Any, text: str, *, length: int = LENGTH, progress: bool = False
) -> float:
    """Perplexity: exp of the mean negative log-likelihood per token, in nats.

    The text is tokenised in one call and cut into non-overlapping rows of `length` + 1 tokens; in
    each row every token but the first is predicted. Sums are in float64.

    Raises:
        LowrankError: the text has fewer than two tokens, or is none.
    """
    check_module(model)
    if not isinstance(text, str) or not callable(tokenizer):
        raise LowrankError(
            f"perplexity takes a tokenizer and one text, got {type(tokenizer).__name__} and "
            f"{type(text).__name__}: join several texts; kl takes batches"
        )
    rows = [row for row in text_rows(text, tokenizer, length + 1) if len(row) > 1]
    if not rows:
        raise LowrankError("the text has fewer than two tokens, so there is none to predict")
    total, count = 0.0, 0
    with quiet(model):
        for batch in steps(_stacked(rows), "batch", progress):
            logits = logits_of(forward(model, batch[:, :-1])).float()
            targets = batch[:, 1:].to(logits.device)
            losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            total += float(losses.double().sum())
            count += losses.numel()
    return math.exp(total / count)


def kl(
    model: nn.Module,
    reference: nn.Module,
    data: Data | Calibration,
    *,
    tokenizer: Any = None,
    length: int = LENGTH,
    progress: bool = False,
) -> float:
    """Mean KL(reference ‖ model) in nats per position, over the last axis of the logits.

    Args:
        data: as for `compress`, but not a callable; each text is tokenised in one call and cut
            into rows of `length` tokens. Padding is ignored.

    Raises:
        LowrankError: the data is a callable or all padding, the logits differ in shape, or they
            are no logits: one output, or a regression by the model's own config.
    """
    if isinstance(data, Calibration):
        batches = data.batches
    else:
        batches = materialise(data, tokenizer, length=length)
    if callable(batches):
        raise LowrankError("kl needs batches to run both models on, not a callable")
    return Reference(reference, batches).kl(model, progress=progress)


class Reference:
    """A reference model and its cached logits on some batches, to compare other models with.

    Attributes:
        model: the reference, run in evaluation mode.
        batches: the inputs of both models.
        asked: number of comparisons so far.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], most: int = KEPT_BYTES) -> None:
        """
        Args:
            most: bytes of logits to cache; those of further batches are recomputed.
        """
        self.model, self.batches = model, batches
        self.asked = 0
        self._left = most
        self._kept: dict[int, Tensor] = {}
        self._padding = followed(model, batches)[0]
        self._masks: dict[int, Tensor | None] = {}
        self._classes = True

    def outputs(self, number: int) -> Tensor:
        """The reference's logits or other outputs (…, features) on the batch of this index."""
        if number in self._kept:
            return self._kept[number]
        with quiet(self.model), self._padding:
            self._padding.start(self.batches[number])
            output = forward(self.model, self.batches[number])
            predicted, self._classes = predictions_of(self.model, output)
        self._masks[number] = self._padding.predicted(predicted)
        if predicted.nbytes <= self._left:
            self._left -= predicted.nbytes
            self._kept[number] = predicted
        return predicted

    def mask(self, number: int) -> Tensor | None:
        """The positions (rows, …) of `outputs` that are no padding, bool; None for all."""
        if number not in self._masks:
            self.outputs(number)
        return self._masks[number]

    def can_judge(self) -> bool:
        """Whether the model gives outputs, which can tell one model from another."""
        try:
            return bool(self.batches) and self.outputs(0).ndim > 0
        except LowrankError:
            return False

    @property
    def measure(self) -> str:
        """How outputs are compared: by KL, or, if they are values, by their relative squared error.

        Over one class every KL is 0, so that it could tell no model from another.

        Raises:
            LowrankError: the model has no outputs.
        """
        self.outputs(0)
        return KL if self._classes else ERROR

    def kl(self, model: nn.Module, *, progress: bool = False) -> float:
        """Mean KL(reference ‖ model) in nats per position; raises LowrankError as `lowrank.kl`."""
        if self.batches and self.measure != KL:
            raise LowrankError(
                "the model predicts values, not classes, and a KL over them says nothing: compare "
                "the outputs themselves"
            )
        return self.away(model, progress=progress)

    def away(self, model: nn.Module, *, progress: bool = False) -> float:
        """Mean KL(reference ‖ model) in nats per position, or relative squared error: `measure`.

        Raises:
            LowrankError: there are no positions to compare, or the logits differ in shape.
        """
        total, count = 0.0, 0
        self.asked += 1
        give_back()
        measure = self.measure if self.batches else KL
        with quiet(model), even_ranks(model):
            batches = list(self.batches)
            counted = steps(batches, "batch", True) if progress else batches
            for number, batch in enumerate(counted):
                expected = self.outputs(number)
                logits = predictions_of(model, forward(model, batch))[0].to(expected.device)
                if expected.shape != logits.shape:
                    what = "logits" if self._classes else "outputs"
                    raise LowrankError(
                        f"the {what} have shape {tuple(logits.shape)}, those of the reference "
                        f"{tuple(expected.shape)}"
                    )
                losses = divergence(expected, logits, self.mask(number), measure)
                total += float(losses.double().sum())
                count += losses.numel()
                give_back()
        if count == 0:
            raise LowrankError("no positions to compare: the data is empty or all padding")
        return total / count

    def judged(self, model: nn.Module) -> float:
        """`away` for choosing between models: inf where the logits of `model` are not finite.

        Raises:
            NotFinite: the reference's logits hold NaN or Inf.
            LowrankError: there are no predictions to compare.
        """
        mean = self.away(model)
        if math.isfinite(mean):
            return mean
        for number in range(len(self.batches)):
            logits = self.outputs(number)
            if bool((logits.isnan() | logits.isposinf()).any()):
                raise NotFinite(
                    "the dense model's predictions on held-out rows hold NaN or Inf: check the "
                    "last rows of the data, or run the model in float32 or bfloat16"
                )
        return math.inf


def divergence(
    reference: Tensor, logits: Tensor, mask: Tensor | None = None, measure: str = KL
) -> Tensor:
    """KL(reference ‖ model) per position, from logits (…, classes), in float32; or the squared
    error, relative to the mean square of the reference."""
    if measure == ERROR:
        squares = _counted(reference.float().square().sum(-1), mask)
        errors = _counted((reference.float() - logits.float()).square().sum(-1), mask)
        return errors / squares.mean().clamp_min(torch.finfo().tiny)
    rows = max(ENTRIES // max(logits.shape[-1], 1), 1)
    both = zip(_rows(reference).split(rows), _rows(logits).split(rows), strict=True)
    losses = torch.cat([_divergence(p, q) for p, q in both]).view(logits.shape[:-1])
    return _counted(losses, mask)


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL per row of logits (rows, classes)."""
    p, q = log_softmax(reference.float(), -1), log_softmax(logits.float(), -1)
    # A class with reference probability 0 (logit -inf) contributes 0 to the KL.
    return (p.exp() * (p - q)).where(p != -math.inf, 0).sum(-1)  # NaN stays NaN


def _counted(losses: Tensor, mask: Tensor | None) -> Tensor:
    """The losses without padding; a classifier of whole rows makes one prediction per row."""
    return losses if mask is None or mask.shape != losses.shape else losses[mask.to(losses.device)]


def _stacked(rows: list[Tensor]) -> list[Tensor]:
    """Batches of rows of equal length."""
    full = [row for row in rows if len(row) == len(rows[0])]
    rest = rows[len(full) :]
    starts = range(0, len(full), ROWS)
    return [torch.stack(full[s : s + ROWS]) for s in starts] + [row[None] for row in rest]
