"""Fused linear layers, as a whole or by parts, through the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.methods.whitened import Whitened
from lowrank.nn.split_linear import SplitLinear

from ..zoo import said, unchanged
from .test_resuming import call, digests, stopped

WORDS = 60
SIZE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
DRAW = torch.Generator().manual_seed(0)
DATA = torch.randint(0, WORDS, (32, 16), generator=DRAW)


def _model(family: str) -> Any:
    """A model whose queries and keys have low rank and whose values have not: by parts they can
    differ, as a whole they cannot."""
    import transformers as tf

    torch.manual_seed(0)
    if family == "GPT2":
        config: Any = tf.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=64
        )
        model: Any = tf.GPT2LMHeadModel(config)
        weights = [block.attn.c_attn.weight.data.T for block in model.transformer.h]
    else:
        model = tf.Phi3ForCausalLM(tf.Phi3Config(**SIZE))
        weights = [block.self_attn.qkv_proj.weight.data for block in model.model.layers]
    for weight in weights:
        rows = len(weight) - (32 if family == "GPT2" else 16)
        weight[:rows] = torch.randn(rows, 4) @ torch.randn(4, 32) / 8
        weight[rows:] = torch.randn(len(weight) - rows, 32) / 4
    return model.eval()


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(DATA).logits
    return logits


def _split(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, SplitLinear)]


@pytest.mark.parametrize("family", ["Phi3", "GPT2"])
@pytest.mark.parametrize("effort", [None, "fast"])
def test_by_parts_where_nearer_and_saved(family: str, effort: str | None, tmp_path: Path) -> None:
    dense = _model(family)
    options: dict[str, Any] = {"policy": "spectrum"} if effort is None else {"effort": effort}
    with unchanged(dense):
        small, report = lowrank.compress(
            dense, 0.6, data=[DATA], copy=True, progress=False, **options
        )
    names = [name for name in _split(small) if name.endswith(("qkv_proj", "c_attn"))]
    assert len(names) == 2
    assert any("fused matrices are factored by parts" in note for note in report.notes)
    assert report.achieved <= 0.6
    small.save_pretrained(tmp_path)
    loaded = lowrank.from_pretrained(tmp_path)
    assert torch.equal(_logits(loaded), _logits(small))
    merged = lowrank.to_dense(loaded)
    assert list(merged.state_dict()) == list(dense.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in dense.modules()]
    torch.testing.assert_close(_logits(merged), _logits(small), rtol=1e-4, atol=1e-4)


def test_by_parts_it_is_nearer_than_as_a_whole() -> None:
    dense, errors = _model("Phi3"), []
    for parted in (True, False):
        calibration = lowrank.calibrate(dense, [DATA], progress=False)
        if not parted:
            calibration.observation.cuts.clear()
        small, report = lowrank.compress(
            dense, 0.6, data=calibration, policy="spectrum", copy=True, progress=False,
            target_modules=["qkv_proj"],
        )  # fmt: skip
        assert report.achieved <= 0.6
        assert bool(_split(small)) == parted
        errors.append((_logits(small) - _logits(dense)).norm())
    assert errors[0] < 0.8 * errors[1]


def test_one_that_is_nearer_as_a_whole_stays_whole() -> None:
    dense = _model("Phi3")
    for block in dense.model.layers:  # all parts read the same four directions
        weight = block.mlp.gate_up_proj.weight.data
        weight.copy_(torch.randn(len(weight), 4) @ torch.randn(4, 32) / 8)
    with unchanged(dense):
        plan = lowrank.plan(
            dense, 0.3, data=[DATA], target_modules=["gate_up_proj"], progress=False
        )
    assert "parts" not in plan.settings
    assert [e.name for e in plan.entries if e.target] == [
        f"model.layers.{i}.mlp.gate_up_proj" for i in range(2)
    ]


def test_a_plan_carries_its_parts(tmp_path: Path) -> None:
    dense = _model("GPT2")
    options: dict[str, Any] = {"data": [DATA], "policy": "spectrum", "progress": False}
    with unchanged(dense):
        plan = lowrank.plan(dense, 0.6, **options)
    assert plan.settings["parts"]["transformer.h.0.attn.c_attn"] == [32, 32, 32]
    again = lowrank.Plan.from_json(plan.to_json())
    one, _ = lowrank.apply(dense, again, data=[DATA], copy=True, progress=False)
    calibration = lowrank.calibrate(dense, [DATA], progress=False)
    other, _ = lowrank.apply(dense, plan, data=calibration, copy=True, progress=False)
    small, _ = lowrank.compress(dense, 0.6, copy=True, **options)
    for name, value in small.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name
        assert torch.equal(other.state_dict()[name], value), name


def test_a_sweep_finds_what_compress_does() -> None:
    dense = _model("GPT2")
    options: dict[str, Any] = {"data": [DATA], "policy": "spectrum", "progress": False}
    with unchanged(dense):
        swept = lowrank.sweep(dense, [0.8, 0.5], **options)
    for point in swept.points:
        _, report = lowrank.compress(dense, point.ratio, copy=True, **options)
        assert [e.name for e in point.report.plan.entries] == [e.name for e in report.plan.entries]
        measured = [site.measured for site in report.sites]
        assert [site.measured for site in point.report.sites] == pytest.approx(measured)


def test_from_folder_to_folder_it_is_the_same(tmp_path: Path) -> None:
    dense = _model("Phi3")
    dense.save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"data": [DATA], "effort": "fast", "progress": False}
    small, _ = lowrank.compress(lowrank.from_pretrained(tmp_path / "dense"), 0.6, **options)
    lowrank.compress(str(tmp_path / "dense"), 0.6, out=tmp_path / "out", **options)
    streamed = lowrank.from_pretrained(tmp_path / "out")
    assert _split(streamed) == _split(small) != []
    torch.testing.assert_close(_logits(streamed), _logits(small), rtol=1e-4, atol=1e-5)


def test_a_plan_for_other_parts_is_refused() -> None:
    dense = _model("GPT2")
    plan = lowrank.plan(dense, 0.6, data=[DATA], policy="spectrum", progress=False)
    text = plan.to_json().replace(
        '"transformer.h.0.attn.c_attn": [\n', '"transformer.h.0.mlp": [\n'
    )
    assert text != plan.to_json()
    with unchanged(dense), pytest.raises(LowrankError, match="made for another model") as caught:
        lowrank.apply(dense, lowrank.Plan.from_json(text), data=[DATA], progress=False)
    said(caught)


@pytest.mark.parametrize("sizes", [[32, 32], "x", [32, 64.0], [0, 96], {}])
def test_a_damaged_declaration_is_one_error(sizes: Any, tmp_path: Path) -> None:
    import json

    small, _ = lowrank.compress(_model("GPT2"), 0.6, data=[DATA], policy="spectrum", progress=False)
    small.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"]["transformer.h.0.attn.c_attn"]["sizes"] = sizes
    path.write_text(json.dumps(config))
    with pytest.raises(LowrankError, match="architectures differ") as caught:
        lowrank.from_pretrained(tmp_path)
    said(caught)


def test_nothing_is_decomposed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = _model("Phi3")
    calibration = lowrank.calibrate(dense, [DATA], progress=False)
    seen: list[tuple[str, ...]] = []
    curve = Whitened.curve
    monkeypatch.setattr(
        Whitened, "curve", lambda *args: (seen.append(args[1].names), curve(*args))[1]
    )
    lowrank.plan(dense, 0.6, data=calibration, policy="spectrum", progress=False)
    assert any(names[0].endswith("qkv_proj.2") for names in seen)
    assert len(seen) == len(set(seen))


def test_a_call_that_was_stopped_goes_on_with_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "dense"
    _model("Phi3").save_pretrained(source)
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
    call(source, tmp_path / "whole" / "out")
    stopped(monkeypatch, source, tmp_path / "stopped" / "out")
    call(source, tmp_path / "stopped" / "out")
    found, expected = (digests(tmp_path / place / "out") for place in ("stopped", "whole"))
    assert found == expected
    assert _split(lowrank.from_pretrained(tmp_path / "whole" / "out"))
