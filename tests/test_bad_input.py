"""What bad input gets: one clear error before anything is changed, the model bit for bit as before.

Checkpoint files have their own tests in tests/io.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lowrank
from lowrank import LowrankError
from lowrank.walk.checks import check_model
from tests.zoo import (
    Custom,
    Tokenizer,
    calibration,
    example,
    make,
    mlp,
    refused,
    said,
    tokens,
    unchanged,
)

X = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    return mlp(24, 40, 16)


# Ratios and ranks


@pytest.mark.parametrize(
    "ratio",
    [0, 0.0, -0.5, 1, 1.0, 1.5, 60, math.nan, math.inf, -math.inf, np.float64("nan")],
    ids=str,
)
def test_a_ratio_out_of_range(model: nn.Module, ratio: float) -> None:
    assert refused(model, ratio) == (
        f"ratio is the fraction kept and must be in (0, 1), got {ratio!r}; "
        "0.8 keeps 80 % of the targeted weights"
    )


@pytest.mark.parametrize("ratio", [True, "0.5", [0.5], {"q": 0.5}, torch.tensor(0.5)], ids=str)
def test_a_ratio_that_is_no_number(model: nn.Module, ratio: Any) -> None:
    assert "must be in (0, 1), got " in refused(model, ratio)


@pytest.mark.parametrize("of", ["targets", "model"])
def test_a_ratio_below_what_is_reachable(of: Any) -> None:
    model = make("llama")
    message = refused(model, 0.01, data=None, of=of)
    named = float(message.split("smallest, ")[1].split(" of the params are kept")[0])
    assert refused(model, round(named - 0.0001, 4), data=None, of=of)
    model, report = lowrank.compress(model, named, data=None, of=of)
    achieved = report.achieved if of == "targets" else report.achieved_of_model
    assert achieved <= named
    assert all(entry.size == (1,) for entry in report.plan.entries if entry.target)


def test_neither_ratio_nor_rank(model: nn.Module) -> None:
    for nothing in ({}, {"rank_pattern": {}}, {"rank_pattern": None}):
        message = refused(model, **nothing)
        assert message == "no target size: give ratio=0.6, rank=32 or rank_pattern={'q_proj': 32}"


def test_both_ratio_and_rank(model: nn.Module) -> None:
    assert refused(model, 0.5, rank=3) == "give either ratio or rank, not both"


@pytest.mark.parametrize("rank", [0, -3, 0.0, -0.5, 1.5, math.nan, True, "8", [8]], ids=str)
def test_a_rank_that_is_none(model: nn.Module, rank: Any) -> None:
    assert refused(model, rank=rank) == (
        "rank must be an integer >= 1 (a rank) or a float in (0, 1] (the share of energy kept), "
        f"got {rank!r}"
    )
    message = refused(model, 0.5, rank_pattern={"0": rank})
    assert message.startswith("rank_pattern['0'] must be an integer >= 1 (a rank) or")


@pytest.mark.parametrize("rank", [15, 24, 25])
def test_a_rank_above_break_even_in_rank_pattern(model: nn.Module, rank: int) -> None:
    expected = (
        f"rank must be in [1, 24] for 0 of shape (40, 24), got {rank}; "
        "from 15 on a factored layer is not smaller than the dense one"
    )
    for more in ({}, {"ratio": 0.5}, {"rank": 2}):
        assert refused(model, rank_pattern={"0": rank}, **more) == expected


@pytest.mark.parametrize("align", [0, -8, 1.5, "8", True], ids=str)
def test_align(model: nn.Module, align: Any) -> None:
    message = refused(model, 0.5, align=align)
    assert message == f"align must be a positive integer or None, got {align!r}"


# Names


@pytest.mark.parametrize(
    ("option", "wrong", "words"),
    [
        ("method", "whitend", "unknown method 'whitend'; did you mean 'whitened' or"),
        (
            "method",
            "SVD",
            "(known: asvd, auto, basis-sharing, blast, channel, cp, cur, dense-sparse, frequency, ",
        ),
        ("policy", "unifrm", "unknown policy 'unifrm'; did you mean 'uniform'?"),
        (
            "policy",
            "xyz",
            "(known: energy, evbmf, lossaware, mixed-dimensions, spectrum, uniform, welore)",
        ),
        ("of", "target", "unknown of 'target'; did you mean 'targets'?"),
        ("unit", "byte", "did you mean 'bytes'?"),
        ("prefer", "fast", "(known: size, speed)"),
        ("on_missing", "datafree", "did you mean 'data-free'?"),
        ("effort", "high", "(known: balanced, best, fast)"),
        ("method", 5, "a method has kinds, needs, curve and factor (lowrank.types.Method), got 5"),
        ("policy", 5, "a policy is a name or a callable, got int"),
    ],
)
def test_unknown_words_are_told_with_near_matches(
    model: nn.Module, option: str, wrong: Any, words: str
) -> None:
    assert words in refused(model, 0.5, **{option: wrong})


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [["q_prj"], r"model\.layer\..*"], ids=str)
def test_a_pattern_that_matches_nothing(option: str, pattern: Any) -> None:
    message = refused(make("llama"), 0.5, **{option: pattern})
    assert message.startswith(f"{option} ")
    assert (
        "matches none of 16 layers; their last names: down_proj, embed_tokens, gate_proj, k_proj"
        in message
    )
    assert "for example: model.embed_tokens, model.layers.0.self_attn.q_proj" in message


def test_a_rank_pattern_that_matches_nothing() -> None:
    message = refused(make("llama"), 0.5, rank_pattern={"q_proj": 3, "q_prj": 4})
    assert message.startswith("rank_pattern 'q_prj' matches none of 16 layers")


def test_a_rank_pattern_for_what_stays_dense() -> None:
    message = refused(make("gpt2"), 0.5, rank_pattern={"lm_head": 4})
    assert message == (
        "rank_pattern 'lm_head' matches only layers that stay dense; transformer.wte: an "
        "embedding: name it, or target 'all'"
    )


def test_an_invalid_expression(model: nn.Module) -> None:
    assert "'(q|k' is not a regular expression" in refused(model, 0.5, target_modules="(q|k")


# Models


def test_what_is_no_model() -> None:
    for other in ("meta-llama/Llama-3.2-1B", None, {"0": nn.Linear(2, 2)}, nn.Linear):
        with pytest.raises(LowrankError, match=r"expected a torch.nn.Module, got") as caught:
            lowrank.compress(other, 0.5)  # type: ignore[arg-type]
        said(caught)


def test_a_model_without_linear_layers() -> None:
    message = refused(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 0.5)
    assert message == "no layer can be factored: the model has no dense linear layer"


def test_a_model_with_none_that_can_be_factored() -> None:
    message = refused(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), 0.5)
    assert message == (
        "no layer can be factored: 0: its weight is parametrized: remove the parametrization first"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_in_a_weight(bad: float) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    expected = (
        "model.layers.1.mlp.up_proj: the weight holds NaN or Inf: load the model again, from sound "
        "files, or leave the layer out (exclude_modules=['model.layers.1.mlp.up_proj'])"
    )
    assert refused(model, 0.5) == expected
    assert refused(model, 0.5, data=tokens()) == expected
    # a layer that is left alone may hold what it likes, and the report says so
    _, report = lowrank.compress(model, 0.5, data=None, exclude_modules=["up_proj"])
    said = "1 tensors hold NaN or Inf, and keep them: model.layers.1.mlp.up_proj.weight"
    assert said in report.notes


def test_a_bad_number_in_the_root() -> None:
    layer = nn.Linear(24, 16)
    nn.init.constant_(layer.weight, math.nan)
    assert refused(layer, 0.5).startswith("(root): the weight holds NaN or Inf: load")


@pytest.mark.parametrize("data", [None, torch.randn(30, 24)], ids=["no data", "data"])
def test_a_bad_number_in_a_bias_or_beside_the_targets(data: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24))
    with torch.no_grad():
        model[2].bias[3] = math.nan
    assert refused(model, 0.5, data=data).startswith("2: the bias holds NaN or Inf: load")
    with torch.no_grad():
        model[2].bias[3], model[1].bias[3] = 0, math.inf
    if data is None:
        _, report = lowrank.compress(model, 0.5, data=None)
        assert report.notes == ("1 tensors hold NaN or Inf, and keep them: 1.bias",)
    else:
        assert refused(model, 0.5, data=data).startswith("2: its input holds NaN or Inf")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_in_an_activation(bad: float) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[2] = bad
    message = refused(model, 0.5, data=tokens())
    assert message.startswith("model.layers.1.self_attn.q_proj: its input holds NaN or Inf")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (SimpleNamespace(quant_method=SimpleNamespace(value="bitsandbytes")), "bitsandbytes"),
        (SimpleNamespace(quant_method="awq"), "awq"),
        ({"bits": 4}, "unknown"),
        (SimpleNamespace(bits=4), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_quantized_model(config: Any, kind: str) -> None:
    model = make("llama")
    model.config.quantization_config = config
    expected = f"the model is quantized ({kind}): compress the model first and quantize the result"
    for verb in (
        lambda: lowrank.compress(model, 0.5),
        lambda: lowrank.plan(model, 0.5),
        lambda: lowrank.calibrate(model, tokens()),
    ):
        with pytest.raises(LowrankError) as caught:
            verb()
        assert said(caught) == expected


def test_real_quantized_layers_are_left_with_a_reason() -> None:
    model = mlp(24, 40, 16)
    packed = nn.Parameter(torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False)
    model[0].weight = packed
    _, report = lowrank.compress(model, 0.5)
    assert report.plan.entries[0].reason == "its weight is stored as torch.uint8"


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = mlp(24, 40, 16)
    message = refused(model, 0.5)
    assert message == (
        "4 parameters are on the meta device (0.weight, 0.bias, 2.weight … (+1 more)): "
        "load the weights first, without offloading"
    )
    half = mlp(24, 40, 16)
    half[2].to("meta")
    assert refused(half, 0.5).startswith("2 parameters are on the meta device (2.weight, 2.bias)")


def test_a_model_without_shapes_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(LowrankError, match=r"no shape yet .0.weight, 0.bias.: run the model once"):
        lowrank.compress(model, 0.5)
    check_model(mlp(3, 3))


def test_a_model_that_is_compressed_already() -> None:
    model, _ = lowrank.compress(make("llama"), 0.5, data=None)
    message = refused(model, 0.5)
    assert message.startswith(
        "no layer can be factored: 14 are factored already (lowrank.to_dense undoes it); lm_head: "
    )


def test_what_is_left_can_be_compressed_later() -> None:
    model, first = lowrank.compress(
        make("llama"), 0.5, data=None, target_modules=["q_proj", "o_proj"]
    )
    model, second = lowrank.compress(model, 0.5, data=None)
    assert len(first.sites) == 4
    assert len(second.sites) == 10
    assert not {s.name for s in first.sites} & {e.name for e in second.plan.entries}
    assert second.params_before == first.params_after
    assert second.plan.model.params == first.params_after
    assert model(input_ids=tokens()).logits.isfinite().all()


# Data


def test_data_that_reaches_no_layer(model: nn.Module) -> None:
    message = refused(model, 0.5, data=lambda model: None)
    assert message.startswith("the calibration data reached none of 2 layers: it is called")
    aside = Custom(lambda self, x: x, fc=nn.Linear(24, 24))
    assert refused(aside, 0.5, data=X).endswith("none of 1 layers: does it run this model?")


def test_a_spent_iterator(model: nn.Module) -> None:
    batches = iter([X])
    list(batches)
    expected = "the data gave no batch: an empty list, or an exhausted iterator?"
    assert refused(model, 0.5, data=batches) == expected
    assert refused(model, 0.5, data=[]) == expected
    assert refused(model, 0.5, data=(x for x in ())) == expected


def test_texts_without_a_tokenizer() -> None:
    model = make("llama")
    for texts in ("a text", ["a text"], iter(["a text"])):
        assert refused(model, 0.5, data=texts) == "texts need a tokenizer: pass tokenizer=…"
    assert refused(model, 0.5, data=[""], tokenizer=Tokenizer()) == "the texts contain no tokens"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (5, "data must be texts, tensors, dicts, a loader or a callable, got int"),
        ([1, 2], "a tuple that starts with a tensor, got int"),
        ({"input_ids": [[1, 2]]}, "got {input_ids: list}: collate the rows"),
    ],
    ids=str,
)
def test_what_is_no_data(model: nn.Module, data: Any, words: str) -> None:
    assert words in refused(model, 0.5, data=data)


def test_no_data_where_it_is_needed(model: nn.Module) -> None:
    expected = "method whitened needs calibration data (gram): pass data=…"
    assert refused(model, 0.5, method="whitened") == expected
    assert refused(model, 0.5, method="whitened", data=None) == expected


def test_a_calibration_of_another_model() -> None:
    model = make("gpt2")
    found = calibration(mlp(24, 40), X)
    message = refused(model, 0.5, data=found)
    assert message.startswith(
        "the calibration data reached none of the 8 targets: transformer.h.0.attn"
    )


def test_on_missing_error() -> None:
    model = make("t5")
    found = calibration(model, lambda m: m.encoder(input_ids=tokens()))
    message = refused(model, 0.5, data=found, on_missing="error")
    assert message.startswith(
        "the calibration data gave 20 layers too few tokens: decoder.block.0.layer.0."
    )
    assert message.endswith("(+16 more); on_missing='dense' leaves them dense")


# Plans


@pytest.mark.parametrize(
    "beside",
    [
        {"rank": 3}, {"rank_pattern": {"0": 3}}, {"policy": "energy"}, {"method": "svd"},
        {"of": "model"}, {"unit": "bytes"}, {"prefer": "speed"}, {"align": 8}, {"seed": 1},
        {"target_modules": ["0"]}, {"exclude_modules": ["0"]}, {"on_missing": "error"},
        {"effort": "high"},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_leaves_nothing_else_to_decide(model: nn.Module, beside: dict[str, Any]) -> None:
    plan = lowrank.plan(model, 0.5)
    (name,) = beside
    assert refused(model, plan, **beside).startswith(f"the plan already fixes {name}: drop that")


def test_checks_come_before_the_model_is_run(model: nn.Module) -> None:
    """A typing error must not cost a calibration."""

    def run(model: nn.Module) -> None:
        raise AssertionError("the model was run")

    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    for wrong in ({"ratio": 2}, {"ratio": 0.5, "target_modules": ["x"]}, {"ratio": 0.5}):
        refused(model, **wrong, data=run)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "vit"])
def test_after_a_refusal_the_model_can_still_be_compressed(kind: str) -> None:
    model = make(kind)
    untouched = copy.deepcopy(model)
    refused(model, 0.001)
    refused(model, 0.5, rank_pattern={"nothing": 3})
    one, _ = lowrank.compress(model, 0.5, data=[example(kind)], progress=False)
    other, _ = lowrank.compress(untouched, 0.5, data=[example(kind)], progress=False)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_oracle_of_these_tests_sees_changes() -> None:
    """`unchanged` itself has to be able to fail."""
    changes = [
        lambda m: m[0].weight.data.__setitem__((0, 0), 5.0),
        lambda m: m.eval(),
        lambda m: m.__setitem__(0, copy.deepcopy(m[0])),
        lambda m: m[0].register_forward_pre_hook(lambda *_: None),
        lambda m: m[0].bias.requires_grad_(False),
        lambda m: m(torch.ones(1, 24)).sum().backward(),
        lambda m: torch.randn(1),
    ]
    for change in changes:
        model = mlp(24, 40, 16)
        with pytest.raises(AssertionError), unchanged(model):
            change(model)
