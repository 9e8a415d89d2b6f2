"""Statistics of padded batches are those of the rows by themselves, each cut to its own length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank import compress
from lowrank.calibration.file import load_calibration, save_calibration
from lowrank.calibration.padding import Padding, encoder_of, masks_of, reals
from lowrank.calibration.running import forward
from lowrank.calibration.statistics import Calibration, doubts
from lowrank.measure.eval import Reference
from lowrank.walk.sites import find_sites
from tests.zoo import VOCABULARY, Custom, by_name, calibration, make, tokens

LENGTHS = (8, 5, 3)  # of the rows of a batch


def mask(*lengths: int, most: int = 8) -> Tensor:
    return (torch.arange(most) < torch.tensor(lengths)[:, None]).long()


def counts(found: Calibration, part: str = "") -> set[int]:
    """How many positions the linear layers of a part saw."""
    return {s.count for n, s in found.statistics.items() if part in n and s.freq is None}


def words(rows: int, most: int, start: int = 0) -> Tensor:
    """Ids of no special meaning."""
    return tokens(rows, most, start) % 50 + 5


def assert_like_rows(model: nn.Module, padded: Any, rows: list[Any]) -> None:
    """The moments of one padded batch are those of its rows, run one by one without padding."""
    got, want = calibration(model, padded).statistics, calibration(model, rows).statistics
    assert {n: s.count for n, s in got.items()} == {n: s.count for n, s in want.items()}
    for name, stats in want.items():
        for kind in ("gram", "mean", "freq"):
            expected = getattr(stats, kind)
            if expected is not None:
                torch.testing.assert_close(getattr(got[name], kind), expected, rtol=1e-4, atol=1e-5)


def bart() -> Any:
    import transformers as tf

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feeds = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40}
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    config = tf.BartConfig(vocab_size=VOCABULARY, **sizes, **heads, **feeds, **ends)
    return tf.BartForConditionalGeneration(config).eval()


# Encoder and decoder


def wrapped() -> nn.Module:
    return Custom(lambda self, **batch: self.inner(**batch), inner=bart())


@pytest.mark.parametrize("build", [bart, wrapped])
def test_an_encoders_mask_is_not_the_decoders_although_the_lengths_agree(
    build: Callable[[], nn.Module],
) -> None:
    ids, targets = tokens(4, 32), tokens(4, 32, start=3)
    batch = {"input_ids": ids, "attention_mask": mask(8, 8, 8, 8, most=32)}
    found = calibration(build(), {**batch, "decoder_input_ids": targets})
    assert counts(found, "encoder.layers") == {32}
    assert counts(found, "decoder.layers.0.self_attn") == {128}
    assert counts(found, "decoder.layers.0.fc") == {128}
    crossing = {n: s.count for n, s in found.statistics.items() if "encoder_attn" in n}
    want = {"k_proj": 32, "v_proj": 32, "q_proj": 128, "out_proj": 128}
    assert {name.split(".")[-1]: count for name, count in crossing.items()} == want
    shared = next(s for s in found.statistics.values() if s.freq is not None and s.count > 100)
    assert shared.count == 32 + 128
    assert not found.padded


@pytest.mark.parametrize("told", ["decoder_attention_mask", "labels"])
def test_a_decoders_own_padding(told: str) -> None:
    """As rows by themselves, of equal and of other lengths than the encoder's."""
    model = bart()
    for most, lengths in ((8, (4, 8, 6)), (6, (6, 2, 5))):
        ids, targets = words(3, 8), words(3, most, start=5)
        own = mask(*lengths, most=most)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask(*LENGTHS)}
        if told == "labels":
            batch["labels"] = targets.masked_fill(own == 0, -100)
        else:
            batch |= {"decoder_input_ids": targets, told: own}
        name = "labels" if told == "labels" else "decoder_input_ids"
        rows = [
            {"input_ids": ids[[i], :n], name: targets[[i], :m]}
            for i, (n, m) in enumerate(zip(LENGTHS, lengths, strict=True))
        ]
        assert_like_rows(model, batch, rows)


def test_a_decoder_that_reads_the_encoders_input() -> None:
    """BART shifts its input to that of its decoder, if it is given none."""
    batch = {"input_ids": words(3, 8), "attention_mask": mask(*LENGTHS)}
    found = calibration(bart(), batch)
    assert counts(found) == {sum(LENGTHS)}


def test_masks_of_an_encoder_decoder() -> None:
    model, both = make("t5"), torch.ones(2, 3)
    assert encoder_of(model) is model.encoder
    assert encoder_of(make("bert")) is None
    first = {"attention_mask": torch.tensor([[1, 1, 0]] * 2)}
    own = {"decoder_attention_mask": torch.tensor([[1, 0, 0]] * 2)}
    labels = {"labels": torch.tensor([[4, -100, 5]] * 2)}

    def told(batch: Any) -> list[Any]:
        return [m if m is None else m.int().tolist()[0] for m in masks_of(model, batch)]

    assert told({**first, **labels}) == [[1, 1, 0], [1, 0, 1]]
    assert told({**first, **labels, **own}) == [[1, 1, 0], [1, 0, 0]]
    assert told({**first, "labels": both}) == [[1, 1, 0], None]
    assert told({**first, "decoder_input_ids": both}) == [[1, 1, 0], None]
    assert told(labels) == [None, [1, 0, 1]]
    # Of a decoder alone labels say what is learned, not what is padding.
    assert masks_of(make("llama"), {**first, **labels})[1] is not None
    assert masks_of(make("llama"), labels) == (None, None)
    assert masks_of(model, tokens()) == (None, None)


# Speech


SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 11,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "apply_spec_augment": False,
}  # fmt: skip


def speech(kind: str, **changes: Any) -> Any:
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(**{**SPEECH, **changes})
    torch.manual_seed(0)
    return getattr(tf, f"{kind}ForCTC")(config).eval()


RELATIVE = "wavlm.encoder.layers.0.attention.rel_attn_embed"  # looked up by pairs of frames


def sounds() -> tuple[Tensor, tuple[int, ...]]:
    lengths = (400, 123, 260)
    torch.manual_seed(0)
    return torch.randn(3, 400) * mask(*lengths, most=400), lengths


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # WavLM's own
@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM"])
def test_frames_of_padded_samples_are_not_counted(kind: str) -> None:
    """The mask is one of samples: it is mapped through the convolutions to frames."""
    model, (x, lengths) = speech(kind), sounds()
    padded = {"input_values": x, "attention_mask": mask(*lengths, most=400)}
    found = calibration(model, padded)
    frames = model._get_feat_extract_output_lengths(torch.tensor(lengths))
    assert int(frames.sum()) == 39 + 11 + 25
    linear = {n: s.count for n, s in found.statistics.items() if "conv" not in n and s.count}
    table = linear.pop(RELATIVE, 39 * 39)
    heads = {linear.pop(name) for name in list(linear) if "gru_rel_pos" in name}
    assert (set(linear.values()), table, heads <= {2 * 75}) == ({75}, 39 * 39, True)
    first = found.statistics[f"{model.base_model_prefix}.feature_extractor.conv_layers.0.conv"]
    assert first.count == 79 + 23 + 51
    assert not found.padded
    if kind != "WavLM":  # whose positions are looked up once a batch
        rows = [{"input_values": row[None, :n]} for row, n in zip(x, lengths, strict=True)]
        assert_like_rows(model, padded, rows)


def test_predictions_at_padded_frames_do_not_count() -> None:
    model, (x, lengths) = speech("Wav2Vec2"), sounds()
    padded = {"input_values": x, "attention_mask": mask(*lengths, most=400)}
    counted = Reference(model, [padded]).mask(0)
    assert counted is not None
    assert counted.sum(1).tolist() == [39, 11, 25]


def test_frames_of_an_encoder_that_reads_all() -> None:
    """Whisper's encoder is handed no mask, but its convolutions read what the mask is of."""
    import transformers as tf

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feeds = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_source_positions": 20}
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    more = {"vocab_size": VOCABULARY, "max_target_positions": 30, "suppress_tokens": None}
    config = tf.WhisperConfig(**sizes, **heads, **feeds, **ends, **more)
    model = tf.WhisperForConditionalGeneration(config).eval()
    x, lengths = torch.randn(3, 4, 40), (40, 13, 26)
    batch = {"input_features": x, "attention_mask": mask(*lengths, most=40)}
    batch["labels"] = tokens(3, 20).masked_fill(mask(20, 6, 9, most=20) == 0, -100)
    found = calibration(model, batch)
    assert counts(found, "encoder.layers") == {20 + 7 + 13}
    assert found.statistics["model.encoder.conv1"].count == sum(lengths)
    assert found.statistics["model.encoder.conv2"].count == 20 + 7 + 13
    assert counts(found, "decoder.layers.0.self_attn") == {35}
    assert counts(found, "decoder.layers.0.encoder_attn.k_proj") == {40}


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (5, 1, 2)])
def test_a_convolution_maps_a_mask_to_the_length_of_its_output(
    kernel: int, stride: int, dilation: int, padding: Any
) -> None:
    for step in {stride, 1 if isinstance(padding, str) else 3}:
        conv = nn.Conv1d(2, 3, kernel, stride=step, dilation=dilation, padding=padding)
        lengths = (20, 11, 14)
        outputs = [conv(torch.randn(1, 2, n)).shape[-1] for n in lengths]
        model = Custom(lambda self, x, attention_mask: self.conv(x), conv=conv)
        batch = {"x": torch.randn(3, 2, 20), "attention_mask": mask(*lengths, most=20)}
        assert calibration(model, batch).statistics["conv"].count == sum(outputs)


# Time first


def xlnet() -> Any:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24)
    return tf.XLNetLMHeadModel(config).eval()


@pytest.mark.parametrize("most", [8, 5])
def test_layers_that_read_time_first(most: int) -> None:
    """With as many rows as tokens, the mask has the right shape both ways."""
    ids, lengths = tokens(5, most), (5, 2, 3, 1, 4)
    padded = {"input_ids": ids, "attention_mask": mask(*lengths, most=most)}
    rows = [{"input_ids": ids[[i], :n]} for i, n in enumerate(lengths)]
    assert_like_rows(xlnet(), padded, rows)


def test_a_square_batch_is_run_in_two() -> None:
    """So that the shape of every input tells which axis is time."""
    padded = {"input_ids": tokens(5, 5), "attention_mask": mask(5, 2, 3, 1, 4, most=5)}
    halves = calibration(xlnet(), [padded, {"input_ids": tokens(5, 5)}]).batches
    assert not callable(halves)
    assert [len(half["input_ids"]) for half in halves] == [4, 1, 5]  # type: ignore[call-overload]


# What is known, and what is not


def test_a_tower_of_images_has_no_padding() -> None:
    """Of 5 patches each, as many as there are words."""
    import transformers as tf

    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    part["num_attention_heads"] = 2
    config = tf.CLIPConfig(
        text_config={**part, "vocab_size": VOCABULARY, "max_position_embeddings": 8},
        vision_config={**part, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    batch = {"input_ids": tokens(2, 5), "attention_mask": mask(5, 2, most=5)}
    found = calibration(tf.CLIPModel(config), {**batch, "pixel_values": torch.randn(2, 3, 8, 8)})
    assert counts(found, "text_model.encoder") == {7}
    assert counts(found, "vision_model.encoder") == {10}
    assert not found.padded


def test_a_callable_is_known_by_what_it_hands_the_model() -> None:
    model, batch = make("bert"), {"input_ids": tokens(3, 8), "attention_mask": mask(*LENGTHS)}
    found = calibration(model, lambda m: m(**batch))
    assert counts(found) == {sum(LENGTHS)}


def test_positions_that_no_mask_fits_are_counted_and_told(tmp_path: Path) -> None:
    def call(self: Any, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.c(self.b(hidden[:, ::2])[:, 0])

    model = Custom(call, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    batch = {"x": torch.randn(3, 8, 4), "attention_mask": mask(*LENGTHS)}
    found = calibration(model, batch)
    assert [found.statistics[name].count for name in "abc"] == [16, 12, 3]
    assert found.padded == ("b",)
    (told,) = [text for text in doubts(find_sites(model), found) if "padding" in text]
    assert "padding may be counted in the inputs of 1 layers" in told
    assert "b" in told
    save_calibration(found, tmp_path / "kept", model)
    assert load_calibration(tmp_path / "kept", model).padded == ("b",)
    _, report = compress(model, 0.6, data=batch, progress=False)
    assert told in str(report)


def test_an_unpadded_batch_tells_nothing() -> None:
    model = make("bert")
    batch = {"input_ids": tokens(3, 8), "attention_mask": torch.ones(3, 8)}
    assert calibration(model, batch).padded == ()


def test_a_square_mask_that_cannot_be_cut_fits_nothing() -> None:
    """Which axis of the inputs is time is not known: all is counted, and told."""
    model, batch = make("bert"), {"input_ids": tokens(8, 8), "attention_mask": mask(*range(1, 9))}
    found = calibration(model, lambda m: m(**batch))
    assert counts(found, "encoder.layer") == {64}
    assert "bert.encoder.layer.0.attention.self.query" in found.padded
    assert counts(calibration(model, batch), "encoder.layer") == {36}


def test_recovery_leaves_out_the_same() -> None:
    model = bart()
    batch = {
        "input_ids": tokens(4, 32),
        "attention_mask": mask(8, 8, 8, 8, most=32),
        "decoder_input_ids": tokens(4, 32, start=3),
    }
    sites = by_name(find_sites(model))
    found = reals(model, batch)

    def real(name: str) -> Any:
        (one,) = found[sites[name].module]
        return one if one is None else int(one.sum())

    assert real("model.encoder.layers.0.fc1") == 32
    assert real("model.decoder.layers.0.fc1") is None
    assert real("model.decoder.layers.0.encoder_attn.k_proj") == 32


def test_no_hook_is_left_behind() -> None:
    model = bart()
    batch = {"input_ids": tokens(3, 8), "attention_mask": mask(*LENGTHS)}
    with Padding(model) as padding:
        padding.start(batch)
        forward(model, batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
