"""Statistics against an independent oracle: captured inputs and numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowrank
from lowrank import LowrankError
from lowrank.calibration.running import forward
from lowrank.walk.parts import separate_parts
from tests.zoo import (
    Custom,
    Tokenizer,
    calibration,
    example,
    inputs_of,
    make,
    mlp,
    said,
    tokens,
    unchanged,
)


def assert_moments(stats: Any, rows: Any, rtol: float = 1e-6) -> None:
    """`rows` (tokens, in) are what the layer was given."""
    assert stats.count == len(rows)
    gram, mean = rows.T @ rows / len(rows), rows.mean(0)
    assert stats.gram.dtype == stats.mean.dtype == torch.float64
    np.testing.assert_allclose(stats.gram.numpy(), gram, rtol=rtol, atol=rtol * gram.max())
    np.testing.assert_allclose(stats.mean.numpy(), mean, rtol=rtol, atol=rtol * abs(rows).max())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "opt", "vit", "mixtral"])
def test_gram_and_mean_are_per_token(kind: str) -> None:
    """Batches of unequal size: a mean of batch means would be another number."""
    model = make(kind)
    first = example(kind)
    second = (
        {key: value[:1] for key, value in first.items()} if isinstance(first, dict) else first[:1]
    )
    batches = [first, second]
    with unchanged(model):
        found = calibration(model, batches)
    names = [name for name, stats in found.statistics.items() if stats.freq is None]
    with separate_parts(model):
        linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        names = [name for name in names if name in linear or kind == "gpt2"]
        oracle = inputs_of(model, names, lambda: [forward(model, batch) for batch in batches])
    assert len(names) >= 8
    for name in names:
        if ".experts." not in name:  # they borrow from each other: test_rare.py
            assert_moments(found.statistics[name], oracle[name])
    assert found.tokens == max(len(rows) for rows in oracle.values())


def test_members_of_a_group_share_one_object() -> None:
    found = calibration(make("llama"), tokens())
    at = "model.layers.1.self_attn."
    q, k, v, o = (found.statistics[f"{at}{name}_proj"] for name in "qkvo")
    assert q is k is v
    assert q is not o
    assert (f"{at}q_proj", f"{at}k_proj", f"{at}v_proj") in found.observation.groups


def test_observation_is_kept() -> None:
    found = calibration(make("t5"), example("t5"))
    assert len(found.observation.chains) == 2
    assert found.observation.order[0] == "encoder.block.0.layer.0.SelfAttention.q"
    assert found.observation.shapes["decoder.block.0.layer.0.SelfAttention.q"] == (2, 5, 32)


# Padding


@pytest.mark.parametrize("kind", ["llama", "bert", "opt"])
def test_padded_positions_are_left_out(kind: str) -> None:
    """OPT flattens (rows, tokens, in) before its feed-forward part."""
    model = make(kind)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    batches = [{"input_ids": tokens(), "attention_mask": mask}, {"input_ids": tokens(1, 5)}]
    found = calibration(model, batches)
    assert found.tokens == 10 + 5
    names = [name for name, stats in found.statistics.items() if stats.freq is None]
    padded = inputs_of(model, names, lambda: forward(model, batches[0]))
    plain = inputs_of(model, names, lambda: forward(model, batches[1]))
    for name in names:
        rows = np.concatenate([padded[name][mask.flatten().numpy() == 1], plain[name]])
        assert_moments(found.statistics[name], rows)


def test_a_mask_of_another_shape_is_passed_over() -> None:
    """The decoder of an encoder-decoder has tokens of its own."""
    model = make("t5")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    found = calibration(model, {**example("t5"), "attention_mask": mask})
    linear = {name: stats for name, stats in found.statistics.items() if stats.freq is None}
    counts = {name.split(".")[0]: stats.count for name, stats in linear.items()}
    assert counts == {"encoder": 11, "decoder": 10}
    assert found.statistics["shared"].count == 11 + 10  # looked up by both, padding left out
    cross = found.statistics["decoder.block.0.layer.1.EncDecAttention.k"]
    assert cross.count == 11


# Groups that part


class Parts(nn.Module):
    """`a` and `b` read one tensor, until a batch has a negative number in it."""

    def __init__(self, call: Callable[[Any, Tensor, bool], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x, bool((x < 0).any()))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, odd: (m.a(x), m.b(x * 3 if odd else x), m.c(x)),
        lambda m, x, odd: (m.a(x), m.b(x), None if odd else m.c(x)),
        lambda m, x, odd: (m.a(x), m.a(x + 1) if odd else 0, m.b(x), m.c(x)),
        lambda m, x, odd: (m.a(x), m.b(x), m.c(x), m.c(x) if odd else 0),
        lambda m, x, odd: (m.b(x), m.a(x), m.c(x)) if odd else (m.a(x), m.b(x), m.c(x)),
        lambda m, x, odd: (m.a(x), m.b(x.clone().mul_(2)), m.c(x)) if odd else (m.a(x), m.b(x)),
    ],
)
def test_groups_that_part_in_a_later_batch_are_exact(call: Callable[..., Any]) -> None:
    model = Parts(call)
    batches = [torch.rand(5, 4), torch.rand(3, 4) - 2, torch.rand(2, 4)]
    found = calibration(model, batches)
    oracle = inputs_of(model, ["a", "b", "c"], lambda: [model(batch) for batch in batches])
    for name, rows in oracle.items():
        assert_moments(found.statistics[name], rows)
    grouped = [name for group in found.observation.groups for name in group]
    assert len(grouped) == len(set(grouped))
    for group in found.observation.groups:
        assert len({id(found.statistics[name]) for name in group}) == 1


# Forms of data


def linear_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 4, generator=generator) for n in (6, 2)]


@pytest.mark.parametrize(
    "form",
    [
        lambda batches: batches,
        lambda batches: iter(batches),
        lambda batches: [(x, "label") for x in batches],
        lambda batches: [{"input": x} for x in batches],
        lambda batches: torch.cat(batches),
        lambda batches: DataLoader(torch.cat(batches), batch_size=3),
        lambda batches: lambda model: [model(x) for x in batches],
    ],
    ids=["list", "generator", "pairs", "dicts", "tensor", "loader", "callable"],
)
def test_all_forms_of_data_give_the_same_statistics(form: Callable[..., Any]) -> None:
    model = nn.Sequential(mlp(4, 6, 3))
    model.forward = lambda input: model[0](input)  # type: ignore[method-assign]
    found = calibration(model, form(linear_batches()))
    rows = torch.cat(linear_batches()).double().numpy()
    assert_moments(found.statistics["0.0"], rows)
    assert found.tokens == 8


def test_texts_with_a_tokenizer() -> None:
    model = make("llama")
    found = calibration(model, ["some text", "more"], tokenizer=Tokenizer(), length=6)
    assert found.tokens == 13
    assert [tuple(batch.shape) for batch in found.batches] == [(1, 6), (1, 3), (1, 4)]
    one = calibration(model, "some text", tokenizer=Tokenizer(), length=6)
    assert one.tokens == 9


def test_a_finished_calibration_is_returned_as_it_is() -> None:
    model = mlp(4, 6, 3)
    found = calibration(model, torch.randn(5, 4))
    assert lowrank.calibrate(model, found) is found


def test_a_generator_is_read_once_and_kept() -> None:
    rows = (x for x in linear_batches())
    found = calibration(mlp(4, 6, 3), rows)
    assert [len(batch) for batch in found.batches] == [6, 2]


# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = mlp(4, 6, 3).to(dtype)
    batches = [batch.to(dtype) for batch in linear_batches()]
    found = calibration(model, batches)
    oracle = inputs_of(model, ["0", "2"], lambda: [model(batch) for batch in batches])
    for name in ("0", "2"):
        assert_moments(found.statistics[name], oracle[name], 1e-12 if dtype.itemsize == 8 else 1e-6)


def test_autocast_and_inference_mode_around_the_callers_run() -> None:
    """Sums stay in float32 and better, and live on outside the caller's modes."""
    model, batches = mlp(64, 64, 3), [torch.rand(40, 64) + 1 for _ in range(3)]

    def run(model: nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.inference_mode():
                model(batches[0])
            model(batches[1])
        model(batches[2])

    found = calibration(model, run)
    assert_moments(found.statistics["0"], torch.cat(batches).double().numpy())
    assert not found.statistics["2"].gram.is_inference()
    assert found.observation.groups == (("0",), ("2",))


def test_leading_dimensions_and_none_at_all() -> None:
    layer = nn.Linear(4, 3)
    data = [torch.randn(2, 3, 5, 4), torch.randn(4)]
    found = calibration(layer, data)
    assert_moments(
        found.statistics[""], torch.cat([x.reshape(-1, 4) for x in data]).double().numpy()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_names_its_layer(bad: float) -> None:
    model = Custom(
        lambda self, x: self.body[2](self.body[0](x) + bad * (x.sum() > 100)),
        body=nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]),
    )
    good = torch.ones(3, 4)
    with unchanged(model), pytest.raises(LowrankError) as caught:
        calibration(model, [good, good * 100])
    assert said(caught).startswith("body.2: its input holds NaN or Inf")
    with pytest.raises(LowrankError, match=r"^\(root\): its input"):
        calibration(nn.Linear(4, 4), good * bad)


# What is not reached


class Experts(nn.Module):
    """Each token goes to the expert that its first number names."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = x[:, 0].long() == index
            if bool(chosen.any()):
                out[chosen] = expert(x[chosen])
        return out


def test_experts_have_counts_of_their_own() -> None:
    model = Experts()
    x = torch.cat([torch.full((5, 1), 0.0), torch.full((2, 1), 1.0)])
    x = torch.cat([x, torch.randn(7, 3)], dim=1)
    found = calibration(model, [x[:5], x[5:]])
    counts = [found.statistics[f"experts.{index}"].count for index in range(3)]
    assert counts == [5, 2, 0]
    assert_moments(found.statistics["experts.1"], x[5:].double().numpy())
    assert found.statistics["experts.2"].gram is None
    assert "experts.2" not in found.observation.order


def test_a_layer_that_is_given_no_rows_counts_nothing() -> None:
    model = Custom(lambda self, x: self.fc(x[:0]), fc=nn.Linear(4, 4))
    with pytest.raises(LowrankError, match="reached none of 1 layers"):
        calibration(model, torch.ones(2, 4))


def test_data_that_reaches_nothing() -> None:
    model = mlp(4, 6, 3)
    model.forward = lambda x: x  # type: ignore[method-assign]
    with unchanged(model), pytest.raises(LowrankError, match="does it run this model") as caught:
        calibration(model, torch.ones(2, 4))
    said(caught)


def test_a_callable_that_uses_up_an_iterator_is_told_why() -> None:
    rows = iter(linear_batches())
    with pytest.raises(LowrankError, match="called more than once"):
        calibration(mlp(4, 6, 3), lambda model: [model(x) for x in rows])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (mlp(4, 6, 3).to("meta"), "meta device"),
        (nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        ("model", "got str"),
    ],
    ids=["meta", "lazy", "none"],
)
def test_a_model_that_cannot_run(model: Any, words: str) -> None:
    with pytest.raises(LowrankError, match=words):
        calibration(model, torch.ones(2, 4))


@pytest.mark.parametrize("batch", [0, 1])
def test_no_trace_when_the_model_raises(batch: int) -> None:
    """In the first batch it is being observed, in the second statistics are gathered."""
    model = mlp(4, 6, 3).train()
    data = linear_batches()
    data[batch] = torch.ones(2, 9)
    with unchanged(model), pytest.raises(LowrankError, match=r"RuntimeError: .* shapes"):
        calibration(model, data)


def test_a_layer_that_is_given_no_tensor_says_so_itself() -> None:
    model = Custom(lambda self, x: self.fc("text"), fc=nn.Linear(4, 4))
    with unchanged(model), pytest.raises(LowrankError, match="TypeError: linear"):
        calibration(model, torch.ones(2, 4))
    later = Custom(lambda self, x: self.fc("text" if x.sum() > 100 else x), fc=nn.Linear(4, 4))
    with unchanged(later), pytest.raises(LowrankError, match="TypeError: linear"):
        calibration(later, [torch.ones(2, 4), torch.full((2, 4), 100.0)])


def test_min_tokens_is_remembered() -> None:
    assert calibration(mlp(4, 6, 3), torch.ones(2, 4), min_tokens=7).min_tokens == 7


@pytest.mark.parametrize("size", [1, 2, 8])
def test_convolutions_with_little_data_say_so(size: int) -> None:
    """They are left fewer numbers than was asked, for one image of a pixel has no more to tell."""
    layers = [nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Flatten())
    data = torch.randn(4, 4, size, size)
    _, report = lowrank.compress(model, 0.8, data=data, progress=False, target_modules=["0", "2"])
    assert report.achieved <= 0.8
    told = "fewer distinct inputs than they have features" in str(report)
    assert told == (size < 8)
    assert told or report.achieved > 0.7
