"""Controllers on a model that was compressed before: what they take, and how it is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import LowRankLinear, SparseDenseLinear, TuckerConv, is_factored
from lowrank.train import (
    DLRT,
    GBLR,
    NM,
    STF,
    CondLR,
    Cuttlefish,
    FrobeniusDecay,
    InRank,
    LoQT,
    LowRankCallback,
    Maestro,
    Pufferfish,
    TuckerDLRT,
)
from lowrank.train.parts.compressed import held_rank, matrix_of
from lowrank.train.parts.optimizer import check_same_parameters
from tests.nets import images, small_net
from tests.train.loops import Net, run, sgd
from tests.trainers import OURS, compressed, trainer
from tests.zoo import llama, make, tokens

IDS = tokens(2, 8)
# Every controller that takes such layers, with options under which ranks change in eight steps.
TAKE: dict[tuple[str, str], Callable[..., Any]] = {
    ("DLRT", "factors"): partial(DLRT, tolerance=0.2, every=2),
    ("DLRT", "pivoted"): partial(DLRT, tolerance=0.2, every=2),
    ("CondLR", "factors"): partial(CondLR, tau=1e3, tolerance=0.2, every=3),
    ("Maestro", "factors"): partial(Maestro, threshold=0.2),
    ("Maestro", "pivoted"): partial(Maestro, threshold=0.2),
    ("InRank", "factors"): partial(InRank, buffer=2, warmup=0, every=2, share=0.999),
    ("FrobeniusDecay", "factors"): FrobeniusDecay,
    ("GBLR", "factors"): partial(GBLR, ratio=0.3, steps=6),
    ("GBLR", "pivoted"): partial(GBLR, ratio=0.3, steps=6),
    ("NM", "factors"): partial(NM, decay=4, dense=2),
    ("STF", "coded"): partial(STF, every=2, freeze=6),
}
CHANGING = {
    *(("DLRT", "factors"), ("DLRT", "pivoted"), ("CondLR", "factors")),
    *(("Maestro", "factors"), ("Maestro", "pivoted"), ("InRank", "factors")),
}
REFUSE: dict[str, Callable[..., Any]] = {
    "LoQT": partial(LoQT, rank=4),
    "Cuttlefish": Cuttlefish,
    "Pufferfish": partial(Pufferfish, epochs=1),
    "STF": partial(STF, ratio=0.5),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def factored_ranks(model: nn.Module) -> dict[str, int]:
    return {name: m.rank for name, m in model.named_modules() if is_factored(m)}  # type: ignore[misc]


@pytest.mark.parametrize(("name", "form"), TAKE)
def test_the_callback_trains_a_compressed_model_that_loads_again(
    name: str, form: str, tmp_path: Path
) -> None:
    import transformers as tf

    compressed(form).save_pretrained(tmp_path / "compressed")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    before, ranks, seen = logits(model), factored_ranks(model), {}

    def build(model: Any, optimizer: Any) -> Any:
        controller = TAKE[name, form](model, optimizer, target_modules=OURS)
        seen["start"], seen["ranks"] = logits(model), controller.ranks
        model.train()
        return controller

    callback = LowRankCallback(build)
    decays = {"weight_decay": 0.0} if name == "FrobeniusDecay" else {}
    made = trainer(model, tmp_path / "run", callbacks=[callback], **decays)
    losses = [made.evaluate()["eval_loss"]]
    made.train()
    losses.append(made.evaluate()["eval_loss"])
    if name not in ("CondLR", "NM"):  # whose bound and mask move the weight
        assert float((seen["start"] - before).abs().max()) < 1e-5
    buffered = {n: min(rank + 2, 16) for n, rank in ranks.items()}
    own = buffered if name == "InRank" else ranks
    assert seen["ranks"] == {n: own[n] for n in seen["ranks"]}
    assert seen["ranks"].keys() == ranks.keys() or name == "STF"  # of one of the two sides
    assert losses[1] < losses[0]
    assert (callback.controller.ranks != seen["ranks"]) == ((name, form) in CHANGING)

    model = callback.controller.finish()
    check_same_parameters(made.optimizer, model)
    after = logits(model)
    assert float((after - before).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "stock")
    lowrank.save(model, tmp_path / "own")
    for again in (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "stock"),
        lowrank.from_pretrained(tmp_path / "own"),
    ):
        assert torch.equal(logits(again), after)
        assert factored_ranks(again) == factored_ranks(model)


@pytest.mark.parametrize("name", REFUSE)
def test_what_begins_dense_says_what_to_do(name: str) -> None:
    model = compressed()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    said = rf"nothing to adapt: .*q_proj \(it is a LowRankLinear, which {name} does not take: merge"
    with pytest.raises(LowrankError, match=said):
        REFUSE[name](model, optimizer, target_modules=OURS)
    assert logits(model).equal(logits(compressed()))
    model = lowrank.to_dense(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    assert len(REFUSE[name](model, optimizer, target_modules=OURS).layers) == 6


@pytest.mark.parametrize(
    "method", ["basis-sharing", "lowrank-sparse", "lowrank-masked", "dense-sparse"]
)
def test_other_forms_are_left_and_named(method: str) -> None:
    model = llama().eval()
    given = {"target_modules": r".*0\.self_attn\.[qkv]_proj", "progress": False}
    lowrank.compress(model, 0.6, data=[tokens(8, 32)], method=method, **given)
    lowrank.compress(model, 0.6, data=None, target_modules=r".*1\.mlp\.up_proj", progress=False)
    kept = {name: m for name, m in model.named_modules() if is_factored(m) and "self_attn" in name}
    assert len(kept) == 3
    controller = DLRT(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    reasons = {line["site"]: line["reason"] for line in controller.history if "reason" in line}
    assert all("merge it first (lowrank.to_dense), or leave it" in reasons[name] for name in kept)
    assert "model.layers.1.mlp.up_proj" in controller.ranks
    assert kept.keys().isdisjoint(controller.ranks)
    controller.finish()
    assert all(model.get_submodule(name) is module for name, module in kept.items())


def test_biases_and_layouts_stay() -> None:
    """GPT-2 stores its weights transposed, which merging restores."""
    model = make("gpt2")
    lowrank.compress(model, 0.6, data=None, target_modules=["c_fc"], progress=False)
    layer = model.transformer.h[0].mlp.c_fc
    bias, rank, dense = layer.bias, layer.rank, layer.dense_weight(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for controller in (DLRT, Maestro, InRank):
        control = controller(model, optimizer, target_modules=["c_fc"])
        layer = model.transformer.h[0].mlp.c_fc
        torch.testing.assert_close(layer.dense_weight(torch.float64), dense)
        assert layer.bias is bias
        model = control.finish()
        check_same_parameters(optimizer, model)
    layer = model.transformer.h[0].mlp.c_fc
    assert (type(layer), layer.rank) == (LowRankLinear, rank)
    assert type(lowrank.to_dense(model).transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


def test_a_run_on_a_compressed_model_resumes(tmp_path: Path) -> None:
    """From the Trainer's checkpoint, whose layers hold U S Vᵀ of other ranks."""

    def made(callback: Any, model: Any, optimizer: Any, **more: Any) -> Any:
        run = trainer(model, tmp_path, callbacks=[callback], **more)
        run.optimizer = optimizer
        return run

    def parts() -> tuple[Any, Any, Any]:
        model = compressed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, LowRankCallback(TAKE["DLRT", "factors"](model, optimizer))

    model, optimizer, callback = parts()
    saving = {"save_strategy": "steps", "save_steps": 5}
    made(callback, model, optimizer, **saving).train()
    unbroken = logits(callback.controller.finish())
    model, optimizer, callback = parts()
    start = callback.controller.ranks
    callback.resume(tmp_path / "checkpoint-5")
    assert callback.controller.ranks != start
    made(callback, model, optimizer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    torch.testing.assert_close(logits(callback.controller.finish()), unbroken)


def convolutions() -> tuple[Any, Any]:
    net, _ = lowrank.compress(small_net(), 0.6, data=None, method="tucker", progress=False)
    kept = {n: m.ranks for n, m in net.named_modules() if type(m) is TuckerConv}
    assert kept
    return net, kept


def test_tucker_convolutions_go_on_from_their_ranks(tmp_path: Path) -> None:
    net, held = convolutions()
    x = images(4)
    want = net(x).detach()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    controller = TuckerDLRT(net, optimizer, tolerance=0.1, every=2, min_rank=1)
    assert {name: controller.ranks[name] for name in held} == held
    for name in held:
        assert not any(type(m) is TuckerConv for m in controller.layers[name].modules())
    net.train()
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    net = controller.finish().eval()
    check_same_parameters(optimizer, net)
    assert not torch.allclose(net(x), want, atol=1e-3)
    lowrank.save(net, tmp_path)
    assert torch.equal(lowrank.load(tmp_path, small_net())(x), net(x))


def test_tucker_factors_are_taken_over_exactly() -> None:
    net, held = convolutions()
    x = images(4)
    want = net(x).detach()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    TuckerDLRT(net, optimizer, target_modules=list(held))
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)


def test_other_convolutions_are_named() -> None:
    net, _ = lowrank.compress(small_net(), 0.6, data=None, method="spatial", progress=False)
    kept = [name for name, m in net.named_modules() if is_factored(m)]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    with pytest.raises(LowrankError, match="which TuckerDLRT does not take: merge it first"):
        TuckerDLRT(net, optimizer, target_modules=kept)


def test_a_layer_with_hooks_is_left() -> None:
    model = compressed()
    layer = model.model.layers[0].self_attn.q_proj
    layer.up.register_forward_hook(lambda module, args, output: 2 * output)
    controller = Maestro(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    left = next(line for line in controller.history if line["site"].endswith("0.self_attn.q_proj"))
    assert left["reason"] == "it has hooks that a new layer would lose"
    assert model.model.layers[0].self_attn.q_proj is layer


def test_ranks_asked_for_never_exceed_those_that_are_there() -> None:
    ranks = factored_ranks(compressed())
    for options in ({"rank": 500}, {"rank": 1.0}, {"init": "random"}):
        model = compressed()
        controller = DLRT(model, torch.optim.SGD(model.parameters(), lr=1e-2), **options)
        assert {name: controller.ranks[name] for name in ranks} == ranks
    model = compressed()
    controller = DLRT(model, torch.optim.SGD(model.parameters(), lr=1e-2), rank=3)
    assert {controller.ranks[name] for name in ranks} == {3}


def test_one_controller_after_another() -> None:
    """What the first leaves is what the second begins with."""
    model = Net()
    optimizer = sgd(model)
    first = Maestro(model, optimizer, threshold=0.3, lasso=1e-2, rank=5)
    run(model, optimizer, first, 8)
    first.finish()
    ranks = factored_ranks(model)
    assert set(ranks) == {"first", "second"}
    weight = matrix_of(model.first)
    second = DLRT(model, optimizer)
    assert second.ranks == ranks
    torch.testing.assert_close(model.first.dense_weight(torch.float64), weight)
    run(model, optimizer, second, 8)
    second.finish()
    check_same_parameters(optimizer, model)


def test_the_rank_of_a_layer() -> None:
    layer = LowRankLinear(4, 3, 2)
    assert (held_rank(layer), held_rank(nn.Linear(4, 3))) == (2, None)
    assert matrix_of(layer).dtype == torch.float64
    assert matrix_of(nn.Linear(4, 3)).dtype == torch.float32


def test_stf_names_the_layers_that_are_coded_by_columns() -> None:
    model = compressed("coded")
    by_columns = {n for n, m in model.named_modules() if isinstance(m, SparseDenseLinear)}
    assert by_columns
    controller = STF(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    left = {line["site"]: line["reason"] for line in controller.history if "reason" in line}
    assert all("SparseDenseLinear, which STF does not take" in left[name] for name in by_columns)
    assert by_columns.isdisjoint(controller.ranks)
