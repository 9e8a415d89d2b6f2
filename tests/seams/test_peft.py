"""peft: adapters on what is factored merge to equal outputs; a model with adapters is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.io.adapters import name_children
from lowrank.nn import BlastLinear, SharedLowRankLinear, TiedHead
from lowrank.walk.checks import adapted_layers
from tests.zoo import llama, make, mlp, tokens, unchanged

peft = pytest.importorskip("peft")
IDS = tokens(2, 6)


def adapted(model: nn.Module, targets: list[str], **options: Any) -> Any:
    """The model with adapters that compute something, drawn with one seed."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tied() -> Any:
    torch.manual_seed(0)
    return llama(tie_word_embeddings=True).eval()


def factored(model: Any, **options: Any) -> Any:
    given = {"data": [tokens(16, 32)], "progress": False, **options}
    return lowrank.compress(model, 0.6, **given)[0]


FEW = {"target_modules": ["k_proj", "up_proj"]}  # where a form takes its time
CASES = {
    "rows of a tied table": (tied, {"target_modules": "all"}, ["embed_tokens.rows"]),
    "up of a tied table": (tied, {"target_modules": "all"}, ["embed_tokens.up"]),
    "both of a tied table": (tied, {"target_modules": "all"}, ["embed_tokens.rows", "up"]),
    "a shared basis": (lambda: make("llama"), {"method": "basis-sharing"}, ["down"]),
    "plain factors": (lambda: make("gpt2"), {}, ["down", "up"]),
    "pivots": (lambda: make("llama"), {"storage": "pivoted"}, ["down", "mix"]),
    "low rank and columns": (lambda: make("llama"), {"method": "lowrank-sparse"}, ["up"]),
    "low rank and entries": (lambda: make("llama"), {"method": "lowrank-masked", **FEW}, ["up"]),
    "low rank and 2:4": (lambda: make("llama"), {"method": "lowrank-2:4", **FEW}, ["up"]),
    "a basis": (lambda: make("llama"), {"method": "dense-sparse", **FEW}, ["basis"]),
    "an encoder": (lambda: make("bert"), {}, ["query", "output.dense"]),
}
STARTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by iterations": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
}


@functools.cache
def _compressed(case: str) -> Any:
    build, options, _ = CASES[case]
    return factored(build(), **options)


def compressed(case: str) -> Any:
    """A fresh copy of the model of a case."""
    return copy.deepcopy(_compressed(case))


@pytest.mark.parametrize("case", CASES)
def test_merging_into_factors_changes_nothing(case: str) -> None:
    build, _, targets = CASES[case]
    model = compressed(case)
    before = logits(model)
    live = adapted(model, targets)
    with_adapters = logits(live)
    assert not torch.allclose(with_adapters, before, atol=1e-3)
    merged = live.merge_and_unload()
    near = {"rtol": 1e-4, "atol": 1e-5 * float(with_adapters.abs().max())}
    torch.testing.assert_close(logits(merged), with_adapters, **near)
    assert merged.config.tie_word_embeddings == build().config.tie_word_embeddings
    torch.testing.assert_close(logits(lowrank.to_dense(merged)), with_adapters, **near)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", CASES)
def test_other_starts_keep_the_outputs_and_merge_exactly(case: str, start: str) -> None:
    model = compressed(case)
    before = logits(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=CASES[case][2], **STARTS[start])
    live = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(live), before, rtol=1e-4, atol=1e-6)
    changed(live)
    want = logits(live)
    assert not torch.allclose(want, before, atol=1e-3)
    near = {"rtol": 1e-4, "atol": 1e-5 * float(want.abs().max())}
    merged = live.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, **near)
    torch.testing.assert_close(logits(lowrank.to_dense(merged)), want, **near)


def changed(live: Any) -> None:
    """Move all adapters away from their start."""
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_the_cases_hold_what_they_say() -> None:
    assert isinstance(compressed("rows of a tied table").lm_head, TiedHead)
    shared = compressed("a shared basis")
    assert any(isinstance(module, SharedLowRankLinear) for module in shared.modules())


def test_the_weight_of_a_layer_with_adapters_is_what_it_computes() -> None:
    model = factored(tied(), target_modules="all")
    head, live = model.lm_head, adapted(model, ["embed_tokens.rows", "embed_tokens.up", "down"])
    x = torch.randn(3, head.in_features)
    with torch.no_grad():
        torch.testing.assert_close(head(x), x @ head.weight.T)
    layer = live.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T)


def test_columns_use_the_adapters_with_many_tokens_too() -> None:
    layer, _ = lowrank.compress(
        nn.Sequential(nn.Linear(8, 12)), 0.7, method="lowrank-sparse", data=[torch.randn(64, 8)]
    )
    live = adapted(layer, ["up"])
    x = torch.randn(600, 8)
    with torch.no_grad():
        torch.testing.assert_close(live(x)[:5], live(x[:5]))


def test_a_changed_adapter_is_not_answered_from_the_last_product() -> None:
    model = factored(make("llama"), method="basis-sharing")
    live = adapted(model, ["down"])
    layers = [m for m in live.modules() if isinstance(m, SharedLowRankLinear)]
    reader = layers[0]
    x = torch.randn(2, reader.in_features)
    with torch.no_grad():
        reader.owner(x)
        reader.owner.down.lora_B["default"].weight.mul_(3)
        torch.testing.assert_close(reader(x), x @ reader.weight.T + (reader.bias or 0))


@pytest.mark.parametrize("verb", ["compress", "plan", "inspect", "calibrate", "apply", "DLRT"])
def test_a_model_with_adapters_is_refused(verb: str) -> None:
    model = adapted(make("llama"), ["q_proj", "v_proj"])
    calls = {
        "compress": lambda: lowrank.compress(model, 0.6),
        "plan": lambda: lowrank.plan(model, 0.6),
        "inspect": lambda: lowrank.inspect(model),
        "calibrate": lambda: lowrank.calibrate(model, [IDS], progress=False),
        "apply": lambda: lowrank.apply(model, lowrank.plan(make("llama"), 0.6)),
        "DLRT": lambda: lowrank.train.DLRT(model, torch.optim.SGD(model.parameters(), 0.1)),
    }
    with unchanged(model), pytest.raises(LowrankError, match=r"4 layers hold .*: merge first"):
        calls[verb]()


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_adapters_at_rest_are_refused_too(state: str) -> None:
    model = adapted(make("llama"), ["q_proj"])
    model.merge_adapter() if state == "merged" else model.base_model.disable_adapter_layers()
    with pytest.raises(LowrankError, match="merge first"):
        lowrank.compress(model, 0.6)


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "OFT"])
def test_other_adapters_are_found(kind: str) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    options |= {"feedforward_modules": []} if kind == "IA3" else {}
    options |= {"oft_block_size": 4} if kind == "OFT" else {}
    model = peft.get_peft_model(make("llama"), getattr(peft, f"{kind}Config")(**options))
    assert len(adapted_layers(model)) == 2


def test_modules_to_save_are_found() -> None:
    model = adapted(make("llama"), ["q_proj"], modules_to_save=["lm_head"])
    assert "base_model.model.lm_head" in adapted_layers(model)


def test_adapters_of_the_users_own() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.lora_b(self.lora_a(x))

    model = nn.Sequential(nn.Linear(8, 8), Adapted())
    with pytest.raises(LowrankError, match=r"1 layers hold adapters \(1\): merge first"):
        lowrank.compress(model, 0.5)


def test_without_adapters_nothing_is_refused() -> None:
    model = adapted(make("llama"), ["q_proj"])
    assert adapted_layers(model.merge_and_unload()) == []
    live = adapted(make("llama"), ["q_proj"])
    live.delete_adapter("default")
    assert adapted_layers(live) == []
    assert adapted_layers(mlp(4, 5)) == []


def test_merging_what_was_compressed_afterwards_is_an_error_not_a_loss() -> None:
    live = adapted(make("llama"), ["q_proj"])
    layer = live.get_base_model().model.layers[0].self_attn.q_proj
    small = factored(make("llama"), data=None).model.layers[0].self_attn.q_proj
    layer.base_layer = copy.deepcopy(small)
    with pytest.raises(LowrankError, match=r"add_ would be lost\. Change the factors instead"):
        layer.merge()


class Named:
    peft_config: ClassVar[dict[str, Any]] = {"default": None}


def lora(model: Any, targets: Any, **options: Any) -> set[str]:
    """Names of the layers that get adapters."""
    config = peft.LoraConfig(r=2, target_modules=targets, **options)
    live = peft.get_peft_model(model, config)
    prefix = "base_model.model."
    return {n.removeprefix(prefix) for n in adapted_layers(live)}


def children(*names: str) -> set[str]:
    layers = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in names}
    return {f"{layer}.{part}" for layer in layers for part in ("down", "up")}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["q_proj"], ["q_proj"]),
        (None, ["q_proj", "v_proj"]),
        (r".*\.(q|k)_proj", ["q_proj", "k_proj"]),
    ],
)
def test_targets_by_the_names_before(targets: Any, names: list[str]) -> None:
    assert lora(factored(make("llama")), targets) == children(*names)


def test_dense_layers_among_the_targets_remain_targets() -> None:
    model = factored(make("llama"), exclude_modules=["v_proj"])
    dense = {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert lora(model, ["q_proj", "v_proj"]) == children("q_proj") | dense


def test_patterns_of_ranks_hold_for_the_children() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    live = peft.get_peft_model(factored(make("llama")), config)
    layer = live.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.down.r["default"] == layer.up.r["default"] == 3


def test_adapters_by_the_names_before_are_saved_loaded_and_merged(tmp_path: Any) -> None:
    model = factored(make("llama"))
    live = adapted(copy.deepcopy(model), ["q_proj"])
    want = logits(live)
    assert not torch.allclose(want, logits(model), atol=1e-3)
    live.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(logits(again), want)
    live.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    assert "second" in live.get_base_model().model.layers[0].self_attn.k_proj.up.lora_A
    near = {"rtol": 1e-4, "atol": 1e-5 * float(want.abs().max())}
    torch.testing.assert_close(logits(again.merge_and_unload()), want, **near)


def test_a_head_without_tensors_says_where_they_are() -> None:
    with pytest.raises(LowrankError, match=r"lm_head is a TiedHead without tensors of its own"):
        lora(factored(tied(), target_modules="all"), ["lm_head"])


def test_all_linear_leaves_out_tables_and_heads_as_it_does_dense_ones() -> None:
    stock = lora(make("llama"), "all-linear")
    for model in (
        compressed("rows of a tied table"),
        factored(make("llama"), target_modules="all"),
    ):
        names = lora(model, "all-linear")
        assert {name.rpartition(".")[0] for name in names} == stock
        assert {name.rpartition(".")[2] for name in names} == {"down", "up"}


def test_the_head_of_a_classifier_is_left_out_as_when_dense() -> None:
    model = factored(make("classifier"), target_modules="all", data=None)
    names = lora(model, "all-linear", task_type="SEQ_CLS")
    assert "classifier" in names  # trained as a whole
    assert not {"classifier.down", "bert.embeddings.word_embeddings.up"} & names


@pytest.mark.parametrize("excluded", [["q_proj", "mlp.up_proj"], r".*(q_proj|mlp\.up_proj)"])
@pytest.mark.parametrize("targets", ["all-linear", ["down", "up", "q_proj"]])
def test_layers_are_excluded_by_the_names_before(targets: Any, excluded: Any) -> None:
    model = compressed("pivots")
    names = lora(model, targets, exclude_modules=excluded)
    assert names
    assert not [name for name in names if "q_proj" in name or "mlp.up_proj" in name]


def test_a_shared_basis_is_adapted_where_all_its_readers_are() -> None:
    alone = lora(compressed("a shared basis"), ["q_proj"])
    assert alone == {f"model.layers.{i}.self_attn.q_proj.up" for i in (0, 1)}
    together = lora(compressed("a shared basis"), ["q_proj", "k_proj", "v_proj"])
    assert together == children("q_proj") | {
        f"model.layers.{i}.self_attn.{n}.up" for i in (0, 1) for n in ("k_proj", "v_proj")
    }


@pytest.mark.parametrize(
    ("case", "saved"),
    [
        ("a shared basis", "q_proj"),
        ("a shared basis", "k_proj"),
        ("rows of a tied table", "lm_head"),
        ("rows of a tied table", "embed_tokens"),
    ],
)
def test_copies_that_would_part_shared_tensors_are_refused(case: str, saved: str) -> None:
    model = compressed(case)
    with unchanged(model), pytest.raises(LowrankError, match="modules_to_save would copy one of"):
        lora(model, ["o_proj"], modules_to_save=[saved])
    whole = lora(compressed("a shared basis"), ["gate_proj"], modules_to_save=["self_attn"])
    assert "model.layers.0.self_attn" in whole


@pytest.mark.parametrize("tokens_", [[1, 2], {"embed_tokens": [1, 2]}])
def test_single_rows_of_a_factored_table_are_refused(tokens_: Any) -> None:
    with pytest.raises(LowrankError, match=r"a factored table does not store: got .*LowRankEmbed"):
        lora(compressed("rows of a tied table"), ["o_proj"], trainable_token_indices=tokens_)
    lora(compressed("pivots"), ["o_proj"], trainable_token_indices=tokens_)  # a dense table


def test_experts_are_named_as_the_parameters_that_they_were() -> None:
    model = factored(make("mixtral"), data=None)
    before = logits(model)
    live = adapted(model, ["o_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    experts = {n for n in adapted_layers(live) if "experts" in n}
    assert len(experts) == 2 * 4 * 2  # blocks, experts, factors
    assert all(".gate_up_proj." in name for name in experts)
    want = logits(live)
    assert not torch.allclose(want, before, atol=1e-3)
    torch.testing.assert_close(logits(live.merge_and_unload()), want, rtol=1e-4, atol=1e-5)


def test_attention_that_was_split_is_named_as_a_whole() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)}).eval()
    net.forward = lambda x: net.attention(x, x, x)[0]  # type: ignore[method-assign]
    model, _ = lowrank.compress(net, 0.7, data=None, progress=False)
    parts = {f"attention.{n}_proj.{f}" for n in ("q", "k", "v", "out") for f in ("down", "up")}
    assert lora(model, ["attention"]) == parts


def test_a_form_without_children_is_adapted_as_a_whole(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = make("llama")
    for block in model.model.layers:
        block.self_attn.q_proj = BlastLinear(32, 32, 4, 4, bias=False)
    model.save_pretrained(tmp_path / "base")
    for options in ({"use_dora": True}, {}):
        live = adapted(copy.deepcopy(model), ["q_proj"], **options)
        assert adapted_layers(live) == [
            f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)
        ]
        want = logits(live)
        assert not torch.allclose(want, logits(model), atol=1e-3)
        live.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(logits(again), want)
        with pytest.raises(LowrankError, match=r"or merge it first \(lowrank.to_dense\)"):
            live.merge_and_unload()
        merged = lowrank.to_dense(live).merge_and_unload()
        torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    for config in (
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ):
        with unchanged(model), pytest.raises(LowrankError, match="LoRA only, beside its weight"):
            peft.get_peft_model(model, config)


def test_a_whole_form_of_turned_layout_is_merged_in_it() -> None:
    model = make("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn = BlastLinear(32, 96, 4, 4)
        block.attn.c_attn.layout = "conv1d"
    live = adapted(model, ["c_attn"])
    want = logits(live)
    merged = lowrank.to_dense(live).merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)


def test_a_convolution_stored_by_frequency_takes_no_adapters() -> None:
    net = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3))
    small, _ = lowrank.compress(
        net, 0.5, method="tubal", data=None, target_modules=["0", "2"], progress=False
    )
    with unchanged(small), pytest.raises(LowrankError, match="a TubalConv, which takes no adapter"):
        peft.get_peft_model(small, peft.LoraConfig(target_modules=["2"]))


def test_from_a_factored_folder_to_an_adapter_and_back(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = compressed("plain factors")
    model.name_or_path = "the dense model"
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    live = peft.get_peft_model(model, config)
    before = logits(live.eval())
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        live.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = logits(live.eval())
    assert not torch.equal(want, before)
    live.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), want)
    # transformers' own ways: an adapter that is loaded, and a folder that names its base
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)
    live.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    near = {"rtol": 1e-4, "atol": 1e-5 * float(want.abs().max())}
    torch.testing.assert_close(logits(merged), want, **near)


def test_a_folder_of_other_weights_is_not_named_as_the_base(tmp_path: Any) -> None:
    model = factored(make("llama"), target_modules=["q_proj"], data=None)
    model.save_pretrained(tmp_path)
    model = factored(model, target_modules=["k_proj"], data=None)
    live = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert live.peft_config["default"].base_model_name_or_path != str(tmp_path)


def test_transformers_adds_adapters_by_the_names_before(tmp_path: Any) -> None:
    model = compressed("pivots")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(config)
    want = logits(model.eval())
    assert not torch.allclose(want, logits(compressed("pivots")), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = compressed("pivots")
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), want)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # that is converted
@pytest.mark.parametrize("converted", [False, True])
def test_adapters_that_changed_the_base_are_saved_in_both_ways(
    converted: bool, tmp_path: Any
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    live = peft.get_peft_model(compressed("pivots"), config).eval()
    options = {}
    if converted:
        live.peft_config["default"].init_lora_weights = True
        live.save_pretrained(tmp_path / "start")
        live.peft_config["default"].init_lora_weights = "pissa"
        options = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    changed(live)
    want = logits(live)
    live.save_pretrained(tmp_path / "adapter", **options)
    again = peft.PeftModel.from_pretrained(compressed("pivots"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-5)
    assert again.peft_config["default"].r == (4 if converted else 2)


def test_dense_models_are_adapted_as_ever() -> None:
    name_children(Named(), make("llama"), "default")  # nothing is asked of the tuner
    stock = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert lora(make("llama"), ["q_proj"]) == stock
