"""sensitivity: one layer at a time, the model as before, and no forward the second time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.methods import SVD
from tests.zoo import Tokenizer, calibration, llama, make, mlp, refusal, tokens, unchanged

DATA = tokens(4, 12)


def sense(model: nn.Module, data: Any = DATA, **options: Any) -> lowrank.Sensitivity:
    return lowrank.sensitivity(model, data, progress=False, **{"ratios": (0.7, 0.3), **options})


def refused(model: nn.Module, data: Any = DATA, **options: Any) -> str:
    return refusal(lambda: sense(model, data, **options), model)


def test_it_is_the_kl_of_a_model_with_one_layer_compressed() -> None:
    model = make("llama")
    model.lm_head.weight.data *= 50  # or all words would be equally likely
    with unchanged(model):
        found = sense(model)
    assert len(found.sites) == 14
    for name, column in ((found.sites[0], 0), (found.sites[5], 1)):
        small, report = lowrank.compress(
            copy.deepcopy(model), found.ratios[column], target_modules=[name], align=1, data=None
        )
        row = found.sites.index(name)
        assert found.rank[row, column] == small.get_submodule(name).rank
        want = lowrank.kl(small, model, DATA)
        assert float(found.kl[row, column]) == pytest.approx(want, rel=1e-4, abs=1e-9)
        (site,) = report.sites
        assert float(found.error[row, column]) == pytest.approx(
            site.measured / site.total, rel=1e-4
        )
    assert float(found.kl[:, 1].mean()) > float(found.kl[:, 0].mean()) > 0
    assert found.positions == 48
    assert found.at(0.3)[found.sites[2]] == float(found.kl[2, 1])


def test_calibration_decides_the_method() -> None:
    model = make("llama")
    seen = calibration(model, tokens(6, 12, start=5))
    plain, aware = sense(model), sense(model, calibration=seen)
    assert (plain.method, aware.method) == ("svd", "whitened")
    assert not torch.equal(plain.kl, aware.kl)
    raw = sense(model, calibration=tokens(6, 12, start=5))
    assert torch.equal(raw.kl, aware.kl)
    own = sense(model, seen)  # its own batches judge
    assert own.method == "whitened"
    assert own.positions == 72


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
def test_models_of_other_kinds_are_as_before(kind: str) -> None:
    model = make(kind).train()
    data = {"input_ids": tokens(), "labels": tokens(2, 5)} if kind == "t5" else tokens()
    with unchanged(model):
        found = sense(model, data, ratios=(0.5,))
    assert bool(torch.isfinite(found.kl).all())
    assert len(found.sites) >= 8


def test_tied_layers_and_roots_are_reduced_as_one() -> None:
    one = nn.Linear(24, 24)
    other = nn.Linear(24, 24)
    other.weight, other.bias = one.weight, one.bias
    model = nn.Sequential(one, nn.ReLU(), other)
    data = torch.randn(30, 24)
    with unchanged(model):
        found = sense(model, data, ratios=(0.5,))
    assert found.sites == ("0",)
    small, _ = lowrank.compress(copy.deepcopy(model), 0.5, align=1, data=None)
    assert float(found.kl) == pytest.approx(lowrank.kl(small, model, data), rel=1e-4)
    root = nn.Linear(24, 24)
    assert float(sense(root, data, ratios=(0.5,)).kl) > 0


def test_an_error_half_way_leaves_the_model() -> None:
    class Fails(SVD):
        """Gives a layer that cannot run."""

        def factor(self, module: nn.Module, option: Any, stats: Any) -> nn.Module:
            class Broken(nn.Module):
                def forward(self, x: Any) -> Any:
                    raise RuntimeError("broken")

            return Broken()

    model = make("llama").train()
    with unchanged(model), pytest.raises(LowrankError, match="RuntimeError: broken"):
        sense(model, method=Fails())


def test_a_ratio_below_rank_one_is_unknown() -> None:
    found = sense(mlp(24, 4, 24), torch.randn(20, 24), ratios=(0.5, 0.1))
    assert torch.isnan(found.kl[:, 1]).all()
    assert (found.rank[:, 1] == 0).all()
    assert found.rows()[0]["0.1"] == "nan"


def counted(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_the_second_call_does_no_forward(tmp_path: Path) -> None:
    model, cache = make("llama"), tmp_path / "s.safetensors"
    given = {"cache": cache, "calibration": tokens(3, 12, start=9)}
    calls = counted(model)
    first = sense(model, **given)
    assert first.computed
    assert len(calls) >= 14 * 2
    calls.clear()
    second = sense(model, **given)
    assert (second.computed, calls) == (False, [])
    for part in ("kl", "rank", "error"):
        assert torch.equal(getattr(first, part), getattr(second, part))
    assert (first.sites, first.ratios, first.method, first.positions) == (
        second.sites, second.ratios, second.method, second.positions)  # fmt: skip
    assert str(first) == str(second)
    with safe_open(cache, framework="pt") as file:
        body = json.loads(file.metadata()["body"])
    assert set(body["made_for"]) >= {"model", "held-out data", "ratios"}
    assert "torch" in body["versions"]
    assert list(tmp_path.iterdir()) == [cache]


def test_a_cache_made_for_something_else_is_refused(tmp_path: Path) -> None:
    model, cache = make("llama"), tmp_path / "s.safetensors"
    sense(model, cache=cache)
    before = cache.read_bytes()
    assert "made for another held-out data:" in refused(model, tokens(4, 11), cache=cache)
    assert "made for another ratios:" in refused(model, ratios=(0.5,), cache=cache)
    assert "another method" in refused(model, method="random", cache=cache)
    assert "another set of layers" in refused(model, target_modules=["q_proj"], cache=cache)
    seen = calibration(model, DATA)
    assert "another calibration and another method" in refused(model, calibration=seen, cache=cache)
    model.model.norm.weight.data[0] += 1
    assert "made for another model:" in refused(model, cache=cache)
    assert cache.read_bytes() == before


def test_a_broken_cache_is_made_anew(tmp_path: Path) -> None:
    model, cache = make("llama"), tmp_path / "s.safetensors"
    whole = sense(model, cache=cache)
    content = cache.read_bytes()
    for broken in (content[:-20], b""):
        cache.write_bytes(broken)
        with pytest.warns(UserWarning, match="is damaged"):
            again = sense(model, cache=cache)
        assert again.computed
        assert torch.equal(again.kl, whole.kl)
        assert cache.read_bytes()[:8] == content[:8]
    with safe_open(cache, framework="pt") as file:
        about = file.metadata()
    save_file({"kl": torch.zeros(1, 1)}, cache, metadata=about)
    with pytest.warns(UserWarning, match="do not match"):
        assert sense(model, cache=cache).computed


def test_files_of_others_are_never_overwritten(tmp_path: Path) -> None:
    model, other = make("llama"), tmp_path / "other"
    other.write_text("not a cache")
    assert "is not a sensitivity cache" in refused(model, cache=other)
    assert other.read_text() == "not a cache"
    save_file({"w": torch.ones(2)}, other)
    assert "is not a sensitivity cache" in refused(model, cache=other)
    assert "is a folder" in refused(model, cache=tmp_path)
    assert "there is no folder" in refused(model, cache=tmp_path / "absent" / "s")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": None}, "pass data=…, held-out text or batches"),
        ({"data": " "}, "pass data="),
        ({"data": []}, "the data gave no batch"),
        ({"data": "text"}, "texts need a tokenizer"),
        ({"data": lambda model: None}, "not a callable"),
        ({"ratios": ()}, "ratios must be distinct fractions kept"),
        ({"ratios": (0.5, 1.0)}, "each in (0, 1)"),
        ({"ratios": (0.5, 0.5)}, "must be distinct"),
        ({"ratios": 0.5}, "ratios must be"),
        ({"ratios": (True,)}, "ratios must be"),
        ({"method": "whitened"}, "whitened needs gram: pass calibration=…"),
        ({"method": "whitend"}, "did you mean 'whitened'"),
        ({"target_modules": ["absent"]}, "matches none"),
        ({"data": {"input_ids": DATA, "attention_mask": DATA * 0}}, "no positions to compare"),
    ],
)
def test_bad_input_is_one_clear_line(options: dict[str, Any], words: str) -> None:
    assert words in refused(make("llama"), **{"data": DATA, **options})


def test_texts_are_cut_and_padding_is_left_out() -> None:
    model = llama().eval()
    found = sense(model, "some words " * 5, tokenizer=Tokenizer(), length=11, ratios=(0.5,))
    assert found.positions == 55
    mask = torch.ones_like(DATA)
    mask[0, 6:] = 0
    assert sense(model, {"input_ids": DATA, "attention_mask": mask}, ratios=(0.5,)).positions == 42
    with pytest.raises(LowrankError, match=r"measured at \(0\.5,\), not at 0\.4"):
        found.at(0.4)
