"""Weights of several experts in checkpoints: declared, split up again, and guarded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.io.containers import containers_of, declared_containers, hold_apart
from lowrank.io.tensors import header

from ..architectures import family_of
from ..mixtures import mixture
from ..zoo import tokens, unchanged

IDS = tokens(24, 12)


@pytest.fixture(scope="module")
def small() -> Any:
    return lowrank.compress(mixture("Mixtral"), 0.5, data=[IDS], progress=False)[0]


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_container_is_declared_where_an_expert_is_factored(small: Any) -> None:
    found = containers_of(small)
    assert declared_containers(found) == list(found)
    assert len(found) == 4
    assert all(spec["experts"] == 4 and not spec["transposed"] for spec in found.values())
    assert not containers_of(mixture("Mixtral"))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "JetMoe"])
def test_saved_and_loaded_by_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    model, _ = lowrank.compress(mixture(family), 0.5, data=[IDS], progress=False)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(_logits(loaded), _logits(model))
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        states = base(IDS).last_hidden_state
        assert torch.equal(states, model.model(IDS).last_hidden_state)


def test_saved_and_loaded_with_a_skeleton(tmp_path: Path) -> None:
    layer = mixture("Mixtral").model.layers[0].mlp
    dense = copy.deepcopy(layer)
    rows = torch.randn(200, 32)
    layer, _ = lowrank.compress(
        layer, 0.5, data=[{"hidden_states": rows[None]}], progress=False, target_modules="all"
    )
    assert containers_of(layer)
    lowrank.save(layer, tmp_path)
    loaded = lowrank.load(tmp_path, dense)
    with torch.no_grad():
        assert torch.equal(loaded(rows[None]), layer(rows[None]))


def test_loaded_without_the_declaration_it_is_an_error(tmp_path: Path) -> None:
    small, _ = lowrank.compress(
        mixture("Mixtral"), 0.5, data=[IDS], target_modules=r".*experts.*", progress=False
    )
    small.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(LowrankError, match=r"experts\.gate_up_proj"):
        lowrank.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"experts": 5, "transposed": False}, "stored as 5 experts"),
        ({"experts": 4, "transposed": "no"}, "expected"),
        ({"experts": 4}, "expected"),
    ],
)
def test_a_damaged_declaration_is_named(spec: dict[str, Any], said: str) -> None:
    model = mixture("Mixtral")
    name = "model.layers.1.mlp.experts.down_proj"
    with unchanged(model), pytest.raises(LowrankError, match=said) as caught:
        hold_apart(model, {name: {"type": "ExpertWeights", **spec}}, "config.json")
    assert name in str(caught.value)


def test_merged_it_is_the_model_it_was(small: Any) -> None:
    model = mixture("Mixtral")
    merged = lowrank.to_dense(copy.deepcopy(small))
    assert list(merged.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(_logits(merged), _logits(small), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_vl_moe"])
def test_merged_it_is_saved_as_such_checkpoints_are(kind: str, tmp_path: Path) -> None:
    """Their files hold an expert apart, or turned; factors have the names of the model."""
    import transformers

    family = family_of(kind)
    assert family is not None
    small, _ = lowrank.compress(family.build(), 0.6, data=None, progress=False)
    small.save_pretrained(tmp_path / "small")
    loaded = lowrank.from_pretrained(tmp_path / "small")
    expected = small.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    merged = lowrank.to_dense(loaded)
    merged.save_pretrained(tmp_path / "dense")
    family.build().save_pretrained(tmp_path / "before")
    shapes = [
        {name: entry.shape for name, entry in header(tmp_path / f / "model.safetensors").items()}
        for f in ("before", "dense")
    ]
    assert shapes[0] == shapes[1]
    again = getattr(transformers, family.cls).from_pretrained(tmp_path / "dense")
    expected = merged.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
