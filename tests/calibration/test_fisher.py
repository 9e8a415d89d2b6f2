"""Output gradients: the Fisher of the model itself, and a model that is as before afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, with_fisher
from lowrank.calibration import fisher as fisher_of
from lowrank.calibration import gradients
from lowrank.calibration.rare import weight_of
from lowrank.calibration.running import forward, logits_of
from lowrank.walk import layouts
from lowrank.walk.parts import separate_parts
from lowrank.walk.sites import find_sites
from tests import zoo
from tests.zoo import calibration

WIDE = torch.float64


def exact_fisher(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """E[g gᵀ] at the output of the first layer, over all labels, by enumeration."""
    hidden = model[0](x).detach().requires_grad_()
    logits = model[2](model[1](hidden))
    chance = logits.detach().softmax(-1)
    total = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64)
    for label in range(logits.shape[1]):
        loss = -logits.log_softmax(-1)[:, label].sum()
        (g,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        total += torch.einsum("t,ti,tj->ij", chance[:, label].double(), g.double(), g.double())
    return total / len(x)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def test_the_mean_over_labels_is_the_fisher() -> None:
    model, x = small(), torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    seen = with_fisher(model, lowrank.calibrate(model, x, progress=False))
    found, want = seen.statistics["0"].out_gram, exact_fisher(model, x)
    assert found is not None
    assert float((found - want).norm() / want.norm()) < 0.1  # 4,000 draws
    assert float((found - want).norm()) > 0  # and draws they are


def drawn(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The labels, by NumPy: the first class whose distribution function exceeds the draw."""
    chance = logits.detach().double().softmax(-1).flatten(0, -2).numpy()
    draws = torch.rand(len(chance), 1, generator=torch.Generator().manual_seed(seed), dtype=WIDE)
    return torch.from_numpy((chance.cumsum(1) <= draws.numpy()).sum(1)).view(logits.shape[:-1])


def oracle(
    model: nn.Module, batch: Any, name: str, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ g gᵀ and the rows of Σ (∂L/∂W)² of one layer, sequence by sequence, by autograd alone.

    g is the gradient of a zero that is added to the output, and the weight's own gradient is asked
    for: no input is seen.
    """
    module = model.get_submodule(name)
    zeros: list[torch.Tensor] = []

    def add(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        zeros.append(torch.zeros_like(output).requires_grad_())
        return output + zeros[-1]

    handle = module.register_forward_hook(add)
    logits = logits_of(forward(model, batch))
    handle.remove()
    width = layouts.matrix(module).shape[0]
    gram, rows = torch.zeros(width, width, dtype=WIDE), torch.zeros(width, dtype=WIDE)
    for one, label in zip(logits, labels, strict=True):
        loss = nn.functional.cross_entropy(one, label, reduction="sum")
        weight, *gradients = torch.autograd.grad(loss, [module.weight, *zeros], retain_graph=True)
        weight = weight.T if layouts.layout(module) == "conv1d" else weight
        rows += weight.double().square().sum(1)
        for g in gradients:
            gram += (each := g.double().reshape(-1, width)).T @ each
    return gram, rows


def close(found: torch.Tensor | None, want: torch.Tensor, rtol: float = 1e-4) -> None:
    assert found is not None
    assert found.dtype == WIDE
    torch.testing.assert_close(found, want, rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "opt", "vit", "mixtral"])
def test_both_figures_are_what_autograd_says(kind: str) -> None:
    """Grouped queries, transposed weights, tokens in one line, images: all alike."""
    model, batch = zoo.make(kind), zoo.example(kind)
    seen = with_fisher(model, lowrank.calibrate(model, [batch], progress=False), seed=5)
    labels = drawn(logits_of(forward(model, batch)), 5)
    names = [n for n, stats in seen.statistics.items() if stats.out_gram is not None]
    with separate_parts(model):
        names = [n for n in names if layouts.kind(model.get_submodule(n)) == "linear"]
        assert len(names) >= 8
        for name in names:
            gram, rows = oracle(model, batch, name, labels)
            if ".experts." in name:  # they borrow from each other: see below
                continue
            close(seen.statistics[name].out_gram, gram / seen.tokens)
            close(seen.statistics[name].row_fisher, rows / len(labels))


def test_experts_count_by_their_share_and_borrow_from_each_other() -> None:
    model, batch = zoo.make("mixtral"), zoo.example("mixtral")
    seen = with_fisher(model, lowrank.calibrate(model, [batch], progress=False), seed=5)
    labels = drawn(logits_of(forward(model, batch)), 5)
    names = [f"model.layers.1.mlp.experts.gate_up_proj.{e}" for e in range(4)]
    names = [name for name in names if seen.statistics[name].count]
    assert len(names) > 1
    counts = {name: seen.statistics[name].count for name in names}
    with separate_parts(model):
        sums = {name: oracle(model, batch, name, labels)[0] for name in names}
    mean = torch.stack([*sums.values()]).sum(0) / sum(counts.values())
    for name in names:
        share = weight_of(counts[name], 96)
        own = (1 - share) * sums[name] / counts[name] + share * mean
        close(seen.statistics[name].out_gram, own * counts[name] / seen.tokens)


def test_batches_add_up() -> None:
    """Of unequal size: the mean of batch means would be another number; long ones are cut."""
    model, x = small().double(), torch.randn(40, 6, dtype=WIDE)
    whole, parts = (
        with_fisher(model, lowrank.calibrate(model, data, progress=False), seed=2).statistics["0"]
        for data in ([x], [x[:3], x[3:21], x[21:]])
    )
    close(parts.out_gram, whole.out_gram, 1e-12)
    close(parts.row_fisher, whole.row_fisher, 1e-12)


def test_a_layer_that_is_called_twice_has_one_gradient() -> None:
    """The weight's gradient is the sum over its calls, whatever their lengths."""
    layer = nn.Linear(4, 4)
    model = zoo.Custom(
        lambda self, x: self.b(self.a(self.a(x).tanh())[:, :2]),
        a=layer, b=nn.Linear(4, 5),
    )  # fmt: skip
    x = torch.randn(3, 6, 4)
    seen = with_fisher(model, lowrank.calibrate(model, [x], progress=False), seed=4)
    gram, rows = oracle(model, x, "a", drawn(model(x), 4))
    assert seen.statistics["a"].count == 36
    close(seen.statistics["a"].out_gram, gram / 36)
    close(seen.statistics["a"].row_fisher, rows / 3)


def test_two_modules_that_share_a_weight_are_one_site() -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    model = zoo.Custom(lambda self, x: self.b(self.a(x).tanh()), a=one, b=other)
    x = torch.randn(3, 2, 4)
    seen = with_fisher(model, lowrank.calibrate(model, [x], progress=False), seed=4)
    labels = drawn(model(x), 4)
    grams = [oracle(model, x, name, labels)[0] for name in "ab"]
    close(seen.statistics["a"].out_gram, sum(grams) / 12)
    close(seen.statistics["a"].row_fisher, oracle(model, x, "a", labels)[1] / 3)


def test_layers_of_which_the_predictions_know_nothing_have_zeros() -> None:
    model = zoo.Custom(
        lambda self, x: (self.a(x), self.b(x))[0], a=nn.Linear(4, 3), b=nn.Linear(4, 2)
    )
    seen = with_fisher(model, lowrank.calibrate(model, torch.randn(5, 4), progress=False))
    assert (
        float(seen.statistics["b"].out_gram.norm())
        == float(seen.statistics["b"].row_fisher.sum())
        == 0
    )
    assert float(seen.statistics["a"].out_gram.norm()) > 0


def test_tokens_that_no_sequence_can_be_told_of_count_by_themselves() -> None:
    """A layer that is given three tokens of two sequences, and none of another batch."""

    def call(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        if len(x) == 1:
            return hidden
        more = torch.zeros_like(hidden).flatten(0, 1)
        more = more.index_put((torch.arange(3),), self.b(hidden.flatten(0, 1)[:3]))
        return hidden + more.view_as(hidden)

    model = zoo.Custom(call, a=nn.Linear(4, 5), b=nn.Linear(5, 5))
    batches = [torch.randn(1, 4, 4), torch.randn(2, 4, 4)]
    sites = [site for site in find_sites(model) if site.name == "b"]
    found = with_fisher(model, calibration(model, batches), sites, seed=3).statistics["b"]
    logits = torch.cat([model(batch).flatten(0, 1) for batch in batches])
    labels = drawn(logits, 3)
    # What b gives is added to the logits: its gradient is p − onehot(label).
    g = (logits.detach().double().softmax(-1) - nn.functional.one_hot(labels, 5))[4:7]
    hidden = model.a(batches[1]).detach().flatten(0, 1)[:3].double()
    assert found.count == 3
    close(found.out_gram, g.T @ g / 12)  # its share of all twelve tokens
    close(found.row_fisher, g.square().T @ hidden.square().sum(1) / 3)  # of three sequences in all


def test_inputs_and_outputs_may_be_changed_in_place() -> None:
    def call(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = x.clone()
        output = self.a(input=hidden)  # by keyword, too
        hidden.zero_()
        return self.b(output.mul_(2).relu_())

    model = zoo.Custom(call, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    same = zoo.Custom(lambda self, x: self.b((self.a(x) * 2).relu()), a=model.a, b=model.b)
    x = torch.randn(7, 4)
    seen = with_fisher(model, lowrank.calibrate(model, x, progress=False))
    gram, rows = oracle(same, x, "a", drawn(same(x), 0))
    close(seen.statistics["a"].out_gram, gram / 7)
    close(seen.statistics["a"].row_fisher, rows / 7)


def test_labels_are_drawn_at_their_chance() -> None:
    logits = torch.tensor([1.0, -2.0, 0.0, -torch.inf, 2.0]).expand(40_000, 5)
    labels = gradients._drawn(logits, torch.Generator().manual_seed(0))
    chance = logits[0].double().softmax(-1)
    found = labels.bincount(minlength=5) / 40_000
    assert (abs(found - chance) <= 4 * (chance * (1 - chance) / 40_000).sqrt()).all()
    assert found[3] == 0


# What is gathered, and when


def test_the_output_head_is_left_out_unless_it_is_asked_for() -> None:
    """Its figures would be the vocabulary squared."""
    model = zoo.make("llama")
    seen = lowrank.calibrate(model, zoo.tokens(), progress=False)
    plain = with_fisher(model, seen)
    assert seen.statistics["lm_head"].count
    assert plain.statistics["lm_head"].out_gram is None
    assert plain.statistics["model.layers.0.mlp.up_proj"].out_gram is not None
    sites = [site for site in find_sites(model) if site.name == "lm_head"]
    whole = with_fisher(model, plain, sites)
    assert whole.statistics["lm_head"].out_gram.shape == (zoo.VOCABULARY, zoo.VOCABULARY)
    up = "model.layers.0.mlp.up_proj"
    assert whole.statistics[up] is plain.statistics[up]
    assert with_fisher(model, whole, sites) is whole


def test_layers_gathered_apart_are_those_gathered_together() -> None:
    model = zoo.make("llama")
    seen = lowrank.calibrate(model, zoo.tokens(), progress=False)
    together = with_fisher(model, seen, seed=3).statistics
    sites = [site for site in find_sites(model) if "mlp" in site.name]
    apart = with_fisher(model, with_fisher(model, seen, sites, seed=3), seed=3).statistics
    for name, stats in together.items():
        if stats.out_gram is not None:
            close(apart[name].out_gram, stats.out_gram, 1e-6)
            close(apart[name].row_fisher, stats.row_fisher, 1e-6)


def test_each_need_is_gathered_alone_and_added_later() -> None:
    model = zoo.make("llama")
    seen = calibration(model, zoo.tokens())
    both = with_fisher(model, seen, seed=3).statistics
    for need, other in (("out_gram", "row_fisher"), ("row_fisher", "out_gram")):
        one = with_fisher(model, seen, needs=frozenset({need, "gram"}), seed=3)
        assert with_fisher(model, one, needs=frozenset({need})) is one
        whole = with_fisher(model, one, seed=3)
        for name, stats in both.items():
            if stats.out_gram is None:
                continue
            assert getattr(one.statistics[name], other) is None
            for found in (one, whole):
                assert torch.equal(getattr(found.statistics[name], need), getattr(stats, need))
            assert torch.equal(getattr(whole.statistics[name], other), getattr(stats, other))


def test_another_seed_draws_other_labels() -> None:
    model = small()
    seen = lowrank.calibrate(model, torch.randn(9, 6), progress=False)
    one, two = (with_fisher(model, seen, seed=seed).statistics["0"].out_gram for seed in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_inside_the_callers_modes(mode: Any) -> None:
    model, plain = zoo.make("bert"), zoo.tokens()
    mask = torch.ones_like(plain)
    mask[:, 5:] = 0
    want = with_fisher(
        model, calibration(model, {"input_ids": plain, "attention_mask": mask})
    ).statistics
    with mode():
        batch = {"input_ids": plain.clone(), "attention_mask": mask.clone()}
        found = with_fisher(model, calibration(model, batch)).statistics
    name = "bert.encoder.layer.0.output.dense"
    assert not found[name].out_gram.is_inference()
    close(found[name].out_gram, want[name].out_gram, 1e-5)
    close(found[name].row_fisher, want[name].row_fisher, 1e-5)


def test_padded_positions_count_for_nothing_even_where_others_read_them() -> None:
    def call(self: Any, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(hidden + hidden.mean(1, keepdim=True))

    model = zoo.Custom(call, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = {"x": torch.randn(2, 4, 4), "attention_mask": mask}
    stats = with_fisher(model, calibration(model, batch), seed=3).statistics["a"]
    logits = model(**batch)
    labels = drawn(logits[mask == 1][None], 3)[0]  # of the positions that count
    zero = torch.zeros(2, 4, 5).requires_grad_()
    handle = model.a.register_forward_hook(lambda _module, _args, output: output + zero)
    loss = nn.functional.cross_entropy(model(**batch)[mask == 1], labels, reduction="sum")
    handle.remove()
    (g,) = torch.autograd.grad(loss, zero)
    assert float(g[mask == 0].norm()) > 0
    kept = g[mask == 1].double()
    assert stats.count == 5
    close(stats.out_gram, kept.T @ kept / 5)
    g = g * mask[..., None]
    want = sum((one.T @ x).double().square().sum(1) for one, x in zip(g, batch["x"], strict=True))
    close(stats.row_fisher, want / 2)


def test_a_batch_of_padding_alone_counts_for_nothing() -> None:
    model, ids = zoo.make("llama"), zoo.tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    empty = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    name = "model.layers.1.self_attn.v_proj"
    one, two = (
        with_fisher(model, calibration(model, data)).statistics[name]
        for data in ([batch], [batch, empty])
    )
    close(two.out_gram, one.out_gram, 1e-6)


def test_methods_get_what_they_need_of_their_targets_alone() -> None:
    model, name = zoo.make("llama"), "model.layers.0.mlp.up_proj"
    seen = calibration(model, zoo.tokens())
    options = {"method": "two-sided", "seed": 3, "progress": False, "copy": True, "align": 1}
    asked: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = fisher_of.gradient_moments

        def watched(model: nn.Module, batches: Any, sites: Any, *rest: Any, **kwargs: Any) -> Any:
            asked.append([site.name for site in sites])
            return plain(model, batches, sites, *rest, **kwargs)

        patch.setattr(fisher_of, "gradient_moments", watched)
        one, report = lowrank.compress(model, 0.5, data=seen, target_modules=["up_proj"], **options)
        plan = lowrank.plan(
            model, 0.5, method="two-sided", seed=3, data=zoo.tokens(), align=1,
            target_modules=["up_proj"], progress=False,
        )  # fmt: skip
        two, _ = lowrank.apply(model, plan, data=zoo.tokens(), copy=True, progress=False)
        names = [name, name.replace("0", "1")]
        assert asked == [names] * 3
    assert torch.equal(one.get_submodule(name).up.weight, two.get_submodule(name).up.weight)
    for site in report.sites:
        assert site.norm == "fisher"
        assert site.measured == pytest.approx(site.predicted, abs=1e-5 * site.total)
        assert 0 < site.predicted < site.total


@pytest.mark.parametrize("method", ["two-sided", "fwsvd"])
def test_sensitivity_works_with_methods_that_need_gradients(method: str) -> None:
    model, ids = zoo.make("llama"), zoo.tokens()
    found = lowrank.sensitivity(
        model, ids, calibration=ids, method=method, ratios=(0.5,), progress=False
    )
    assert bool(torch.isfinite(found.kl).all())


@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2, zoo.opt, zoo.bert])
def test_any_model_and_nothing_is_left_behind(make) -> None:
    torch.manual_seed(0)
    model = make().train()
    frozen = next(model.parameters()).requires_grad_(False)
    ids = torch.randint(0, zoo.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))
    seen = lowrank.calibrate(model, [ids], progress=False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    again = [with_fisher(model, seen, seed=3).statistics for _ in range(2)]
    assert model.training
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    reached = [name for name, stats in again[0].items() if stats.out_gram is not None]
    assert len(reached) >= 8
    for name in reached:
        gram = again[0][name].out_gram
        assert torch.equal(gram, again[1][name].out_gram)
        assert float(gram.diagonal().sum()) > 0


def test_the_inputs_gram_stays_one_tensor_of_those_who_share_it() -> None:
    model = zoo.llama()
    ids = torch.arange(20)[None]
    seen = with_fisher(model, lowrank.calibrate(model, [ids], progress=False))
    q, k = (seen.statistics[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.gram is k.gram
    assert q.out_gram.shape != k.out_gram.shape
    assert with_fisher(model, seen) is seen


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    model = zoo.bert().eval()
    ids = torch.randint(1, 60, (3, 8))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    name = "bert.encoder.layer.1.output.dense"
    found = []
    for batch in (padded, {"input_ids": ids[:, :5], "attention_mask": mask[:, :5]}):
        seen = with_fisher(model, lowrank.calibrate(model, [batch], progress=False), seed=1)
        found.append(seen.statistics[name].out_gram)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


# Refusals, after which the model is as before


def refused(model: nn.Module, data: Any) -> str:
    seen = calibration(model, data)
    with zoo.unchanged(model), pytest.raises(LowrankError) as caught:
        with_fisher(model, seen)
    return zoo.said(caught)


def test_what_cannot_be_run_backwards_is_refused() -> None:
    x, layer = torch.randn(8, 6), nn.Linear(6, 4)
    assert "need batches, not a callable" in refused(small(), lambda model: model(x))
    blind = zoo.Custom(lambda self, x: torch.no_grad()(self.a)(x), a=layer)
    assert refused(blind, x).startswith("no gradient flows from the predictions to any of 1 layers")
    words = zoo.Custom(lambda self, x: {"y": f"{self.a(x)}"}, a=layer)
    assert "expected logits or other outputs, got dict" in refused(words, x)


@pytest.mark.parametrize("outputs", [1, 5])
def test_values_give_the_metric_of_their_squared_error(outputs: int) -> None:
    """E[g gᵀ] = JᵀJ: for y = B a it is BᵀB at a, whatever the data."""
    generator = torch.Generator().manual_seed(0)
    b = nn.Linear(4, outputs, bias=False)
    model = zoo.Custom(
        lambda self, x: SimpleNamespace(last_hidden_state=self.b(self.a(x))), a=nn.Linear(6, 4), b=b
    )
    data = [torch.randn(500, 6, generator=generator) for _ in range(8)]
    seen = zoo.calibration(model, data)
    site = zoo.by_name(find_sites(model))["a"]
    gram, _ = fisher_of.gradient_moments(model, seen.batches, [site])["a"]
    want = (b.weight.T @ b.weight).double()
    torch.testing.assert_close(gram, want.detach(), rtol=0.1, atol=0.05)


def test_numbers_that_are_not_finite_are_refused() -> None:
    x, layer = torch.randn(8, 6), nn.Linear(6, 4)
    bad = zoo.Custom(lambda self, x: self.a(x) * torch.nan, a=layer)
    assert refused(bad, x).startswith("the model's logits hold NaN or Inf: check its")

    class Bend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * torch.inf

    bent = zoo.Custom(
        lambda self, x: self.b(Bend.apply(self.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 4)
    )
    assert refused(bent, x).startswith("a: the gradient at its output holds NaN or Inf")
