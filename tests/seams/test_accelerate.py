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
from lowrank import LowrankError
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


def trained(model: Any, optimizer: Any = None, backward: Any = Tensor.backward) -> list[float]:
    """The losses of three steps."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def bfloat16() -> Any:
    """An accelerator; the precision of the first one in a process is that of all others."""
    state = accelerate.state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    state._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("form", FORMS)
def test_trained_in_bf16_by_accelerate(form: str, bfloat16: Any, tmp_path: Path) -> None:
    """autocast computes in bfloat16; factors and what is saved stay float32."""
    want = trained(copy.deepcopy(built(form)))
    raw = copy.deepcopy(built(form))
    optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-3)
    model, optimizer = bfloat16.prepare(raw, optimizer)
    losses = trained(model, optimizer, bfloat16.backward)
    assert losses != want
    assert losses == pytest.approx(want, abs=0.02)
    assert losses[2] < losses[0] - 0.02
    assert {p.dtype for p in raw.parameters()} == {torch.float32}
    plain = bfloat16.unwrap_model(model, keep_fp32_wrapper=False)
    plain.save_pretrained(tmp_path, state_dict=bfloat16.get_state_dict(model))
    assert float((logits(plain) - logits(built(form))).abs().max()) > 1e-3
    assert torch.equal(logits(lowrank.from_pretrained(tmp_path)), logits(plain))


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


def dispatched() -> Any:
    """A model whose layers each have the hook that moves inputs to their device."""
    places = dict.fromkeys(PARTS, "cpu")
    model = accelerate.dispatch_model(make("llama"), places, force_hooks=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert "forward" in vars(layer)
    assert not layer._hf_hook.offload
    return model


RUNS: dict[str, dict[str, Any]] = {
    "data-free": {"data": None},
    "whitened": {"data": [tokens(8, 16)]},
    "fast": {"data": [tokens(16, 32)], "effort": "fast"},
    "tables": {"data": [tokens(8, 16)], "target_modules": "all"},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_dispatched_model_is_compressed_as_any_other(run: str, tmp_path: Path) -> None:
    model, _ = lowrank.compress(dispatched(), 0.6, progress=False, **RUNS[run])
    plain, _ = lowrank.compress(make("llama"), 0.6, progress=False, **RUNS[run])
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(lowrank.from_pretrained(tmp_path)), logits(plain))


def test_factored_layers_take_over_the_hooks_that_place() -> None:
    model = dispatched()
    before = {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")}
    model, _ = lowrank.compress(model, 0.6, data=None, target_modules="all")
    after = {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")}
    assert after == before
    seen: list[Any] = []
    layer = model.model.layers[0].mlp.up_proj

    def pre_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return args, kwargs

    layer._hf_hook.pre_forward = pre_forward
    logits(model)
    assert seen == [layer]
    dense = lowrank.to_dense(model)
    assert dense.model.layers[0].mlp.up_proj._hf_hook is before["model.layers.0.mlp.up_proj"]


def test_what_is_left_of_removed_hooks_is_no_obstacle() -> None:
    model = dispatched()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert "forward" in vars(model.model.layers[0].mlp.up_proj)
    model, _ = lowrank.compress(model, 0.6, data=None)
    plain, _ = lowrank.compress(make("llama"), 0.6, data=None)
    assert torch.equal(logits(model), logits(plain))


def test_hooks_that_do_more_are_obstacles() -> None:
    class Louder(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = dispatched()
    layer = model.model.layers[0].mlp.up_proj
    accelerate.hooks.add_hook_to_module(layer, Louder(), append=True)
    _, report = lowrank.compress(model, 0.6, data=None, progress=False)
    assert type(layer) is nn.Linear
    assert layer is model.model.layers[0].mlp.up_proj
    entry = next(e for e in report.plan.entries if e.name == "model.layers.0.mlp.up_proj")
    assert entry.reason.startswith("its forward is wrapped")


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_offloaded_weights_are_refused(where: str, tmp_path: Path) -> None:
    given = {"offload_dir": tmp_path} if where == "disk_offload" else {}
    device = torch.device("cpu")
    model = getattr(accelerate, where)(make("llama"), execution_device=device, **given)
    with pytest.raises(LowrankError, match=r"on the meta device .* without offloading"):
        lowrank.compress(model, 0.6, data=None)
