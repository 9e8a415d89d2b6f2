"""An embedding and the head that holds its weight: one site, one table, one copy in the file."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.calibration.running import forward
from lowrank.nn import LowRankEmbedding, TiedEmbedding, TiedHead
from lowrank.walk import sites
from tests.zoo import Custom, by_name, example, llama, make, refused, tokens, unchanged

PAIRS = {
    "gpt2": ("transformer.wte", "lm_head"),
    "t5": ("shared", "lm_head"),
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "llama-tied": ("model.embed_tokens", "lm_head"),
}
CHECK = """
import sys, json, torch, lowrank
from pathlib import Path
import transformers
found = {}
for name, cls in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1]) / name
    batch = torch.load(folder / "batch.pt")
    model = getattr(transformers, cls).from_pretrained(folder)
    with torch.no_grad():
        got = lowrank.calibration.running.forward(model, batch).logits
    found[name] = torch.equal(got, torch.load(folder / "logits.pt"))
print("\\n" + json.dumps(found))
"""


def built(kind: str) -> Any:
    if kind != "llama-tied":
        return make(kind)
    torch.manual_seed(0)
    return llama(tie_word_embeddings=True).eval()


def batch_of(kind: str) -> Any:
    return example("t5" if kind == "t5" else "llama")


def compressed(kind: str, **options: Any) -> Any:
    given = {"of": "model", "target_modules": "all", "data": [batch_of(kind)], **options}
    return lowrank.compress(built(kind), 0.6, **given, progress=False)[0]


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, batch_of(kind)).logits


def stored(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_is_factored_once_and_computes_as_one_dense_table(kind: str) -> None:
    table, head = PAIRS[kind]
    model = compressed(kind)
    rows, last = model.get_submodule(table), model.get_submodule(head)
    assert (type(rows), type(last)) == (LowRankEmbedding, TiedHead)
    assert last.owner is rows
    dense = lowrank.to_dense(model, copy=True)
    assert dense.get_submodule(table).weight is dense.get_submodule(head).weight
    torch.testing.assert_close(logits(dense, kind), logits(model, kind), rtol=1e-4, atol=1e-5)
    assert type(dense.get_submodule(table)) is nn.Embedding
    assert dense.config.to_dict() == built(kind).config.to_dict()
    dense.tie_weights()
    assert dense.get_submodule(table).weight is dense.get_submodule(head).weight
    assert dense.all_tied_weights_keys == built(kind).all_tied_weights_keys


@pytest.mark.parametrize("kind", PAIRS)
def test_it_stays_tied_through_files(kind: str, tmp_path: Path) -> None:
    table, head = PAIRS[kind]
    model = compressed(kind)
    want = logits(model, kind)
    first = stored_and_back(model, tmp_path / "1")
    again = stored_and_back(first, tmp_path / "2")
    for found in (first, again):
        assert torch.equal(logits(found, kind), want)
        assert found.get_submodule(head).owner is found.get_submodule(table)
        assert found.config.tie_word_embeddings == built(kind).config.tie_word_embeddings
        found.tie_weights()  # there is nothing left for transformers to tie
    tensors = stored(tmp_path / "1")
    assert tensors.count(f"{table}.rows.weight") == 1
    assert not any(name.startswith((f"{head}.rows", f"{head}.weight")) for name in tensors)
    lowrank.export(model, tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(plain, kind), want, rtol=1e-4, atol=1e-5)
    assert plain.get_submodule(table).weight is plain.get_submodule(head).weight


def stored_and_back(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return lowrank.from_pretrained(folder)


@pytest.mark.slow
def test_in_a_new_process(tmp_path: Path) -> None:
    classes = {}
    for kind in PAIRS:
        model = compressed(kind)
        lowrank.save(model, tmp_path / kind)
        torch.save(batch_of(kind), tmp_path / kind / "batch.pt")
        torch.save(logits(model, kind), tmp_path / kind / "logits.pt")
        classes[kind] = type(model).__name__
    command = [sys.executable, "-c", CHECK, str(tmp_path), json.dumps(classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(PAIRS, True)


@pytest.mark.parametrize("kind", PAIRS)
def test_copies_are_tied_to_themselves_and_casts_reach_the_table(kind: str) -> None:
    table, head = PAIRS[kind]
    model = compressed(kind)
    twin = copy.deepcopy(model)
    assert twin.get_submodule(head).owner is twin.get_submodule(table)
    assert twin.get_submodule(table) is not model.get_submodule(table)
    assert torch.equal(logits(twin, kind), logits(model, kind))
    assert logits(twin.to(torch.bfloat16), kind).dtype == torch.bfloat16
    assert logits(model, kind).dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "t5"])
def test_it_generates(kind: str) -> None:
    model = compressed(kind)
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = tokens(1, 3)
    dense = lowrank.to_dense(model, copy=True)
    assert torch.equal(model.generate(ids, **more), dense.generate(ids, **more))


def test_gradients_of_both_readers_add_up_in_the_table() -> None:
    model = compressed("llama-tied")
    rows = model.model.embed_tokens.rows.weight
    ids = tokens(1, 4)
    model(input_ids=ids).logits.square().sum().backward()
    unused = [t for t in range(len(rows)) if t not in ids.flatten().tolist()]
    assert rows.grad[ids.flatten()].abs().sum() > 0
    assert rows.grad[unused].abs().sum() > 0  # only the head reads those


def test_all_readers_of_t5_share_one_table() -> None:
    model = compressed("t5")
    for part in (model.encoder, model.decoder):
        assert type(part.embed_tokens) is TiedEmbedding
        assert part.embed_tokens.owner is model.shared
    assert model.config.tie_word_embeddings  # T5 scales the decoder's output by this flag


@pytest.mark.parametrize("name", ["lm_head", "wte"])
def test_either_name_reaches_the_pair(name: str) -> None:
    model, report = lowrank.compress(make("gpt2"), 0.5, target_modules=[name], data=None)
    assert [site.name for site in report.sites] == ["transformer.wte"]
    assert model.lm_head.owner is model.transformer.wte


def test_all_linear_leaves_embeddings_and_says_why() -> None:
    found = by_name(sites.select_sites(sites.find_sites(make("gpt2")), make("gpt2")))
    assert found["transformer.wte"].reason == "an embedding: name it, or target 'all'"
    untied = by_name(sites.select_sites(sites.find_sites(make("llama")), make("llama"), "all"))
    assert not any(site.reason for site in untied.values())
    assert {"model.embed_tokens", "lm_head"} <= set(untied)


def test_methods_by_kind_and_by_data() -> None:
    data = [tokens()]
    for given, expected in ((data, "head-aware"), (None, "svd")):
        plan = lowrank.plan(make("gpt2"), 0.6, target_modules="all", data=given, progress=False)
        (pair,) = [entry for entry in plan.entries if entry.name == "transformer.wte"]
        assert (pair.method, pair.kind, pair.heads) == (expected, "embedding", 1)
        assert lowrank.Plan.from_json(plan.to_json()) == plan
        edited = plan.edit({"transformer.wte": 4})
        model, report = lowrank.apply(make("gpt2"), edited, data=given, progress=False)
        assert model.transformer.wte.rank == 4
        (site,) = [site for site in report.sites if site.name == "transformer.wte"]
        assert site.measured == pytest.approx(site.predicted, rel=1e-4)


def test_what_is_kept_is_counted_on_the_stored_table() -> None:
    model = make("gpt2")
    before = model.num_parameters()
    model, report = lowrank.compress(model, 0.7, of="model", target_modules="all", data=None)
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert report.achieved_of_model == pytest.approx(report.params_after / before, abs=1e-9)
    assert report.achieved_of_model <= 0.7


def test_a_pair_in_any_module_is_saved_and_loaded(tmp_path: Path) -> None:
    def net() -> Custom:
        torch.manual_seed(1)
        parts = {"embed": nn.Embedding(40, 12), "head": nn.Linear(12, 40)}
        parts["head"].weight = parts["embed"].weight
        return Custom(lambda self, ids: self.head(self.embed(ids)), **parts)

    ids = torch.arange(30).view(3, 10)
    bias = (model := net()).head.bias
    model, _ = lowrank.compress(model, 0.5, target_modules="all", data=[ids], progress=False)
    assert model.head.bias is bias
    lowrank.save(model, tmp_path)
    loaded = lowrank.load(tmp_path, net)
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.head.owner is loaded.embed
    assert stored(tmp_path) == ["embed.rows.weight", "embed.up.weight", "head.bias"]
    index = json.loads((tmp_path / "lowrank.json").read_text())
    assert index["modules"]["head"]["shared"] == "embed"
    for wrong in (None, "head", "nowhere"):
        index["modules"]["head"]["shared"] = wrong
        (tmp_path / "lowrank.json").write_text(json.dumps(index))
        with pytest.raises(LowrankError, match=r"head must name the factored|cannot share"):
            lowrank.load(tmp_path, net)
    with pytest.raises(LowrankError, match="shares a factored embedding that is not in this model"):
        lowrank.save(nn.Sequential(model.head), tmp_path / "part")


def test_a_recommenders_bags(tmp_path: Path) -> None:
    def net() -> Custom:
        torch.manual_seed(2)
        bag = nn.EmbeddingBag(50, 16, mode="sum", padding_idx=0, sparse=True)
        parts = {"items": bag, "user": nn.Embedding(30, 16), "out": nn.Linear(16, 1)}
        return Custom(lambda self, ids: self.out(self.items(ids) + self.user(ids[:, 0])), **parts)

    ids = torch.randint(1, 30, (20, 5))
    model, report = lowrank.compress(
        net(), 0.6, target_modules="all", data=[ids], unit="params", progress=False
    )
    assert {e.name: e.method for e in report.plan.entries}["items"] == "head-aware"
    lowrank.save(model, tmp_path)
    assert torch.equal(lowrank.load(tmp_path, net)(ids), model(ids))
    dense = lowrank.to_dense(model)
    assert (dense.items.mode, dense.items.sparse, dense.items.padding_idx) == ("sum", True, 0)
    with pytest.raises(LowrankError, match="stored with options"):
        lowrank.load(
            tmp_path, Custom(net().call, **{**net()._modules, "items": nn.Embedding(50, 16)})
        )


# Bad input


def test_ids_out_of_range_name_the_site() -> None:
    for bad in (-1, 61):
        model, ids = make("gpt2"), tokens().clone()
        ids[0, 2] = bad
        with unchanged(model), pytest.raises(LowrankError, match=rf"wte: ids .* \[0, 61\).*{bad}"):
            lowrank.calibrate(model, [ids], progress=False)


def test_ranks_that_are_none() -> None:
    even = "from 21 on a factored layer is not smaller"
    for rank in (62, 33, 21):
        said = refused(
            make("gpt2"), 0.5, data=None, target_modules="all",
            rank_pattern={"wte": rank, "c_fc": 2},
        )  # fmt: skip
        assert f"rank must be in [1, 32] for transformer.wte of shape (61, 32), got {rank}" in said
        assert even in said


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_head_tied_in_one_direction_only(target: str) -> None:
    """The config ties them; in memory they are two tensors."""
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    said = refused(model, 0.5, target_modules=[target])
    assert f"{target} is factored, but the config ties lm_head.weight" in said
    assert "set tie_word_embeddings=False" in said


def test_equal_weights_that_nothing_ties_are_two_sites() -> None:
    model = make("llama")
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    heads = ["lm_head", "embed_tokens"]
    model, report = lowrank.compress(model, 0.5, target_modules=heads, data=None)
    assert len(report.sites) == 2
    assert not isinstance(model.lm_head, TiedHead)


def test_memory_that_is_tied_against_the_config_is_one_site(tmp_path: Path) -> None:
    model = make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model, _ = lowrank.compress(model, 0.5, target_modules="all", data=None)
    assert isinstance(model.lm_head, TiedHead)
    loaded = stored_and_back(model, tmp_path)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    assert loaded.lm_head.owner is loaded.model.embed_tokens


def test_embeddings_with_other_options_are_not_one_table() -> None:
    one, other = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(9, 4)
    other.weight = one.weight
    (site,) = sites.find_sites(nn.ModuleDict({"one": one, "other": other}))
    assert "tied to other (Embedding), which has other options" in site.reason
