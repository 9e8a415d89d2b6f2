"""What patterns name: peft is the oracle; and what is said where they name nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from lowrank import LowrankError
from lowrank.walk import sites
from tests.zoo import Custom, by_name, make, mlp, said, unchanged


def names_of(found: list[sites.Site]) -> list[str]:
    return [site.name for site in found]


def chosen(model: nn.Module, *patterns: Any) -> list[str]:
    """Names of the sites that stay targets."""
    selected = sites.select_sites(sites.find_sites(model), model, *patterns)
    return [site.name for site in selected if not site.reason]


def tied() -> Custom:
    """Two layers with one weight."""
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    return Custom(lambda self, x: self.other(self.one(x)), one=one, other=other)


PATTERNS = [
    ["q_proj", "v_proj"],
    ["mlp.down_proj"],
    ["layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"],
    ["lm_head", "o_proj"],
    r".*\.layers\.0\..*_proj",
    r".*self_attn\.(q|k)_proj",
    r"model\.layers\.[01]\.mlp\.(gate|up)_proj|lm_head",
    "all-linear",
    "All-Linear",
]
EXCLUDED = [None, ["q_proj", "layers.1.mlp.up_proj"], r".*layers\.1.*", ["gate_proj"]]


def peft_names(target: Any, exclude: Any) -> set[str]:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(target_modules=target, exclude_modules=exclude, r=2)
    wrapped = get_peft_model(make("llama"), config)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix)
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("target", PATTERNS, ids=str)
def test_target_and_exclude_patterns_mean_what_they_mean_in_peft(target: Any) -> None:
    pytest.importorskip("peft")
    model, compared = make("llama"), 0
    for exclude in EXCLUDED:
        try:
            ours = set(chosen(model, target, exclude))
        except LowrankError:
            ours = set()
        try:
            expected = peft_names(target, exclude)
        except ValueError:  # it found nothing
            expected = set()
        assert ours == expected, exclude
        compared += bool(ours)
    assert compared >= 2


def test_rank_pattern_means_what_it_means_in_peft() -> None:
    other = pytest.importorskip("peft.utils.other")
    patterns = {
        "layers.1.self_attn.q_proj": 3, "q_proj": 4, r"layers\.\d+\.mlp\..*": 5, "proj": 6,
        "^model.layers.0.self_attn.o_proj": 7, "v_proj|k_proj": 8, "head": 9, "lm_head": 10,
    }  # fmt: skip
    names = names_of(sites.find_sites(make("llama")))
    hit = set()
    for name in names:
        expected = other.get_pattern_key(list(patterns), name)  # the name itself: no match
        ours = sites.pattern_value(patterns, [name])
        assert (ours or name) == expected
        hit.add(ours)
    # "proj" and "head" are no whole names, and "^" cannot stand after a prefix that is empty
    assert {"q_proj", "v_proj|k_proj", "lm_head"} < hit
    assert {"proj", "head"}.isdisjoint(hit)


def test_a_rank_pattern_key_may_name_any_of_the_names() -> None:
    assert sites.pattern_value({"dec": 1, "enc": 2}, ["a.enc", "a.dec"]) == "dec"
    assert sites.pattern_value({"other": 1}, ["a.enc", "a.dec"]) is None


def test_the_output_head_is_left_unless_named() -> None:
    model = make("llama")
    assert "lm_head" not in chosen(model)
    assert chosen(model, ["lm_head"]) == ["lm_head"]
    assert chosen(model, "lm_head") == ["lm_head"]
    (head,) = [s for s in sites.select_sites(sites.find_sites(model), model) if s.name == "lm_head"]
    assert "target_modules" in head.reason  # it says what to do


def test_the_output_head_of_a_wrapped_model_is_left_too() -> None:
    wrapped = Custom(lambda self, x: self.lm(x), lm=make("llama"))
    assert "lm.lm_head" not in chosen(wrapped)
    assert len(chosen(wrapped)) == 14


def test_a_string_may_be_one_name() -> None:
    assert chosen(mlp(3, 4, 5), "2") == ["2"]
    assert len(chosen(make("llama"), "q_proj")) == 2


def test_any_of_a_shared_sites_names_selects_it() -> None:
    assert chosen(tied(), ["other"]) == ["one"]
    with_more = nn.ModuleDict({"tied": tied(), "more": nn.Linear(4, 4)})
    assert chosen(with_more, "all-linear", ["other"]) == ["more"]


def test_the_others_say_why_they_are_left() -> None:
    model = make("llama")
    found = by_name(
        sites.select_sites(sites.find_sites(model), model, ["q_proj", "k_proj"], ["k_proj"])
    )
    assert found["model.layers.0.self_attn.q_proj"].reason == ""
    assert found["model.layers.0.self_attn.k_proj"].reason == "in exclude_modules"
    assert found["model.layers.0.self_attn.v_proj"].reason == "not in target_modules"


def test_a_reason_of_the_layer_itself_comes_before_that_of_a_pattern() -> None:
    model = make("opt")
    table = "model.decoder.embed_positions"
    found = by_name(sites.select_sites(sites.find_sites(model), model, ["fc1"], [table]))
    assert "takes other arguments than its base nn.Embedding" in found[table].reason


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ((["nothing"],), "target_modules 'nothing' matches none of 16 layers"),
        ((["q_proj", "proj"],), "'proj'"),
        ((["q_proj"], ["nothing"]), "exclude_modules 'nothing'"),
        (("all-linear", "all-linear"), "exclude_modules 'all-linear' matches none"),
        ((r".*\.q",), "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj"),
        (("(",), "'(' is not a regular expression: missing )"),
        (([],), "target_modules is empty"),
        (
            (None,),
            "must be a name, a regular expression, a list of names or 'all-linear', got None",
        ),
        ((3,), "got 3"),
        (([3],), r"got [3]"),
    ],
    ids=str,
)
def test_bad_patterns_are_told(patterns: tuple[Any, ...], words: str) -> None:
    model = make("llama")
    with unchanged(model), pytest.raises(LowrankError, match=re.escape(words)) as caught:
        chosen(model, *patterns)
    said(caught)


def test_no_match_in_a_root_layer_is_told() -> None:
    with pytest.raises(LowrankError, match="the root is the layer"):
        chosen(nn.Linear(3, 3), ["fc"])


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_nothing_excluded(nothing: Any) -> None:
    assert chosen(mlp(3, 8, 8, 5), "all-linear", nothing) == ["0", "2"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("nothing", "rank_pattern 'nothing' matches none of 16 layers"),
        ("(?i)q_proj", "not a regular expression"),
        ("lm_head", "only layers that stay dense; lm_head: the output head"),
    ],
)
def test_bad_rank_patterns_are_told(key: str, words: str) -> None:
    model = make("llama")
    selected = sites.select_sites(sites.find_sites(model), model)
    with pytest.raises(LowrankError, match=re.escape(words)):
        sites.check_rank_pattern({"q_proj": 2, key: 4}, selected)
