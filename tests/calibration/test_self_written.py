"""What a causal language model writes is a sample of its own distribution, and repeatable."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

import lowrank
from lowrank import LowrankError
from lowrank.calibration import self_written
from lowrank.calibration.self_written import described, write, writes
from tests.zoo import VOCABULARY, Custom, llama, make, mlp, said, unchanged


def decided(**changes: Any) -> Any:
    """A Llama that has opinions: its words are not equally likely."""
    torch.manual_seed(3)
    model = llama(**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(16)
    return model


def qwen() -> Any:
    import transformers as tf

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=VOCABULARY, **sizes, **more)).eval()


def constant(chances: Tensor, **changes: Any) -> Any:
    """A model whose next token has these chances, whatever stands before."""
    model = llama(vocab_size=len(chances), **changes).eval()
    model.lm_head = nn.Linear(32, len(chances))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(chances.log())
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "qwen"])
def test_causal_models_write_and_are_left_as_they_are(kind: str) -> None:
    model = (qwen() if kind == "qwen" else make(kind)).train()
    settings = model.generation_config.to_dict()
    with unchanged(model):
        assert writes(model)
        got = write(model, rows=5, length=9, seed=1)
    assert model.generation_config.to_dict() == settings
    assert (got.shape, got.dtype) == ((5, 9), torch.int64)
    assert 0 <= got.min() <= got.max() < VOCABULARY
    assert torch.equal(write(model, rows=5, length=9, seed=1), got)
    assert not torch.equal(write(model, rows=5, length=9, seed=2), got)


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "mlp"])
def test_other_models_refuse(kind: str) -> None:
    model = mlp(4, 3) if kind == "mlp" else make(kind)
    assert not writes(model)
    with unchanged(model), pytest.raises(LowrankError) as caught:
        write(model)
    assert said(caught).startswith(f"{type(model).__name__} cannot write its calibration data")


def test_frequencies_are_the_models_own() -> None:
    chances = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01, 0.0])
    model = constant(chances, bos_token_id=0, eos_token_id=0)
    drawn = write(model, rows=200, length=64)[:, 1:]
    count = drawn.numel()
    found = drawn.flatten().bincount(minlength=7) / count
    spread = (chances * (1 - chances) / count).sqrt()
    assert bool(((found - chances).abs() <= 4.5 * spread).all()), found


def test_what_is_drawn_follows_from_what_stands_before() -> None:
    """Under the model's own law, surprise less entropy has mean zero: a sum of martingale steps."""
    model = decided(bos_token_id=0, eos_token_id=0)
    rows = write(model, rows=96, length=48)
    with torch.no_grad():
        told = log_softmax(model(input_ids=rows).logits[:, :-1].double(), -1)
    entropy = -(told.exp() * told).sum(-1)
    variance = (told.exp() * told**2).sum(-1) - entropy**2
    surprise = -told.gather(-1, rows[:, 1:, None])[..., 0]
    assert entropy.mean() < math.log(VOCABULARY) - 0.5  # or all would be alike
    assert abs(float((surprise - entropy).sum())) < 4.5 * float(variance.sum()) ** 0.5


@pytest.mark.parametrize("broken", ["none", "wrong", "unknown"])
def test_a_model_without_a_good_cache_writes_the_same(broken: str) -> None:
    model = decided()
    expected, run = write(model, rows=12, length=20), model.forward

    def forward(input_ids: Tensor, **given: Any) -> Any:
        if broken == "unknown" and given:
            raise TypeError("unexpected keyword argument")
        if broken == "wrong" and "past_key_values" in given:
            given.pop("past_key_values")
        found = run(input_ids=input_ids, **given)
        memory = None if broken == "none" else found.past_key_values
        return SimpleNamespace(logits=found.logits, past_key_values=memory)

    model.forward = forward
    assert not self_written._remembers(model)
    assert torch.equal(write(model, rows=12, length=20), expected)


def recurrent(kind: str) -> Any:
    import transformers as tf

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
    if kind == "mamba":
        return tf.MambaForCausalLM(tf.MambaConfig(**sizes, state_size=8))
    if kind == "mamba2":
        return tf.Mamba2ForCausalLM(tf.Mamba2Config(**sizes, **heads, state_size=8))
    return tf.RwkvForCausalLM(tf.RwkvConfig(**sizes, attention_hidden_size=32))


@pytest.mark.parametrize("kind", ["llama", "mamba", "mamba2", "rwkv"])
def test_the_cache_is_used(kind: str) -> None:
    """Or the work grows with the square of the length; recurrent models call it otherwise."""
    model, lengths = decided() if kind == "llama" else recurrent(kind), []
    model.register_forward_pre_hook(
        lambda _m, _args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    write(model, rows=3, length=30)
    assert lengths[-29:] == [1] * 29


def test_the_tokens_do_not_depend_on_the_batch() -> None:
    model = decided()
    assert torch.equal(write(model, rows=20, length=12, batch=7), write(model, rows=20, length=12))


def test_a_quarter_starts_with_the_start_token_and_the_others_differ() -> None:
    model = llama(bos_token_id=5, eos_token_id=[6, 7], pad_token_id=8)
    first = write(model, rows=40, length=2)[:, 0].tolist()
    assert first[:10] == [5] * 10
    assert len(set(first[10:])) == 30
    assert not {5, 6, 7, 8} & set(first[10:])
    many = write(model, rows=200, length=1)[50:, 0]
    assert set(many.tolist()) == set(range(VOCABULARY)) - {5, 6, 7, 8}
    assert many.bincount().max() == 3  # 150 of 57: every word two or three times


@pytest.mark.parametrize("start", [None, VOCABULARY, -1])
def test_without_a_start_token_all_rows_start_at_random(start: int | None) -> None:
    model = llama(bos_token_id=start, eos_token_id=1)
    model.generation_config.bos_token_id = None
    first = write(model, rows=40, length=2)[:, 0].tolist()
    assert len(set(first)) == 40
    assert 1 not in first


def test_what_the_model_is_to_generate_with_comes_first() -> None:
    model = llama(bos_token_id=5)
    model.generation_config.bos_token_id = 9
    assert write(model, rows=4, length=1)[0, 0] == 9


def test_after_an_end_comes_a_start_where_both_are() -> None:
    chances = torch.full((10,), 0.1)
    rows = write(constant(chances, bos_token_id=3, eos_token_id=[1, 2]), rows=40, length=40)
    after = rows[:, 1:][(rows[:, :-1] == 1) | (rows[:, :-1] == 2)]
    assert len(after) > 100
    assert set(after.tolist()) == {3}
    for same in ({"bos_token_id": 1, "eos_token_id": 1}, {"bos_token_id": None, "eos_token_id": 1}):
        rows = write(constant(chances, **same), rows=40, length=40)
        assert len(set(rows[:, 1:][rows[:, :-1] == 1].tolist())) == 10


def test_rows_fit_the_positions() -> None:
    assert write(make("llama"), rows=2, length=100).shape == (2, 64)
    assert described(make("gpt2"), length=100, seed=4) == (
        "192 rows of 64 tokens that the model wrote itself, seed 4"
    )
    assert described(make("gpt2"), length=10).startswith("192 rows of 10 tokens")


def test_a_model_that_looks_ahead_refuses() -> None:
    import transformers as tf

    config = make("bert").config
    model = tf.BertLMHeadModel(config).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.mul_(50)
    with pytest.raises(LowrankError, match="attends to later tokens too"):
        write(model, rows=2, length=8)


def test_a_model_that_fails_says_why_and_what_to_do() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(LowrankError, match="logits are NaN: pass data=None"):
        write(model, rows=2, length=8)
    model.model.layers[0] = Custom(lambda _self, *_args, **_given: [][1])
    with unchanged(model), pytest.raises(LowrankError) as caught:
        write(model, rows=2, length=8)
    assert "failed to write its calibration data (list index out of range)" in said(caught)


def test_calibrating_on_it_is_calibrating_on_its_rows() -> None:
    model = make("llama")
    seen = lowrank.calibrate(model, "self", length=16, seed=2, progress=False)
    rows = write(model, length=16, seed=2)
    given = lowrank.calibrate(model, list(rows.split(16)), progress=False)
    assert seen.source == "192 rows of 16 tokens that the model wrote itself, seed 2"
    assert (given.source, given.tokens) == ("", 192 * 16)
    assert isinstance(seen.batches, list)
    assert [len(batch) for batch in seen.batches] == [16] * 12
    for name, found in given.statistics.items():
        mine = seen.statistics[name]
        for one, other in ((mine.gram, found.gram), (mine.freq, found.freq)):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


# Models of other settings


def test_every_setting_that_limits_positions_counts() -> None:
    from transformers import MptConfig, MptForCausalLM

    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 4, "n_layers": 1}
    model = MptForCausalLM(MptConfig(**sizes, max_seq_len=8, expansion_ratio=2))
    assert write(model, rows=2, length=12).shape == (2, 8)


def test_no_limit_is_none_and_a_model_that_looks_ahead_is_refused_for_that() -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 32}
    model = XLNetLMHeadModel(XLNetConfig(**sizes))
    assert model.config.max_position_embeddings == -1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    with pytest.raises(LowrankError, match="attends to later tokens too") as caught:
        write(model, rows=2, length=12)
    assert said(caught)


@pytest.mark.parametrize("stale", [[[5]], [[5], [7]]])
def test_positions_that_an_earlier_call_left_behind_do_no_harm(stale: list[list[int]]) -> None:
    """Some models keep an offset of the last images, for as many rows as there were."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = llama(), None
            self.config, self.generation_config = self.model.config, None
            self.main_input_name, self.can_generate = "input_ids", lambda: True
            self.left: Tensor | None = None

        def forward(self, input_ids: Tensor, past_key_values: Any = None, **more: Any) -> Any:
            if past_key_values is not None and self.left is not None:
                shift = self.left.repeat_interleave(len(input_ids) // len(self.left), 0)
                start = past_key_values.get_seq_length()
                more["position_ids"] = start + shift + torch.zeros_like(input_ids)
            return self.model(input_ids, past_key_values=past_key_values, **more)

    model = Offset().eval()
    clean = write(model, rows=3, length=9)
    model.left = torch.tensor(stale)
    assert torch.equal(write(model, rows=3, length=9), clean)
