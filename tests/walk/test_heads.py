"""Heads by structure: the last layer, where no layer reads the width that it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.walk.heads import last_heads, named_heads
from lowrank.walk.sites import HEAD, find_sites, select_sites
from tests.nets import small_net
from tests.zoo import FEED, SIZE, WIDTH, WORDS, Custom, by_name, make, mlp


def heads(model: nn.Module) -> set[str]:
    """What is left out by default as a head."""
    found = select_sites(find_sites(model), model)
    return {site.name for site in found if site.reason == HEAD}


def parts(**layers: nn.Module) -> nn.Module:
    return Custom(lambda self, x: x, **layers)


def transformers_model(kind: str) -> Any:
    tf = pytest.importorskip("transformers")
    config = tf.BertConfig(**SIZE, **FEED, **WORDS, num_labels=9)
    return getattr(tf, kind)(config)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("BertForTokenClassification", {"classifier"}),
        ("BertForSequenceClassification", {"classifier"}),
        ("BertForMultipleChoice", {"classifier"}),
        ("BertForNextSentencePrediction", {"cls.seq_relationship"}),
        ("BertForPreTraining", {"cls.seq_relationship"}),  # the other one is tied to the table
        ("BertModel", set()),
    ],
)
def test_encoders(kind: str, names: set[str]) -> None:
    assert heads(transformers_model(kind)) == names


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", {"lm_head"}), ("vit", {"classifier"}), ("gpt2", set()), ("opt", set())],
)
def test_the_zoo(kind: str, names: set[str]) -> None:
    """GPT-2's and OPT's heads are tied to the embedding, and their blocks have none."""
    assert heads(make(kind)) == names


def test_a_base_model_has_no_head() -> None:
    for kind in ("llama", "gpt2", "opt", "mixtral", "qwen3"):
        body = make(kind).base_model
        assert last_heads(body, find_sites(body)) == [], kind


def test_convolutional_nets() -> None:
    assert heads(small_net()) == {"head"}
    pixels = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 21, 1))
    assert heads(pixels) == {"2"}
    to_image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 3, 3))
    assert heads(to_image) == {"2"}  # that the stem reads three channels too is no hidden width
    depthwise = nn.Conv2d(16, 16, 3, groups=16)
    one = nn.Sequential(nn.Conv2d(3, 16, 3), depthwise, nn.Conv2d(16, 24, 1), nn.Linear(24, 1))
    assert heads(one) == {"3"}
    grown = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 24, 1), nn.ConvTranspose2d(24, 12, 2))
    assert last_heads(grown, find_sites(grown))[0].name == "2"


def test_what_other_layers_read_is_no_head() -> None:
    assert heads(mlp(64, 16, 8, 16, 64)) == set()  # an autoencoder
    assert heads(parts(one=nn.Linear(24, 32), two=nn.Linear(32, 48), rnn=nn.LSTM(48, 8))) == set()
    assert heads(parts(one=nn.Linear(24, 32), two=nn.Linear(32, 48))) == {"two"}
    attends = nn.MultiheadAttention(48, 2)
    assert heads(parts(one=nn.Linear(24, 32), two=nn.Linear(32, 48), mix=attends)) == set()


def test_heads_side_by_side() -> None:
    both = parts(one=nn.Linear(24, 32), two=nn.Linear(32, 32), pi=nn.Linear(32, 6),
                 value=nn.Linear(32, 1))  # fmt: skip
    assert heads(both) == {"pi", "value"}
    behind = parts(one=nn.Linear(24, 32), two=nn.Linear(32, 48), head=nn.Linear(48, 6))
    assert heads(behind) == {"head"}  # "two" writes more than is read, but into the head


def test_a_model_of_one_target_is_compressed_as_before() -> None:
    assert heads(nn.Linear(24, 32)) == set()
    assert heads(nn.Sequential(nn.Flatten(), nn.Linear(24, 32))) == set()
    assert heads(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 10))) == set()
    assert heads(parts(user=nn.Linear(24, 16), item=nn.Linear(24, 16))) == set()
    assert heads(parts(words=nn.Embedding(30, 24), out=nn.Linear(24, 30))) == set()


def test_the_head_of_what_is_factored_already() -> None:
    model = mlp(24, 40, 48, 10)
    small, _ = lowrank.compress(model, 0.5, target_modules=["0", "4"], data=None, progress=False)
    assert heads(small) == set()  # the last dense layer is an inner one
    model = mlp(24, 40, 48, 10)
    small, _ = lowrank.compress(model, 0.5, target_modules=["2"], data=None, progress=False)
    assert heads(small) == {"4"}


def test_named_it_is_compressed_and_told_otherwise() -> None:
    model = mlp(24, 40, 10)
    found = by_name(select_sites(find_sites(model), model))
    assert "name it in target_modules" in found["2"].reason
    for named in (["2"], "2", "all", r"\d"):
        assert not by_name(select_sites(find_sites(model), model, named))["2"].reason
    adapting = by_name(select_sites(find_sites(model), model, adapts=True))
    assert not adapting["2"].reason


def test_the_vocabularys_head_is_named_by_its_model() -> None:
    model = make("llama")
    assert named_heads(parts(lm=model)) == {id(model.lm_head)}
    assert named_heads(mlp(8, 8)) == set()


def planted(classes: int = 10) -> tuple[nn.Sequential, Tensor]:
    """A net whose hidden layers have rank 8 of 64; its head needs every one of its classes."""
    torch.manual_seed(0)
    net = mlp(WIDTH, 64, 64, classes)
    with torch.no_grad():
        for index in (0, 2):
            weight = net[index].weight
            weight.copy_(torch.randn(len(weight), 8) @ torch.randn(8, weight.shape[1]) / 16)
        net[4].weight.copy_(nn.init.orthogonal_(torch.empty(classes, 64)))
    return net, torch.randn(256, WIDTH)


@pytest.mark.parametrize("seen", [False, True])
def test_classes_survive_uniform_ranks(seen: bool) -> None:
    """At 0.4 a head of ten classes would keep four of its directions."""
    net, x = planted()
    data = [x] if seen else None
    run: dict[str, Any] = {"data": data, "policy": "uniform", "copy": True, "progress": False}
    small, report = lowrank.compress(net, 0.4, **run)
    with_head, _ = lowrank.compress(net, 0.4, target_modules="all", **run)
    right = net(x).argmax(1)
    assert float((small(x).argmax(1) == right).float().mean()) > 0.95
    assert float((with_head(x).argmax(1) == right).float().mean()) < 0.8
    assert f"4  10x64  {HEAD}".split()[-3:] == str(report).splitlines()[-1].split()[-3:]
