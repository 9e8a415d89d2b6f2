"""One compressed model cut to smaller ratios: what remains, in every form, and in files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Recovery, Report
from lowrank.nn import LowRankLinear, PivotedLinear, SharedLowRankLinear
from lowrank.walk.surgery import factored
from tests.zoo import llama, make, mlp, refusal, state_of, tokens, unchanged

ROWS = tokens(12)
UNIFORM: dict[str, Any] = {"policy": "uniform", "progress": False, "copy": True}


def compressed(model: nn.Module, ratio: float, **options: Any) -> Any:
    return lowrank.compress(model, ratio, **{**UNIFORM, "data": [ROWS], **options})


@pytest.fixture(scope="module")
def whole() -> Any:
    return compressed(make("llama"), 0.8)[0]


def components(layer: Any) -> list[np.ndarray]:
    """The outer products that a layer of two factors is the sum of, by NumPy."""
    up, down = layer.up.weight.detach().numpy(), layer.down.weight.detach().numpy()
    return [np.outer(up[:, i], down[i]) for i in range(len(down))]


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_what_remains_is_what_compress_gives_at_that_ratio(method: str) -> None:
    model = make("llama")
    seen = lowrank.calibrate(model, [ROWS], progress=False)
    most, _ = compressed(model, 0.8, method=method, data=seen)
    for ratio in (0.63, 0.29):
        wanted, told = compressed(model, ratio, method=method, data=seen)
        cut, report = lowrank.at_rank(most, ratio, copy=True)
        assert report.achieved == told.achieved <= ratio
        assert report.achieved_of_model == pytest.approx(told.achieved_of_model)
        assert report.params_after == told.params_after
        for name, tensor in wanted.state_dict().items():
            torch.testing.assert_close(cut.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_first_components_stay_and_the_others_go(whole: Any) -> None:
    cut, _ = lowrank.at_rank(whole, 0.4, copy=True)
    for name, layer in factored(cut).items():
        parts = components(whole.get_submodule(name))
        assert 0 < layer.rank < len(parts)
        kept = sum(parts[: layer.rank])
        np.testing.assert_allclose(layer.dense_weight().detach(), kept, atol=1e-6)


def test_cutting_twice_is_cutting_once_and_in_place_is_a_copy(whole: Any) -> None:
    with unchanged(whole):
        once, report = lowrank.at_rank(whole, 0.3, copy=True)
    model, _ = lowrank.at_rank(whole, 0.6, copy=True)
    same, again = lowrank.at_rank(model, 0.3)
    assert same is model
    assert again.achieved == report.achieved
    assert state_of(same)["bytes"] == state_of(once)["bytes"]


def test_it_is_saved_as_any_compressed_model(whole: Any, tmp_path: Any) -> None:
    lowrank.save(whole, tmp_path / "whole")
    loaded = type(whole).from_pretrained(tmp_path / "whole").eval()
    cut, report = lowrank.at_rank(loaded, 0.4)
    cut.save_pretrained(tmp_path / "cut")
    again = type(whole).from_pretrained(tmp_path / "cut").eval()
    specs = again.config.quantization_config.modules
    assert [spec["rank"] for spec in specs.values()] == [e.size[0] for e in report.plan.entries]
    assert again.config.quantization_config.lowrank["asked"]["ratio"] == 0.4
    assert torch.equal(again(ROWS).logits, cut(ROWS).logits)
    assert "asked 0.4 of the targets" in (tmp_path / "cut" / "README.md").read_text()
    assert Report.from_json(report.to_json()) == report
    assert "holds 0.3" in refusal(lambda: lowrank.at_rank(again, 0.6), again)


def test_any_other_module_and_its_file(tmp_path: Any) -> None:
    net = mlp(24, 40, 16)
    x = torch.randn(64, 24)
    most, _ = compressed(net, 0.8, data=[x], target_modules="all")
    lowrank.save(most, tmp_path)
    loaded = lowrank.load(tmp_path, lambda: mlp(24, 40, 16))
    cut, report = lowrank.at_rank(loaded, 0.5)
    wanted, told = compressed(net, 0.5, data=[x], target_modules="all")
    assert report.achieved == told.achieved
    torch.testing.assert_close(cut(x), wanted(x), rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in cut.parameters()] == [True] * 6


def test_a_root_layer_is_returned_anew() -> None:
    layer, _ = compressed(nn.Linear(24, 16), 0.8, data=None)
    with unchanged(layer):
        cut, report = lowrank.at_rank(layer, 0.4)
    assert isinstance(cut, LowRankLinear)
    assert cut is not layer
    assert cut.bias is layer.bias
    assert report.achieved == cut.rank * 40 / (24 * 16)


def test_a_shared_basis_is_cut_in_all_its_layers() -> None:
    most, _ = compressed(make("llama"), 0.8, method="basis-sharing")
    cut, report = lowrank.at_rank(most, 0.4, copy=True)
    wanted, told = compressed(make("llama"), 0.4, method="basis-sharing")
    assert report.achieved == told.achieved
    torch.testing.assert_close(cut(ROWS).logits, wanted(ROWS).logits, rtol=1e-4, atol=1e-5)
    readers = [m for m in cut.modules() if isinstance(m, SharedLowRankLinear)]
    assert readers
    assert all(any(m is reader.owner for m in cut.modules()) for reader in readers)
    assert Report.from_json(report.to_json()) == report


def test_a_table_is_cut_with_the_head_that_is_tied_to_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).eval()
    most, _ = compressed(model, 0.8, target_modules="all")
    cut, report = lowrank.at_rank(most, 0.4, copy=True)
    wanted, told = compressed(model, 0.4, target_modules="all")
    assert report.achieved == told.achieved
    torch.testing.assert_close(cut(ROWS).logits, wanted(ROWS).logits, rtol=1e-4, atol=1e-5)
    assert cut.lm_head.owner is cut.model.embed_tokens
    lowrank.save(cut, tmp_path)
    assert torch.equal(lowrank.from_pretrained(tmp_path)(ROWS).logits, cut(ROWS).logits)
    assert Report.from_json(report.to_json()) == report


def test_convolutions_of_fewer_channels() -> None:
    net, x = (
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)),
        torch.randn(4, 8, 9, 9),
    )
    seen = lowrank.calibrate(net.eval(), [x], progress=False)
    most, _ = lowrank.compress(net, rank=10, data=seen, copy=True, progress=False)
    cut, report = lowrank.at_rank(most, 0.4, copy=True)
    ranks = {entry.name: entry.size[0] for entry in report.plan.entries if entry.size}
    assert list(ranks) == ["0", "2"]
    wanted, told = lowrank.compress(net, rank_pattern=ranks, data=seen, copy=True, progress=False)
    assert report.achieved == told.achieved
    torch.testing.assert_close(cut(x), wanted(x), rtol=1e-4, atol=1e-5)
    assert Report.from_json(report.to_json()) == report


def test_targets_that_stayed_dense_count_where_they_are_declared() -> None:
    model, pattern = make("llama"), {"down_proj": 12, "up_proj": 12}
    most, told = lowrank.compress(model, rank_pattern=pattern, data=None, copy=True, progress=False)
    dense = sum(e.dense.params for e in told.plan.entries if e.target and e.size is None)
    assert dense > 0
    cut, report = lowrank.at_rank(most, 0.7, copy=True)
    stored = sum(layer.cost().params for layer in factored(cut).values())
    every = sum(e.dense.params for e in told.plan.entries if e.target)
    assert report.achieved == (stored + dense) / every <= 0.7
    least = "cannot be reached by cutting ranks"
    assert least in refusal(lambda: lowrank.at_rank(most, 0.3), most)


def mixed() -> Any:
    """Pivoted layers beside one of plain factors."""
    model = compressed(make("llama"), 0.6, storage="pivoted", exclude_modules=["down_proj"])[0]
    return compressed(model, 0.8, target_modules=["layers.0.mlp.down_proj"])[0]


def test_what_cannot_be_cut_stays_and_is_named() -> None:
    model = mixed()
    cut, report = lowrank.at_rank(model, 0.55, copy=True)
    ranks = [layer.rank for layer in factored(cut).values() if isinstance(layer, PivotedLinear)]
    assert ranks == [m.rank for m in factored(model).values() if isinstance(m, PivotedLinear)]
    assert cut.model.layers[0].mlp.down_proj.rank < model.model.layers[0].mlp.down_proj.rank
    stored = sum(layer.cost().params for layer in factored(cut).values())
    every = sum(layer.dense_weight().numel() for layer in factored(cut).values())
    assert report.achieved == stored / every <= 0.55
    name = "model.layers.0.self_attn.q_proj"
    (note,) = report.notes
    assert note.startswith(f"not cut, since a PivotedLinear has no components in order: {name}, ")


def test_what_cannot_be_done_is_one_error(whole: Any) -> None:
    pivoted, _ = compressed(make("llama"), 0.6, storage="pivoted")
    told = refusal(lambda: lowrank.at_rank(pivoted, 0.5), pivoted)
    assert "no layer can be cut to a smaller rank: a PivotedLinear" in told
    assert "storage='factors'" in told
    dense = make("llama")
    assert "holds no factored layer" in refusal(lambda: lowrank.at_rank(dense, 0.5), dense)
    assert "holds 0.7" in refusal(lambda: lowrank.at_rank(whole, 0.9), whole)
    assert "one component of every layer" in refusal(lambda: lowrank.at_rank(whole, 0.01), whole)
    for ratio in (0, 1, "0.5", None):
        with pytest.raises(lowrank.LowrankError, match=r"ratio is the fraction kept"):
            lowrank.at_rank(whole, ratio)  # type: ignore[arg-type]


def test_adapted_and_offloaded_factors_are_not_cut() -> None:
    layer, _ = compressed(nn.Linear(24, 16), 0.8, data=None)
    layer.up.__class__ = type("Adapted", (nn.Linear,), {})
    assert "'up' is adapted or quantized" in refusal(lambda: lowrank.at_rank(layer, 0.4), layer)
    away = compressed(nn.Linear(24, 16), 0.8, data=None)[0].to("meta")
    assert "without offloading" in refusal(lambda: lowrank.at_rank(away, 0.4), away)


@pytest.mark.parametrize(
    ("options", "ordered"),
    [({"method": "snmf"}, False), ({"method": "whitened"}, True), ({"effort": Recovery()}, True),
     ({"effort": Recovery(distill_steps=1)}, False)],
)  # fmt: skip
def test_factors_without_an_order_are_told(options: Any, ordered: bool) -> None:
    model, _ = compressed(make("llama"), 0.8, storage="factors", **options)
    _, report = lowrank.at_rank(model, 0.4)
    assert any("not in order of importance" in note for note in report.notes) == (not ordered)


def far(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - other(x)).square().mean() / net(x).square().mean())


def test_nested_training_serves_small_ratios_better_than_training_at_one_rank() -> None:
    torch.manual_seed(0)
    net, x = mlp(24, 48, 48, 16).eval(), torch.randn(256, 24)
    net[4].weight.data *= 20  # or all classes would be equally likely
    more: dict[str, Any] = {
        "data": list(x.split(32)),
        "target_modules": "all",
        "storage": "factors",
    }
    steps: dict[str, Any] = {"distill_steps": 60, "distill_rate": 0.005, "refit": False}
    one, _ = compressed(net, 0.9, effort=Recovery(**steps), **more)
    nested, told = compressed(net, 0.9, effort=Recovery(**steps, nested=0.3), **more)
    assert any("mean over ratios 0.3, " in note for note in told.notes)
    assert not any("reverted" in note for note in told.notes)
    fresh = torch.randn(256, 24)
    plain, cut = (lowrank.at_rank(m, 0.3, copy=True)[0] for m in (one, nested))
    assert far(net, cut, fresh) < 0.95 * far(net, plain, fresh)
