"""accelerate: wherever the tensors of a factored model lie, its outputs are the same."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.nn import LowRankEmbedding
from tests.nets import images, small_net
from tests.zoo import example, llama, make, tokens

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*offload.*:UserWarning")

ALL = {"target_modules": "all"}
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd"},
    "tied table": ALL,
    "pivoted": {"storage": "pivoted"},
    "shared": {"method": "basis-sharing"},
    "columns": {"method": "lowrank-sparse"},
    "entries": {"method": "lowrank-masked"},
    "2:4": {"method": "lowrank-2:4"},
    "coded": {"method": "dense-sparse"},
    "blast": {"method": "blast"},
}
PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


def placed(*on_disk: str) -> dict[str, str]:
    return {part: "disk" if part in on_disk else "cpu" for part in PARTS}


PLACES: dict[str, dict[str, Any]] = {
    "all on the cpu": {"device_map": {"": "cpu"}},
    "embedding on disk": {"device_map": placed("model.embed_tokens")},
    "head on disk": {"device_map": placed("lm_head")},
    "blocks on disk": {"device_map": placed("model.layers")},
    "everything on disk": {"device_map": {"": "disk"}},
    "as memory allows": {"device_map": "auto", "max_memory": {"cpu": 30_000}},
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 6)).logits


@cache
def built(form: str) -> nn.Module:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=form == "tied table").eval()
    data = [tokens(16, 32)]
    return lowrank.compress(model, 0.6, data=data, progress=False, **FORMS[form])[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def save(form: str) -> Path:
        lowrank.save(built(form), folder / form.replace(":", " "))
        return folder / form.replace(":", " ")

    return save


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_loaded_to_devices_and_disks(form: str, place: str, saved: Any, tmp_path: Path) -> None:
    model = lowrank.from_pretrained(saved(form), offload_folder=tmp_path, **PLACES[place])
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    in_memory = {"all on the cpu"} | ({"head on disk"} if form == "tied table" else set())
    assert on_meta == (place not in in_memory)  # a tied head has no tensors
    assert torch.equal(logits(model), logits(built(form)))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("form", FORMS)
def test_offloaded_in_memory(form: str, where: str, buffers: bool, tmp_path: Path) -> None:
    model, want = copy.deepcopy(built(form)), logits(built(form))
    options = {"execution_device": torch.device("cpu"), "offload_buffers": buffers}
    if where == "disk_offload":
        options["offload_dir"] = tmp_path
    offload = getattr(accelerate, where)
    assert torch.equal(logits(offload(model, **options)), want)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_other_tied_models_on_disk(kind: str, tmp_path: Path) -> None:
    batch = example("t5" if kind == "t5" else "llama")
    batch = batch if isinstance(batch, dict) else {"input_ids": batch}
    model, _ = lowrank.compress(make(kind), 0.6, data=[batch], progress=False, **ALL)
    assert any(isinstance(module, LowRankEmbedding) for module in model.modules())
    with torch.no_grad():
        want, device = model(**batch).logits, torch.device("cpu")
        lazy = accelerate.disk_offload(model, tmp_path, execution_device=device)
        assert torch.equal(lazy(**batch).logits, want)


def test_convolutions_on_disk(tmp_path: Path) -> None:
    net, _ = lowrank.compress(small_net(), 0.6, data=None)
    x = images(2)
    with torch.no_grad():
        want = net(x)
        net = accelerate.disk_offload(net, tmp_path, execution_device=torch.device("cpu"))
        assert torch.equal(net(x), want)


def test_the_weight_of_an_offloaded_layer_is_computed(tmp_path: Path) -> None:
    model = copy.deepcopy(built("tied table"))
    want = model.lm_head.dense_weight().detach()
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head.weight + 0, want)
