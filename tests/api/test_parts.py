"""Attention of torch, recurrent nets, grouped and transposed convolutions through the verbs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.nn.unfused import Unfused

from ..fused import NETS, net
from ..zoo import said, unchanged

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def _run(model: nn.Module, data: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(data)
    return output


def _small(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    dense, data = net(name)
    chosen = {"data": [data], "copy": True, "progress": False, **options}
    with unchanged(dense):
        small, report = lowrank.compress(dense, 0.6, **chosen)
    return dense, small, data, report


@pytest.mark.parametrize("effort", [None, "fast", lowrank.Recovery(block_steps=30)])
@pytest.mark.parametrize("name", NETS)
def test_compressed_saved_loaded_and_merged(
    name: str, effort: str | lowrank.Recovery | None, tmp_path: Path
) -> None:
    dense, small, data, report = _small(name, effort=effort)
    left = {e.name for e in report.plan.entries if not e.target}
    assert left == {"first", "last"} if name == "U-Net" else left == {"embedding", "head"}
    assert report.achieved <= 0.6
    lowrank.save(small, tmp_path)
    loaded = lowrank.load(tmp_path, copy.deepcopy(dense)).eval()
    assert torch.equal(_run(loaded, data), _run(small, data))
    merged = lowrank.to_dense(loaded)
    assert list(merged.state_dict()) == list(dense.state_dict())
    assert [type(m) for m in merged.modules() if "Split" in type(m).__name__] == []
    torch.testing.assert_close(_run(merged, data), _run(small, data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "Transformer", "U-Net"])
def test_efforts_are_nearer_than_plain_svd(name: str) -> None:
    dense, plain, data, _ = _small(name, data=None)
    _, small, _, _ = _small(name, effort="fast")
    expected = _run(dense, data)
    assert (_run(small, data) - expected).norm() < 0.6 * (_run(plain, data) - expected).norm()


@pytest.mark.parametrize("name", NETS)
def test_fine_tuning_reaches_every_part(name: str) -> None:
    _, small, data, _ = _small(name)
    small.train()
    small(data).square().mean().backward()
    assert not [key for key, p in small.named_parameters() if p.grad is None]


def test_a_root_and_half_precision() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(32, 32, batch_first=True).to(torch.bfloat16)
    data = torch.randn(16, 8, 32, dtype=torch.bfloat16)
    small, report = lowrank.compress(lstm, 0.5, data=[data], progress=False)
    assert small is lstm
    assert isinstance(lstm, Unfused)
    assert {p.dtype for p in lstm.parameters()} == {torch.bfloat16}
    assert [e.name for e in report.plan.entries if e.target] == ["ih_l0", "hh_l0"]
    assert lstm(data)[0].isfinite().all()


def test_attention_that_stays_dense_keeps_its_class_and_its_kernel() -> None:
    _, small, _, _ = _small("TransformerEncoder", target_modules=["linear1", "linear2"])
    attention = [m for m in small.modules() if isinstance(m, nn.MultiheadAttention)]
    assert {type(m) for m in attention} == {nn.MultiheadAttention}
    assert all(m._qkv_same_embed_dim for m in attention)


def test_a_part_can_be_named() -> None:
    _, small, _, report = _small("LSTM", target_modules=["hh_l0"])
    assert [e.name for e in report.plan.entries if e.target] == ["rnn.hh_l0"]
    assert {k for k in small.state_dict() if "hh_l0." in k} >= {"rnn.hh_l0.down.weight"}


def test_a_skeleton_of_another_size_is_refused(tmp_path: Path) -> None:
    dense, small, _, _ = _small("LSTM")
    lowrank.save(small, tmp_path)
    other: Any = copy.deepcopy(dense)
    other.rnn = nn.LSTM(32, 40, num_layers=2, bidirectional=True, batch_first=True)
    with unchanged(other), pytest.raises(LowrankError, match="the architectures differ") as caught:
        lowrank.load(tmp_path, other)
    said(caught)
    other.rnn = nn.GRU(32, 48, num_layers=2, bidirectional=True, batch_first=True)
    with unchanged(other), pytest.raises(LowrankError, match="SplitGRU"):
        lowrank.load(tmp_path, other)
    other.rnn = nn.Identity()
    with unchanged(other), pytest.raises(LowrankError, match="Identity"):
        lowrank.load(tmp_path, other)


def test_an_error_while_loading_leaves_the_skeleton_whole(tmp_path: Path) -> None:
    dense, small, _, _ = _small("Transformer")
    lowrank.save(small, tmp_path)
    index = json.loads((tmp_path / "lowrank.json").read_text())
    name = next(key for key, spec in index["modules"].items() if spec["type"] == "LowRankLinear")
    index["modules"][name]["rank"] = 1
    (tmp_path / "lowrank.json").write_text(json.dumps(index))
    skeleton = copy.deepcopy(dense)
    with unchanged(skeleton), pytest.raises(LowrankError):
        lowrank.load(tmp_path, skeleton)
    assert not [m for m in skeleton.modules() if isinstance(m, Unfused)]


def test_tied_recurrent_nets_stay_tied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.GRU(32, 32), nn.GRU(32, 32)
            for name, parameter in list(self.one.named_parameters()):
                setattr(self.other, name, parameter)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.other(self.one(x)[0])[0]
            return output

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(12, 8, 32)
    small, report = lowrank.compress(net, 0.6, data=[x], progress=False)
    assert len([e for e in report.plan.entries if e.target]) == 2
    assert small.one.hh_l0 is small.other.hh_l0


def test_a_model_of_transformers_that_uses_torchs_attention(tmp_path: Path) -> None:
    """It initialises attention's parameters by their names when it loads."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model: Any = tf.SiglipVisionModel(config).eval()
    images = torch.randn(8, 3, 16, 16)
    small, report = lowrank.compress(model, 0.5, data=[{"pixel_values": images}], progress=False)
    assert any(e.name.endswith("head.attention.v_proj") for e in report.plan.entries if e.target)
    small.save_pretrained(tmp_path)
    loaded = lowrank.from_pretrained(tmp_path)
    with torch.no_grad():
        found, expected = (m(pixel_values=images).pooler_output for m in (loaded, small))
    assert torch.equal(found, expected)
