"""Perplexity and KL against numbers computed by hand in numpy."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank import LowrankError, kl, perplexity
from lowrank.measure.eval import NotFinite, Reference, divergence
from tests.zoo import Custom, Tokenizer, calibration, example, make, said, tokens, unchanged


def log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits(model: nn.Module, ids: Tensor, **more: Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.double().numpy()


def kl_rows(reference: Any, got: Any) -> Any:
    p, q = log_softmax(reference), log_softmax(got)
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A model and one that is a little different."""
    model = make("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model, make("llama")


# Perplexity


@pytest.mark.parametrize("length", [5, 8, 300])
def test_perplexity_is_that_of_rows_without_overlap(length: int) -> None:
    model, text = make("llama"), "the quick brown fox jumps over it"
    ids = Tokenizer()(text)["input_ids"]
    losses = []
    for start in range(0, len(ids), length + 1):
        row = ids[start : start + length + 1]
        if len(row) > 1:
            scores = log_softmax(logits(model, torch.tensor([row])))[0]
            losses += [-scores[i, row[i + 1]] for i in range(len(row) - 1)]
    rows = math.ceil(len(ids) / (length + 1))
    assert len(losses) == len(ids) - rows  # all tokens but the first of each row
    with unchanged(model):
        got = perplexity(model, Tokenizer(), text, length=length)
    assert got == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary() -> None:
    model = Custom(lambda self, ids: torch.zeros(*ids.shape, 61), fc=nn.Linear(1, 1))
    assert perplexity(model, Tokenizer(), "some text") == pytest.approx(61, rel=1e-6)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short(text: str) -> None:
    with pytest.raises(LowrankError, match="fewer than two tokens") as caught:
        perplexity(make("llama"), Tokenizer(), text)
    said(caught)


# KL


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_a_model_is_at_no_distance_from_itself(kind: str) -> None:
    model = make(kind)
    assert kl(model, model, [example(kind)]) == 0.0


def test_kl_is_the_mean_over_positions(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = pair
    batches = [tokens(2, 7), tokens(1, 3, start=5)]
    rows = np.concatenate(
        [kl_rows(logits(reference, b), logits(model, b)).reshape(-1) for b in batches]
    )
    assert len(rows) == 17
    with unchanged(model), unchanged(reference):
        got = kl(model, reference, batches)
    assert got == pytest.approx(rows.mean(), rel=1e-4)
    assert got > 1e-4
    assert kl(reference, model, batches) != pytest.approx(got, rel=1e-3)  # it has a direction


def test_padding_does_not_count(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = pair
    mask = torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0]])
    each = kl_rows(
        logits(reference, tokens(), attention_mask=mask),
        logits(model, tokens(), attention_mask=mask),
    )
    got = kl(model, reference, {"input_ids": tokens(), "attention_mask": mask})
    assert got == pytest.approx(each[mask.numpy() == 1].mean(), rel=1e-4)


@pytest.mark.parametrize("told", ["nothing", "decoder_attention_mask", "labels", "both"])
def test_of_an_encoder_decoder_the_decoders_positions_count(told: str) -> None:
    """Of equal length: the encoder's padding is not the decoder's."""
    model, other, ids = make("t5"), make("t5"), tokens(2, 6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    mask, counts = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": tokens(2, 6, start=3)}
    if told != "nothing":
        counts[1, 4:] = False
    if told in ("labels", "both"):
        batch["labels"] = batch["labels"].masked_fill(~counts, -100)
    if told in ("decoder_attention_mask", "both"):
        batch["decoder_attention_mask"] = counts.long()
    given = {k: v for k, v in batch.items() if k != "labels"}
    given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with torch.no_grad():
        want, got = (m(**given).logits.double().numpy() for m in (model, other))
    rows = kl_rows(want, got)[counts.numpy()]
    assert kl(other, model, [batch]) == pytest.approx(rows.mean(), rel=1e-4)


def test_a_calibration_is_data_too(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = pair
    batches = [tokens(2, 7), tokens(1, 3)]
    assert kl(model, reference, calibration(reference, batches)) == kl(model, reference, batches)


def test_texts(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = pair
    ids = torch.tensor([Tokenizer()("ab" * 6)["input_ids"]])
    expected = kl(model, reference, [ids[:, :6], ids[:, 6:]])
    got = kl(model, reference, ["ab" * 6], tokenizer=Tokenizer(), length=6)
    assert got == pytest.approx(expected, rel=1e-6)


def test_classes_that_are_ruled_out() -> None:
    reference = torch.tensor([[0.0, 1.0, -math.inf]])
    p = np.exp(log_softmax(np.array([0.0, 1.0])))
    for logit, expected in ((-math.inf, 0.0), (0.0, float(kl_of_three(p)))):
        got = divergence(reference, torch.tensor([[0.0, 1.0, logit]]))
        assert got.item() == pytest.approx(expected, abs=1e-6)
    # the other way round the distance is infinite
    assert divergence(torch.tensor([[0.0, 1.0, 0.0]]), reference).item() == math.inf


def kl_of_three(p: Any) -> Any:
    q = np.exp(log_softmax(np.array([0.0, 1.0, 0.0])))[:2]
    return (p * np.log(p / q)).sum()


def test_models_of_another_vocabulary() -> None:
    from tests.zoo import llama

    with pytest.raises(LowrankError) as caught:
        kl(make("llama"), llama(vocab_size=70), tokens())
    assert said(caught) == "the logits have shape (2, 7, 61), those of the reference (2, 7, 70)"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda model: None, "not a callable"),
        ({"input_ids": tokens(), "attention_mask": torch.zeros(2, 7)}, "no positions to compare"),
        ([], "gave no batch"),
    ],
    ids=["callable", "padding", "empty"],
)
def test_data_that_cannot_be_compared(data: Any, words: str) -> None:
    model = make("llama")
    with pytest.raises(LowrankError, match=words) as caught:
        kl(model, model, data)
    said(caught)


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = make("llama")
    kl(model, model, tokens(), progress=True)
    perplexity(model, Tokenizer(), "some text", progress=False)
    assert capsys.readouterr().out == ""


def test_predictions_that_are_no_numbers_are_not_equal(pair: tuple[nn.Module, nn.Module]) -> None:
    good, bad = torch.randn(3, 5), torch.randn(3, 5)
    bad[1, 2] = math.nan
    for reference, model in ((bad, good), (good, bad), (bad, bad)):
        assert divergence(reference, model).isfinite().tolist() == [True, False, True]


def test_a_class_for_a_whole_row_has_no_padding() -> None:
    reference, mask = torch.randn(3, 5), torch.ones(3, 7, dtype=torch.bool)
    assert divergence(reference, torch.randn(3, 5), mask).shape == (3,)


def test_one_output_is_judged_by_its_relative_error() -> None:
    """Every KL over one class is 0, which would prefer any model to any other."""
    net, near, x = nn.Linear(6, 1), nn.Linear(6, 1), torch.randn(40, 6)
    judge = Reference(net, [x[:24], x[24:]])
    assert judge.measure == "relative squared error"
    want, got = (m(x).detach().double().numpy() for m in (net, near))
    parts = [(want[rows], got[rows]) for rows in (slice(24), slice(24, None))]
    errors = [((a - b) ** 2).sum() / (a**2).mean() for a, b in parts]
    assert judge.judged(near) == pytest.approx(sum(errors) / 40, rel=1e-5)
    assert judge.judged(net) == 0
    with pytest.raises(LowrankError, match="predicts values, not classes") as caught:
        kl(near, net, [x])
    said(caught)


def test_a_regression_of_several_values_is_known_by_its_config() -> None:
    net, x = nn.Linear(6, 3), torch.randn(40, 6)
    assert Reference(net, [x]).measure == "KL"
    model = Custom(lambda self, x: self.net(x), net=net)
    model.config = SimpleNamespace(problem_type="regression")
    shifted = Custom(lambda self, x: self.net(x) + 1, net=net)
    judge = Reference(model, [x])
    assert judge.measure == "relative squared error"
    assert judge.judged(shifted) > 0.1 > Reference(net, [x]).judged(shifted)  # no KL sees a shift


def test_padding_does_not_count_in_relative_errors() -> None:
    reference, got = torch.ones(2, 3, 1), torch.ones(2, 3, 1)
    got[0, 2] = 9
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert divergence(reference, got, mask, "relative squared error").tolist() == [0] * 5
    padded = reference.clone()
    padded[0, 2] = 100  # nor does it make the others' errors small
    got[1, 0] = 3
    assert divergence(padded, got, mask, "relative squared error").tolist() == [0, 0, 4, 0, 0]


def test_what_is_judged_by() -> None:
    """Broken predictions are the worst there is; a broken reference judges nothing."""
    x, nan = [torch.ones(2, 3)], lambda self, x: self.a(x) * math.nan
    layer = nn.Linear(3, 4)
    good, bad = Custom(lambda self, x: self.a(x), a=layer), Custom(nan, a=layer)
    assert Reference(good, x).judged(good) == 0
    assert Reference(good, x).judged(bad) == math.inf
    for model in (good, bad):
        with pytest.raises(NotFinite, match="the dense model's predictions on held-out rows"):
            Reference(bad, x).judged(model)
