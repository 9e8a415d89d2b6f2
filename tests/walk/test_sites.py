"""The walk: what is found, and why some of it must stay as it is."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from lowrank.nn import LowRankLinear
from lowrank.walk import sites
from tests.zoo import Custom, by_name, make, mlp


def names_of(found: list[sites.Site]) -> list[str]:
    return [site.name for site in found]


def tied(bias: bool = True, same_bias: bool = True, *, transposed: bool = False) -> Custom:
    """Two layers with one weight."""
    one, other = nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)
    other.weight = nn.Parameter(one.weight.data.T) if transposed else one.weight
    if bias and same_bias:
        other.bias = one.bias
    return Custom(lambda self, x: self.other(self.one(x)), one=one, other=other)


# Finding


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "opt", "vit", "mixtral"])
def test_every_linear_and_conv1d_is_found_once_and_in_order(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = make(kind)
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    found = [name for site in sites.find_sites(model) for name in site.names]
    assert sorted(n for n in found if n in expected) == sorted(expected)
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == (kind == "vit")
    assert sorted(found) == sorted([*expected, *tables, *convs])
    alone = [site.name for site in sites.find_sites(model) if site.kind == "linear"]
    assert alone == [name for name in expected if name in alone]
    assert len(expected) >= 9


def test_a_site_tells_its_shape_and_cost() -> None:
    found = by_name(sites.find_sites(make("gpt2")))
    site = found["transformer.h.0.attn.c_attn"]  # a Conv1D stores (in, out) = (32, 96)
    assert site.shape == (96, 32)
    assert (site.cost.params, site.cost.bytes, site.cost.macs) == (3072, 12288, 3072)
    assert (site.kind, site.reason, site.title) == ("linear", "", site.name)


def test_a_shared_module_is_one_site_with_all_its_names() -> None:
    layer = nn.Linear(4, 5)
    inner = nn.ModuleDict({"fc": layer})
    model = nn.ModuleDict({"a": inner, "b": inner, "c": layer, "d": nn.Linear(4, 5)})
    found = sites.find_sites(model)
    assert [site.names for site in found] == [("a.fc", "b.fc", "c"), ("d",)]
    assert found[0].modules == (layer,)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_tied_by_one_parameter_are_one_site(bias: bool) -> None:
    model = tied(bias)
    (site,) = sites.find_sites(model)
    assert site.names == ("one", "other")
    assert site.modules == (model.one, model.other)
    assert site.reason == ""
    assert site.cost.params == 16  # counted once


def test_parameters_on_the_same_memory_are_tied_too() -> None:
    model = tied(bias=False)
    model.other.weight = nn.Parameter(model.one.weight.data)
    assert model.other.weight is not model.one.weight
    assert [site.names for site in sites.find_sites(model)] == [("one", "other")]


def test_tied_layers_with_biases_of_their_own_stay_dense() -> None:
    (site,) = sites.find_sites(tied(same_bias=False))
    assert site.names == ("one", "other")
    assert "other (Linear), which has another bias" in site.reason


def test_a_transposed_tie_is_seen() -> None:
    (site,) = sites.find_sites(tied(bias=False, transposed=True))
    assert site.names == ("one", "other")
    assert "another shape or order" in site.reason


def test_a_layer_that_shares_the_begin_of_a_larger_weight_stays_dense() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12, bias=False), "q": nn.Linear(4, 4, bias=False)})
    model["q"].weight = nn.Parameter(model["qkv"].weight.data[:4])
    (site,) = sites.find_sites(model)
    assert site.names == ("qkv", "q")
    assert "another shape or order" in site.reason


def test_an_embedding_and_the_head_that_holds_its_weight_are_one_site() -> None:
    for kind, head, table in (
        ("gpt2", "lm_head", "transformer.wte"),
        ("t5", "lm_head", "shared"),
        ("bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ):
        site = by_name(sites.find_sites(make(kind)))[table]
        assert (site.kind, site.names[0], site.names[-1]) == ("embedding", table, head)
        assert site.shape == (61, 32)
        assert (site.reason, site.cost.macs) == ("", 61 * 32)  # looking up costs no product


def test_a_tie_to_a_layer_that_cannot_be_factored_stays_dense_whatever_the_order() -> None:
    for first, second in (("plain", "hooked"), ("hooked", "plain")):
        layers = {"plain": nn.Linear(4, 4, bias=False), "hooked": nn.Linear(4, 4, bias=False)}
        layers["hooked"].weight = layers["plain"].weight
        layers["hooked"].register_forward_hook(lambda *_: None)
        (site,) = sites.find_sites(nn.ModuleDict({first: layers[first], second: layers[second]}))
        assert site.names == (first, second)
        assert "hooks" in site.reason


@pytest.mark.parametrize(
    ("transposed", "words"), [(False, "another shape or order"), (True, "stores it transposed")]
)
def test_a_conv1d_tied_to_a_linear_stays_dense(transposed: bool, words: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": Conv1D(4, 4)})
    weight = model["a"].weight
    model["b"].weight = nn.Parameter(weight.data.T) if transposed else weight
    (site,) = sites.find_sites(model)
    assert site.names == ("a", "b")
    assert f"b (Conv1D), which {'stores' if transposed else 'holds'} it" in site.reason
    assert words in site.reason


def test_a_bias_that_others_hold_keeps_the_layer_dense() -> None:
    model = mlp(4, 5, 5)
    model[2].bias = model[0].bias
    reasons = {site.name: site.reason for site in sites.find_sites(model)}
    assert "bias is tied to 2 (Linear)" in reasons["0"]
    assert "bias is tied to 0 (Linear)" in reasons["2"]


def test_the_root_itself_may_be_the_layer() -> None:
    (site,) = sites.find_sites(nn.Linear(3, 2))
    assert (site.name, site.names, site.title) == ("", ("",), "(root)")


def test_subclasses_and_parametrized_layers_are_considered_with_their_reasons() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict(
        {"attention": attention, "norm": parametrizations.weight_norm(nn.Linear(8, 8))}
    )
    found = by_name(sites.find_sites(model))
    assert found["attention.out_proj"].reason == ""
    assert "parametrized" in found["norm"].reason
    assert found["norm"].shape == (8, 8)


def test_factored_modules_are_not_walked() -> None:
    model = nn.Sequential(LowRankLinear(8, 8, 2), nn.Linear(8, 3))
    assert names_of(sites.find_sites(model)) == ["1"]
    assert sites.find_sites(LowRankLinear(8, 8, 2)) == []


def test_a_tie_into_a_factored_module_stays_dense() -> None:
    model = nn.Sequential(LowRankLinear(8, 8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].down.weight
    (site,) = sites.find_sites(model)
    assert site.names == ("1",)
    assert "tied to a factored layer" in site.reason
