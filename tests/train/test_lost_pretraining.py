"""LOST: what training starts with, what γ and SiLU do, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import LowRankSparseLinear, build, describe
from lowrank.train import lost
from tests.draws import normal
from tests.nn.forms import check_differences
from tests.zoo import llama, make, mlp, unchanged

OUT, IN, RANK, COUNT = 48, 64, 8, 6


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=dtype))


def made(model: nn.Module, **options: Any) -> Any:
    settings = {"rank": RANK, "sparsity": COUNT / IN, "copy": True, **options}
    return lost(model, **settings)[0][0]  # type: ignore[index]


def by_numpy(model: Any, last: int | None = None) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """W, the best rank-r part of it, and the channels of its tail up to the `last` value."""
    weight = model[0].weight.detach().double().numpy()
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    low = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    tail = (left[:, RANK:last] * values[RANK:last]) @ right[RANK:last]
    return weight, low, sorted(np.argsort(-np.linalg.norm(tail, axis=0))[:COUNT].tolist())


@pytest.mark.parametrize("gamma", [0.7, 0.0, 1.0])
def test_it_starts_from_the_svd_of_the_true_dense_weight(gamma: float) -> None:
    """Against NumPy: γ W_r plus (1 − γ) of W's own columns where the tail is longest."""
    model = layer()
    weight, low, channels = by_numpy(model)
    got = made(model, gamma=gamma)
    want = gamma * low
    want[:, channels] += (1 - gamma) * weight[:, channels]
    assert got.sparse.index.tolist() == channels
    np.testing.assert_allclose(got.dense_weight().detach(), want, atol=1e-10)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    np.testing.assert_allclose(
        got(x).detach(), x.numpy() @ want.T + model[0].bias.detach().numpy(), atol=1e-10
    )
    lengths = got.up.weight.norm(dim=0), got.down.weight.norm(dim=1)
    torch.testing.assert_close(*lengths)  # balanced


def test_a_short_tail_chooses_by_its_values_alone() -> None:
    model = layer()
    short, whole = by_numpy(model, RANK + 4)[2], by_numpy(model)[2]
    assert short != whole  # or this test says nothing
    assert made(model, tail_rank=4).sparse.index.tolist() == short
    assert made(model, tail_rank=10**6).sparse.index.tolist() == whole


def test_the_plain_sum_of_residual_columns_is_the_best_that_channels_can_do() -> None:
    """‖W − L − S‖² = ‖R‖² − ‖R[:, J]‖², and no other choice of channels is better."""
    model = layer()
    weight, low, channels = by_numpy(model)
    rest = np.square(weight - low)
    errors = {}
    for kind in ("tail", "norm", "random"):
        got = made(model, gamma=None, values="residual", channels=kind)
        assert "gamma" not in got.spec()
        errors[kind] = np.square(weight - got.dense_weight().detach().numpy()).sum()
    assert errors["tail"] == pytest.approx(rest.sum() - rest[:, channels].sum(), rel=1e-9)
    assert errors["tail"] < min(errors["norm"], errors["random"])


def test_channels_by_norm_and_at_random() -> None:
    model = layer()
    weight = model[0].weight.detach().numpy()
    longest = sorted(np.argsort(-np.linalg.norm(weight, axis=0))[:COUNT].tolist())
    assert made(model, channels="norm").sparse.index.tolist() == longest
    drawn = [made(model, channels="random", seed=s).sparse.index.tolist() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(a < b for a, b in zip(drawn[0], drawn[0][1:], strict=False))


def test_with_silu_it_is_the_formula_and_has_no_dense_weight(tmp_path: Path) -> None:
    model = layer()
    got = made(model, act="silu", gamma=0.7)
    x = torch.randn(5, IN, dtype=torch.float64)
    inner = x.numpy() @ got.down.weight.detach().numpy().T
    inner = inner / (1 + np.exp(-inner))
    want = 0.7 * inner @ got.up.weight.detach().numpy().T
    want += 0.3 * x.numpy()[:, got.sparse.index] @ got.sparse.weight.detach().numpy().T
    want += model[0].bias.detach().numpy()
    np.testing.assert_allclose(got(x).detach(), want, atol=1e-10)
    with pytest.raises(LowrankError, match="no dense weight: SiLU between its factors"):
        got.dense_weight()
    whole = nn.Sequential(got)
    with unchanged(whole), pytest.raises(LowrankError, match="0 cannot be merged: SiLU between"):
        lowrank.to_dense(whole)
    lowrank.save(whole, tmp_path)
    again = lowrank.load(tmp_path, layer())
    assert torch.equal(again(x), whole(x))


@pytest.mark.parametrize("gamma", [0.7, None])
@pytest.mark.parametrize("act", ["silu", None])
def test_spec_and_cast_keep_gamma(gamma: float | None, act: Any) -> None:
    """γ = 0.7 is not 0.69921875 after a cast to bfloat16."""
    got = made(layer(torch.float32), gamma=gamma, act=act).bfloat16()
    spec = json.loads(json.dumps(describe(got)))
    again = build(spec, "fc")
    assert (again.gamma, again.act) == (got.gamma, got.act) == (gamma, act)
    again.load_state_dict(got.state_dict(), assign=True)
    x = torch.randn(3, IN).bfloat16()
    assert torch.equal(again(x), got(x))
    assert copy.deepcopy(got).spec() == got.spec()


@pytest.mark.parametrize("act", ["silu", None])
def test_gradients_agree_with_differences(act: Any) -> None:
    check_differences(made(layer(), gamma=0.3, act=act), normal(3, IN), fast_mode=True)


@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "rank", "sparsity", "want"),
    [
        (512, 1376, 8, 128, 0.01, 10_239_488),
        (512, 1376, 8, 128, 0.05, 11_232_768),
        (768, 2048, 12, 256, 0.01, 45_613_056),
        (768, 2048, 12, 256, 0.05, 49_035_264),
    ],
)
def test_counts_of_the_papers_models(
    hidden: int, inner: int, layers: int, rank: int, sparsity: float, want: int
) -> None:
    """methods/core.md §2f; r (m + n) + c m with c = ⌊δ n⌋."""
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    total = 0
    for out, inputs in shapes:
        spec = {"out_features": out, "in_features": inputs, "rank": rank, "bias": False}
        count = max(1, int(sparsity * inputs))
        empty = LowRankSparseLinear.empty(**spec, count=count, gamma=0.5)
        total += sum(p.numel() for p in empty.parameters())
    assert layers * total == want


def test_a_llama_learns_is_saved_and_becomes_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    head = model.lm_head
    model, lines = lost(model, 6, 0.1, 0.6)
    assert {line["event"] for line in lines} == {"lost", "left"}
    assert model.lm_head is head
    kinds = {type(m).__name__ for m in model.model.layers.modules() if hasattr(m, "in_features")}
    assert kinds == {"LowRankSparseLinear", "Linear"}  # and the children of the first
    assert all(line["share"] < 1 for line in lines if line["event"] == "lost")
    rows = torch.randint(61, (8, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = lowrank.from_pretrained(tmp_path)
    want = model.eval()(input_ids=rows).logits
    assert torch.equal(again(input_ids=rows).logits, want)
    dense = lowrank.to_dense(again)
    torch.testing.assert_close(dense(input_ids=rows).logits, want, rtol=1e-4, atol=1e-5)


def test_all_layouts_and_a_root() -> None:
    root = nn.Linear(IN, OUT)
    assert isinstance(lost(root, RANK, 0.1)[0], LowRankSparseLinear)
    model = make("gpt2")  # Conv1D
    small, lines = lost(model, 4, 0.1, None, values="residual", target_modules=["c_fc"], copy=True)
    got = small.transformer.h[0].mlp.c_fc
    weight = model.transformer.h[0].mlp.c_fc.weight.T.detach()
    left = weight.double() - torch.from_numpy(_best(weight, 4))
    left[:, got.sparse.index.long()] = 0
    assert got.layout == "conv1d"
    error = float((weight - got.dense_weight().detach()).double().norm())
    assert error == pytest.approx(float(left.norm()), rel=1e-4)
    assert {line["reason"] for line in lines if line["event"] == "left"} == {
        "not in target_modules"
    }


def _best(weight: torch.Tensor, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def test_an_all_zero_weight_still_learns() -> None:
    model = layer(torch.float32)
    nn.init.zeros_(model[0].weight)
    small, _ = lost(model, RANK, 0.1, 0.5)
    small(torch.randn(4, IN)).square().sum().backward()
    before = small[0].dense_weight().detach().clone()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    assert not torch.equal(before, small[0].dense_weight())


def test_16_bit_weights_stay_so() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        got = made(layer(dtype))
        assert {p.dtype for p in got.parameters()} == {dtype}
        assert got(torch.randn(2, IN).to(dtype)).isfinite().all()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank must be an integer >= 1, got 0"),
    ({"rank": 2.5}, "rank must be an integer >= 1, got 2.5"),
    ({"rank": True}, "rank must be an integer >= 1, got True"),
    ({"tail_rank": 0}, "tail_rank must be an integer >= 1"),
    ({"sparsity": 0.0}, "sparsity is the share of inputs kept, in .*got 0.0"),
    ({"sparsity": 1.0}, "sparsity is the share of inputs kept"),
    ({"sparsity": float("nan")}, "sparsity is the share of inputs kept"),
    ({"gamma": 1.5}, "gamma must be in .*got 1.5"),
    ({"gamma": float("nan")}, "gamma must be in"),
    ({"act": "relu"}, "unknown act 'relu'"),
    ({"channels": "tails"}, "unknown channels 'tails'; did you mean 'tail'"),
    ({"values": "weights"}, "unknown values 'weights'; did you mean 'weight'"),
    ({"channels": "norm", "tail_rank": 3}, "tail_rank chooses channels by the tail, not by 'norm'"),
    ({"rank": 10_000}, r"no layer to replace: 0 \(\(16, 1\) would not be smaller\)"),
    ({"target_modules": ["fc"]}, "'fc' matches none of 2 layers"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_bad_options_change_nothing(options: dict[str, Any], said: str) -> None:
    model = mlp(24, 16, 20)
    with unchanged(model), pytest.raises(LowrankError, match=said):
        lost(model, **{"rank": 4, **options})


def test_layers_that_cannot_be_replaced_are_named() -> None:
    tied = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32), nn.Conv1d(8, 8, 1)])
    tied[1].weight = tied[0].weight
    with unchanged(tied), pytest.raises(LowrankError, match=r"0 \(its weight is tied to 1.*bias"):
        lost(tied, 4)
    tied[1].bias = tied[0].bias
    _, lines = lost(tied, 4)
    assert tied[0] is tied[1]  # one weight stays one
    assert lines[1]["reason"] == "lost takes linear layers, this is conv"
    broken = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    _, lines = lost(broken, 4)
    assert lines[0] == {
        "site": "0", "event": "left", "reason": "its weight has numbers that are not finite",
    }  # fmt: skip
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(LowrankError, match="on the meta device"):
        lost(empty, 4)


SPEC = {
    "type": "LowRankSparseLinear", "in_features": 8, "out_features": 6, "rank": 2, "count": 2,
    "bias": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gamma": 2.0}, "shares must be numbers in"),
        ({"gamma": "half"}, "shares must be numbers in"),
        ({"gamma": True}, "shares must be numbers in"),
        ({"act": 3}, "sizes must be integers"),
        ({"act": "relu"}, "unknown act 'relu'"),
        ({"rank": 0.5}, "sizes must be integers"),
    ],
)
def test_specs_that_no_layer_has(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(LowrankError, match=said) as caught:
        build({**SPEC, **wrong}, "model.fc")
    assert "model.fc" in str(caught.value)
