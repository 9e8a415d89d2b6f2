"""None of Greenformer's defects that concern linear layers: one test for each that was found there.

Each is named after what that code (version 0.2.2) does: it fails where the defect is put back.
"""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, factorize_by_design
from lowrank.nn import LowRankLinear
from tests.zoo import Custom, example, llama, make, mlp, refused, tokens

INITS = ("spectral", "random")


def compressed(model: nn.Module, **options: Any) -> Any:
    return lowrank.compress(model, **{"ratio": 0.5, "data": None, "progress": False, **options})[0]


def rank_two(out_features: int = 24, in_features: int = 16) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out_features, 2) @ torch.randn(2, in_features))
    return layer


def test_top_level_children_are_factored() -> None:
    model = compressed(mlp(24, 40, 24))
    assert [type(model[i]) for i in (0, 2)] == [LowRankLinear, LowRankLinear]
    assert type(compressed(nn.Linear(24, 40))) is LowRankLinear  # and the root itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["svd", "random", "snmf"])
def test_the_dtype_is_kept_and_the_forward_runs(method: str, dtype: torch.dtype) -> None:
    model = compressed(mlp(24, 40, 16).to(dtype), method=method)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.randn(3, 24, dtype=dtype)).dtype == dtype


def test_an_unknown_solver_raises_and_is_not_random() -> None:
    model = mlp(24, 40, 16)
    with pytest.raises(LowrankError, match="unknown method 'svdd'; did you mean 'svd'"):
        compressed(model, method="svdd")
    with pytest.raises(LowrankError, match="unknown init 'randon'; did you mean 'random'"):
        factorize_by_design(model, 0.5, "randon")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear


def test_random_keeps_the_bias_and_is_never_the_default() -> None:
    model, dense = mlp(24, 40, 16), mlp(24, 40, 16)
    dense.load_state_dict(model.state_dict())
    small = compressed(model, method="random")
    assert torch.equal(small[0].up.bias, dense[0].bias)
    exact = rank_two()
    want = exact.weight.detach().clone()
    torch.testing.assert_close(compressed(exact).dense_weight(), want, atol=1e-5, rtol=0)


def test_one_layer_under_two_names_stays_one() -> None:
    shared = nn.Linear(24, 24)
    model = compressed(nn.Sequential(shared, nn.ReLU(), shared))
    assert type(model[0]) is LowRankLinear
    assert model[0] is model[2]


def test_a_tied_embedding_stays_tied_and_the_model_does_not_grow() -> None:
    model = llama(tie_word_embeddings=True)
    before = model.num_parameters()
    model = compressed(model, ratio=0.9)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() < before
    table, head = nn.Embedding(60, 20), nn.Linear(20, 60, bias=False)
    head.weight = table.weight
    plain = nn.ModuleDict({"table": table, "head": head, "other": nn.Linear(20, 20)})
    plain = compressed(plain)
    assert plain["head"].weight is plain["table"].weight
    assert type(plain["other"]) is LowRankLinear


@pytest.mark.parametrize("grad", [True, False], ids=["plain path", "fast path"])
def test_an_encoder_layer_of_torch_works_in_eval(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fast path reads linear1.weight and would multiply the factors: it is not taken."""
    layer = nn.TransformerEncoderLayer(16, 4, 48, dropout=0.0, batch_first=True)
    x, calls, forward = torch.randn(2, 5, 16), [], LowRankLinear.forward
    layer = compressed(layer, target_modules=["linear1", "linear2"])
    assert type(layer.linear1) is type(layer.linear2) is LowRankLinear
    want = layer.train()(x)
    monkeypatch.setattr(LowRankLinear, "forward", lambda *a: calls.append(1) or forward(*a))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer.eval()(x), want, atol=1e-5, rtol=1e-4)
    assert len(calls) == 2


def test_the_input_need_not_be_contiguous() -> None:
    model = compressed(mlp(24, 40, 16))
    x = torch.randn(24, 5, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(model(x), model(x.contiguous()))
    assert model(torch.randn(24)).shape == (16,)


@pytest.mark.parametrize("method", ["svd", "random", "snmf"])
def test_factors_are_contiguous_and_can_be_saved(method: str, tmp_path: Any) -> None:
    for model in (compressed(mlp(24, 40, 16), method=method), compressed(make("gpt2"))):
        parts = [module for module in model.modules() if isinstance(module, LowRankLinear)]
        assert parts
        for part in parts:
            assert all(tensor.is_contiguous() for tensor in part.state_dict().values())
            save_file(part.state_dict(), tmp_path / "part.safetensors")


def test_the_bias_of_a_copy_is_its_own() -> None:
    model = mlp(24, 40, 16)
    before = model[0].bias.detach().clone()
    small = compressed(model, copy=True)
    with torch.no_grad():
        small[0].up.bias += 1
    assert torch.equal(model[0].bias, before)
    assert small[0].up.bias is not model[0].bias


def test_two_runs_agree_and_the_error_is_the_least_possible() -> None:
    """Whatever the global generator does: the sketch of the original needs its luck."""
    model = mlp(64, 64)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        small = compressed(copy.deepcopy(model), ratio=None, rank=16)
        runs.append(small[0].dense_weight().detach())
    assert torch.equal(*runs)
    weight = model[0].weight.detach().double()
    best = float(torch.linalg.svdvals(weight)[16:].square().sum())
    found = float((weight - runs[0].double()).square().sum())
    assert found == pytest.approx(best, rel=1e-5)


def test_no_graph_is_kept() -> None:
    for model in (compressed(mlp(24, 40, 16)), factorize_by_design(mlp(24, 40, 16), 0.5)[0]):
        assert all(p.is_leaf and p.grad_fn is None and p.requires_grad for p in model.parameters())


def test_no_option_is_accepted_and_passed_over() -> None:
    with pytest.raises(TypeError, match="ignore_lower_equal_dim"):
        factorize_by_design(mlp(24, 40, 16), 0.5, ignore_lower_equal_dim=True)  # type: ignore[call-arg]
    changed: dict[str, Any] = {
        "init": "random", "of": "model", "unit": "bytes", "target_modules": ["0"],
        "exclude_modules": ["0"], "align": 5, "seed": 3, "copy": True, "method": "snmf",
        "policy": "energy",
    }  # fmt: skip
    assert {"model", "ratio", *changed} == set(inspect.signature(factorize_by_design).parameters)

    def outcome(**options: Any) -> tuple[object, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24).double(), nn.Embedding(90, 7))
        small, _ = factorize_by_design(model, 0.5, **options)
        state = {name: tensor.tolist() for name, tensor in small.state_dict().items()}
        return state, small is model

    beside: dict[str, dict[str, Any]] = {"seed": {"init": "random"}, "unit": {"of": "model"}}
    for option, value in changed.items():
        options = beside.get(option, {})  # where the option has something to decide
        assert outcome(**options, **{option: value}) != outcome(**options), option


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_transformers_models_run_after_it(kind: str) -> None:
    model = compressed(make(kind))
    batch = example(kind)
    output = model(batch) if isinstance(batch, Tensor) else model(**batch)
    assert torch.isfinite(output.logits).all()


def test_submodules_only_leaves_the_others() -> None:
    model = make("llama")
    factorize_by_design(model, 0.5, target_modules=r"model\.layers\.1\..*")
    where = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert len(where) == 7
    assert all(name.startswith("model.layers.1.") for name in where)
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


class Graph(nn.Module):
    """A layer of a graph network: neighbours by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = rank_two(16)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.sparse.mm(edges, self.lin(x)).relu()


def graph() -> nn.Module:
    edges = torch.eye(9).roll(1, 0).to_sparse()
    layers = nn.ModuleList([Graph(), Graph()])
    return Custom(lambda self, x: self.layers[1](self.layers[0](x, edges), edges), layers=layers)


def scripted() -> nn.Module:
    part = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    return nn.Sequential(rank_two(16), part, rank_two(16))


def transformed() -> nn.Module:
    layers = {"first": rank_two(16), "a": rank_two(16), "b": rank_two()}
    return Custom(lambda self, x: self.b(torch.func.vmap(self.a)(self.first(x))), **layers)


def of_one_size() -> nn.Module:
    ends = nn.Sequential(nn.LayerNorm(16), rank_two())
    return Custom(lambda self, x: self.b(self.a(x).reshape(9, 16)), a=rank_two(16), b=ends)


def with_a_lock() -> nn.Module:
    model = nn.Sequential(rank_two(16), nn.ReLU(), rank_two())
    model[0].lock, model.rows = threading.Lock(), iter(())
    model.linears = [model[0], model[2]]  # they hold what cannot be copied
    return model


def by_name() -> nn.Module:
    return Custom(lambda self, x: self.b(input=self.a(input=x)), a=rank_two(16), b=rank_two())


def nested() -> nn.Module:
    def call(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        rows = torch.nested.as_nested_tensor([x[:4], x[4:]], layout=torch.jagged)
        return self.b(self.a(rows).values())

    return Custom(call, first=rank_two(16), a=rank_two(16), b=rank_two())


def with_a_gap() -> nn.Module:
    layers = nn.ModuleList([rank_two(16), None, rank_two(16)])  # type: ignore[list-item]
    return Custom(lambda self, x: self.b(self.a[2](self.a[0](x))), a=layers, b=rank_two())


ODD = {
    "sparse": graph, "scripted": scripted, "vmap": transformed, "one size": of_one_size,
    "a lock": with_a_lock, "by name": by_name, "nested": nested, "None": with_a_gap,
}  # fmt: skip


@pytest.mark.parametrize("effort", [None, "fast"])
@pytest.mark.parametrize("kind", ODD)
def test_data_run_through_odd_models(kind: str, effort: str | None) -> None:
    """What is of rank two is compressed without loss; what cannot be followed is left alone."""
    torch.manual_seed(0)
    model, x = ODD[kind](), torch.randn(9, 16)
    want = model(x).detach()
    small, report = lowrank.compress(model, 0.6, data=[x, x + 1], effort=effort, progress=False)
    off = (small(x) - want).detach().abs().max()
    assert off < 1e-4 * want.abs().max()
    assert 0 < report.achieved < 1


def test_a_sparse_tensor_in_a_batch() -> None:
    """It has no rows that could be cut."""
    model, edges = Custom(lambda self, x, edges: self.a(x, edges), a=Graph()), torch.eye(9)
    batch = {"x": torch.randn(9, 16), "edges": edges.to_sparse()}
    want = model(**batch).detach()
    for effort in (None, "fast"):
        small = compressed(copy.deepcopy(model), data=[batch, batch], effort=effort)
        torch.testing.assert_close(small(**batch), want)


def test_a_copy_of_what_cannot_be_copied() -> None:
    model = with_a_lock()
    message = refused(model, 0.6, data=None, copy=True)
    assert "Sequential cannot be copied (TypeError: cannot pickle '_thread.lock' object)" in message
