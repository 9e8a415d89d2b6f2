"""How good a language model is, and how far it is from another: perplexity and KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ..calibration.batches import LENGTH, ROWS, Batch, Data, materialise, text_rows
from ..calibration.running import forward, logits_of, mask_of, quiet
from ..calibration.statistics import Calibration
from ..errors import LowrankError

KEPT_BYTES = 1 << 30  # of a reference's predictions


class NotFinite(LowrankError):
    """NaN or Inf where a choice hangs on a number."""


def perplexity(
    model: nn.Module, tokenizer: Any, text: str, *, length: int = LENGTH, progress: bool = False
) -> float:
    """exp of the mean negative log-likelihood per token, in nats.

    The text is tokenised in one call and cut into rows of `length` + 1 tokens without overlap; in
    each row all tokens but the first are predicted from those before. Sums are float64.

    Raises:
        LowrankError: the text has fewer than two tokens.
    """
    rows = [row for row in text_rows(text, tokenizer, length + 1) if len(row) > 1]
    if not rows:
        raise LowrankError("the text has fewer than two tokens: nothing can be predicted")
    total, count = 0.0, 0
    with quiet(model):
        for batch in _progress(_stacked(rows), "perplexity", progress):
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
        data: as for `compress`, but no callable; texts are tokenised in one call each and cut
            into rows of `length` tokens. Padded positions are left out.

    Raises:
        LowrankError: the data is a callable or all padding, or the logits differ in shape.
    """
    if isinstance(data, Calibration):
        batches = data.batches
    else:
        batches = materialise(data, tokenizer, length=length)
    if callable(batches):
        raise LowrankError("kl needs batches that both models can be given, not a callable")
    return Reference(reference, batches).kl(model, progress=progress)


class Reference:
    """A model's predictions on some batches, to compare others with: each is made once.

    Attributes:
        model: the reference, in evaluation mode while it runs.
        batches: what both models are given.
        asked: how many comparisons were made.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], most: int = KEPT_BYTES) -> None:
        """
        Args:
            most: bytes of predictions that are kept; those of the other batches are made anew.
        """
        self.model, self.batches = model, batches
        self.asked = 0
        self._left = most
        self._kept: dict[int, Tensor] = {}

    def logits(self, number: int) -> Tensor:
        """The reference's logits (…, classes) on a batch."""
        if number in self._kept:
            return self._kept[number]
        with quiet(self.model):
            logits = logits_of(forward(self.model, self.batches[number]))
        if logits.nbytes <= self._left:
            self._left -= logits.nbytes
            self._kept[number] = logits
        return logits

    def kl(self, model: nn.Module, *, progress: bool = False) -> float:
        """Mean KL(reference ‖ model) in nats per position.

        Raises:
            LowrankError: there is no position to compare, or the logits differ in shape.
        """
        total, count = 0.0, 0
        self.asked += 1
        with quiet(model):
            for number, batch in enumerate(_progress(list(self.batches), "kl", progress)):
                want = self.logits(number)
                got = logits_of(forward(model, batch)).to(want.device)
                if want.shape != got.shape:
                    raise LowrankError(
                        f"the logits have shape {tuple(got.shape)}, the reference's "
                        f"{tuple(want.shape)}"
                    )
                each = divergence(want, got, mask_of(batch))
                total += float(each.double().sum())
                count += each.numel()
        if count == 0:
            raise LowrankError("there is no position to compare: the data is empty, or all padding")
        return total / count

    def judged(self, model: nn.Module) -> float:
        """`kl`, to choose by: inf where the predictions of `model` are not finite.

        Raises:
            NotFinite: the reference's predictions hold NaN or Inf.
            LowrankError: there are no predictions to compare.
        """
        away = self.kl(model)
        if math.isfinite(away):
            return away
        for number in range(len(self.batches)):
            logits = self.logits(number)
            if bool((logits.isnan() | logits.isposinf()).any()):
                raise NotFinite(
                    "the dense model's predictions on held-out rows hold NaN or Inf: look for them "
                    "in the last rows of the data, or run the model in float32 or bfloat16"
                )
        return math.inf


def divergence(reference: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(reference ‖ model) per position, from logits (…, classes), in float32."""
    p, q = log_softmax(reference.float(), -1), log_softmax(logits.float(), -1)
    # A class that the reference rules out (logit -inf) adds nothing, whatever the model says.
    each = (p.exp() * (p - q)).where(p != -math.inf, 0).sum(-1)  # NaN stays NaN
    # Of a row that is classified as a whole there is one prediction, wherever it is padded.
    return each if mask is None or mask.shape != each.shape else each[mask.to(each.device)]


def _stacked(rows: list[Tensor]) -> list[Tensor]:
    """Batches of rows of equal length."""
    full = [row for row in rows if len(row) == len(rows[0])]
    rest = rows[len(full) :]
    starts = range(0, len(full), ROWS)
    return [torch.stack(full[s : s + ROWS]) for s in starts] + [row[None] for row in rest]


def _progress(batches: list[Any] | list[Batch], what: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(batches, what, delay=2, disable=not shown, leave=False)
