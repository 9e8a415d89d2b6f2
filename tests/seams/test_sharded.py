"""Two processes train what one trains: FSDP2 and DDP on gloo, for every stored form."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank
from lowrank import LowrankError
from lowrank.nn import is_factored
from tests.mixtures import mixture
from tests.processes import in_processes
from tests.zoo import llama, tokens

SOME = {"target_modules": r".*1\.self_attn\.[qkv]_proj"}
FORMS: dict[str, dict[str, Any]] = {
    "factors": {**SOME, "method": "svd"},
    "tied table": {"target_modules": "all"},
    "pivoted": {**SOME, "storage": "pivoted"},
    "shared": {**SOME, "method": "basis-sharing"},
    "columns": {**SOME, "method": "lowrank-sparse"},
    "entries": {**SOME, "method": "lowrank-masked"},
    "2:4": {**SOME, "method": "lowrank-2:4"},
    "coded": {**SOME, "method": "dense-sparse"},
    "blast": {"target_modules": r".*1\.self_attn\.q_proj", "method": "blast"},
    "experts": {},
}
IDS = tokens(4, 8)


def built(form: str) -> Any:
    torch.manual_seed(0)
    if form == "experts":
        return lowrank.compress(mixture("Qwen3Moe"), 0.6, data=None, progress=False)[0].double()
    model = llama(tie_word_embeddings=form == "tied table").eval()
    given = {"data": [tokens(16, 32)], "progress": False, **FORMS[form]}
    return lowrank.compress(model, 0.6, **given)[0].double()


def trained(model: Any, rows: slice = slice(None)) -> list[float]:
    """Losses of two steps, the mean over all processes."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(2):
        words = model(input_ids=IDS[rows]).logits[:, :-1]  # transformers' loss is in float32
        loss = cross_entropy(words.flatten(0, 1), IDS[rows, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        losses.append(whole.item())
    return losses


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def by_blocks(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def by_layers(model: Any) -> Any:
    """Every factored layer is a unit of its own, as a policy by size may choose."""
    from torch.distributed.fsdp import fully_shard

    for layer in filter(is_factored, list(model.modules())):
        fully_shard(layer)
    return by_blocks(model)


def by_table(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.model.embed_tokens)
    return by_blocks(model)


def gathered(model: Any) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def saved_and_loaded(model: Any, state: dict[str, Tensor]) -> Any:
    import transformers as tf

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state)
        return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def resumed(model: Any, fresh: Any) -> Any:
    """The slices of one sharded model in another one, through a distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    folder: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder[0])
    slices = get_model_state_dict(fresh)
    dcp.load(slices, checkpoint_id=folder[0])
    set_model_state_dict(fresh, slices)
    return fresh


def away(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def compared(form: str) -> dict[str, Any]:
    base, rank = built(form), dist.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    alone = copy.deepcopy(base)
    found: dict[str, Any] = {"alone": trained(alone)}
    both = nn.parallel.DistributedDataParallel(copy.deepcopy(base), find_unused_parameters=True)
    found["ddp"] = trained(both, rows)
    model = by_blocks(copy.deepcopy(base))
    found["fsdp"] = trained(model, rows)
    found["learned"] = away(logits(alone), logits(base))
    state, want = gathered(model), alone.state_dict()
    if rank == 0:
        assert state.keys() == want.keys()
        found["state"] = max(away(state[key], tensor) for key, tensor in want.items())
        found["loaded"] = away(logits(saved_and_loaded(model, state)), logits(alone))
    found["resumed"] = away(logits(resumed(model, by_blocks(copy.deepcopy(base)))), logits(model))
    return found


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except LowrankError as error:
        return str(error)
    return "nothing"


def other_units(found: dict[str, Any]) -> None:
    base = built("factors")
    model = by_layers(copy.deepcopy(base))
    found["a layer alone"] = away(logits(model), logits(base))
    state = gathered(model)
    if dist.get_rank() == 0:
        found["it is declared"] = away(logits(saved_and_loaded(model, state)), logits(base))
    found["two units, basis"] = said(lambda: logits(by_layers(built("shared"))))
    found["two units, table"] = said(lambda: logits(by_table(built("tied table"))))
    model = by_blocks(base)
    folder = tempfile.mkdtemp()
    found["slices saved"] = said(lambda: model.save_pretrained(f"{folder}/a"))
    found["slices stored"] = said(lambda: lowrank.save(model, f"{folder}/b"))
    found["slices merged"] = said(lambda: lowrank.to_dense(model))
    found["written"] = list(Path(folder).iterdir())


def in_each() -> dict[str, Any]:
    found: dict[str, Any] = {form: compared(form) for form in FORMS}
    other_units(found)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found: they are started once for all forms."""
    return in_processes(__name__, "in_each", tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_train_what_one_trains(form: str, found: list[dict[str, Any]]) -> None:
    for process in found:
        one = process[form]
        assert one["learned"] > 1e-4
        assert one["ddp"] == pytest.approx(one["alone"], abs=1e-9)
        assert one["fsdp"] == pytest.approx(one["alone"], abs=1e-9)
        assert one["resumed"] == 0
    assert found[0][form]["state"] < 1e-6
    assert found[0][form]["loaded"] < 1e-6


@pytest.mark.slow
def test_a_factored_layer_may_be_a_unit_of_its_own(found: list[dict[str, Any]]) -> None:
    assert max(process["a layer alone"] for process in found) < 1e-12
    assert found[0]["it is declared"] < 1e-12


@pytest.mark.slow
def test_what_is_shared_by_two_units_is_refused(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "two layers of one basis share a factor" in process["two units, basis"]
        assert "the embedding and the head tied to it share a" in process["two units, table"]
        assert "call fully_shard on a module that holds both" in process["two units, table"]


@pytest.mark.slow
def test_slices_are_neither_saved_nor_merged(found: list[dict[str, Any]]) -> None:
    for process in found:
        for where in ("slices saved", "slices stored"):
            assert "tensors are sharded by FSDP" in process[where]
            assert "model.save_pretrained(folder, state_dict=state)" in process[where]
        assert "a factor is sharded by FSDP" in process["slices merged"]
        assert process["written"] == []
