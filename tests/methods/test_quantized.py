"""`quantized`: what its curves promise, what it makes, and that only bytes are its budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import Recovery
from lowrank.errors import LowrankError
from lowrank.methods import Auto, Quantized, TwoSided
from lowrank.methods.resolved import refitted_form
from lowrank.nn import QuantizedFactorsLinear, QuantizedLinear, QuantizedLowRankLinear
from lowrank.types import Cost, Option

from .layers import inputs, linear, site, two_sides

WHOLE, FACTORS, BOTH = "quantized", "quantized-factors", "quantized-lowrank"
NEAR = {WHOLE: (0.6, 1.1), FACTORS: (0.6, 1.1), BOTH: (0.4, 1.1)}  # refits may only help


def made(
    method: Quantized, storage: str, size: tuple[int, ...], layer: nn.Linear, stats: Any
) -> Any:
    return method.factor(layer, Option(WHOLE, size, storage, Cost(1, 1, 1), 0.0), stats)


@pytest.mark.parametrize("storage", NEAR)
def test_predictions_are_near_what_the_layers_show(storage: str) -> None:
    layer = linear(40, 56)
    stats, method = two_sides((40, 56)), Quantized(forms=(storage,))
    curve = method.curve(site(layer), stats)
    options = [option for option in curve.options if not option.dense]
    assert {option.storage for option in options} == {storage}
    assert len(options) > 8
    total = TwoSided().curve(site(layer), stats).total
    assert (curve.norm, curve.exact) == ("fisher", False)
    assert curve.total == pytest.approx(total)
    low, high = NEAR[storage]
    for option in (options[2], options[len(options) // 2], options[2 * len(options) // 3]):
        new: Any = method.factor(layer, option, stats)
        assert new.cost() == option.cost
        measured = method.error(layer, new.dense_weight(torch.float64), stats)
        assert low * option.error < measured < high * option.error


def test_the_mix_is_the_front_of_the_forms_by_bytes() -> None:
    layer, stats = linear(40, 56), two_sides((40, 56))
    every = {
        (o.cost.bytes, o.error)
        for form in NEAR
        for o in Quantized(forms=(form,)).curve(site(layer), stats).options
    }
    front = [(o.cost.bytes, o.error) for o in Quantized().curve(site(layer), stats).options]
    assert front == sorted(front)
    assert set(front) <= every
    for size, error in every:
        assert any(one <= size and other <= error for one, other in front)


def test_errors_that_are_carried_on_cost_less() -> None:
    layer, stats = linear(40, 56), two_sides((40, 56))
    errors = {}
    for name, method in {
        "nearest": Quantized(rounding="nearest"),
        "inputs": Quantized(two_sided=False),
        "both": Quantized(),
    }.items():
        new = made(method, WHOLE, (3, 56), layer, stats)
        errors[name] = Quantized().error(layer, new.dense_weight(torch.float64), stats)
    assert errors["nearest"] > 1.2 * errors["inputs"] > 1.2 * errors["both"]
    assert Quantized().needs == {"gram", "out_gram"}
    assert Quantized(two_sided=False).needs == {"gram"}
    curve = Quantized(two_sided=False).curve(site(layer), stats)
    assert curve.norm == "output"


def test_factors_take_what_integers_cannot_hold() -> None:
    """A few large directions beside noise: two bits alone are spent on the former."""
    layer, stats = linear(40, 56), two_sides((40, 56))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(40, 56, generator=torch.Generator().manual_seed(3)))
        layer.weight += 30 * layer.weight[:, :1] @ layer.weight[:1]
    method, errors = Quantized(), {}
    for storage, size in ((WHOLE, (3, 56)), (BOTH, (1, 8, 2, 56))):
        new = made(method, storage, size, layer, stats)
        errors[new.cost().bytes] = method.error(layer, new.dense_weight(torch.float64), stats)
    (alone_bytes, alone), (both_bytes, both) = errors.items()
    assert both_bytes < alone_bytes
    assert both < 0.5 * alone


def test_alternation_lowers_the_error() -> None:
    layer, stats = linear(40, 56), two_sides((40, 56))
    size, errors = (8, 8, 2, 56), []
    for rounds in (0, 3):
        new = made(Quantized(rounds=rounds), BOTH, size, layer, stats)
        errors.append(Quantized().error(layer, new.dense_weight(torch.float64), stats))
    assert errors[1] < 0.95 * errors[0]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16().eval()


def rows() -> list[torch.Tensor]:
    return list(
        torch.randn(256, 24, generator=torch.Generator().manual_seed(1)).bfloat16().split(64)
    )


KINDS = (QuantizedLinear, QuantizedFactorsLinear, QuantizedLowRankLinear)


def test_a_model_gets_as_small_as_asked() -> None:
    model = net()
    small, report = lowrank.compress(
        model, 0.25, method="quantized", unit="bytes", data=rows(), copy=True, progress=False,
        target_modules="all",
    )  # fmt: skip
    layers = [small[0], small[2]]
    assert all(isinstance(layer, KINDS) for layer in layers)
    held = [t for n, t in small.state_dict().items() if not n.endswith("bias")]
    stored = sum(t.numel() * t.element_size() for t in held)
    assert 0.2 < report.achieved <= 0.25
    assert stored == pytest.approx(report.achieved * 2 * (24 * 32 + 32 * 16))
    assert "ranks by spectrum" in str(report)
    shares = [float(entry.row()["kept"]) for entry in report.plan.entries]
    assert all(0.1 < share < 0.4 for share in shares)  # of bytes: those of parameters say nothing
    for site_ in report.sites:
        assert site_.measured == pytest.approx(site_.planned, rel=0.5)
    x = torch.cat(rows()).float()
    away = (copy.deepcopy(small).float()(x) - copy.deepcopy(model).float()(x)).norm()
    assert away < 0.2 * copy.deepcopy(model).float()(x).norm()


@pytest.mark.parametrize(
    ("method", "unit", "kind"),
    [("auto", "bytes", "quantized"), ("auto", "params", "auto"), (Auto(), "bytes", "auto")],
    ids=["auto, bytes", "auto, parameters", "Auto(), bytes"],
)
def test_auto_mixes_rank_and_bits_where_bytes_are_the_budget(
    method: Any, unit: Any, kind: str
) -> None:
    plan = lowrank.plan(net(), 0.5, method=method, unit=unit, data=rows(), progress=False)
    assert plan.settings["method"] == kind
    own = {WHOLE, FACTORS, BOTH} & {entry.storage for entry in plan.entries}
    assert bool(own) is (kind == "quantized")


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_other_units_do_not_measure_it(unit: Any) -> None:
    with pytest.raises(LowrankError, match=rf"unit='{unit}' does not measure .* unit='bytes'"):
        lowrank.plan(net(), 0.5, method="quantized", unit=unit, data=rows(), progress=False)


def test_a_refit_rounds_anew_to_the_inputs_of_the_compressed_model() -> None:
    layer, stats = linear(40, 56), two_sides((40, 56))
    x = inputs(56, tokens=400, seed=5)
    gram = x.T @ x / 400
    option = Option(WHOLE, (3, 56), WHOLE, Cost(1, 1, 1), 0.0)
    new = refitted_form(Quantized(), layer, option, gram, gram, out_gram=stats.out_gram)
    old = Quantized().factor(layer, option, stats)
    assert type(new) is type(old) is QuantizedLinear

    def error(one: Any) -> float:
        away = (layer.weight - one.dense_weight()).detach() @ x.T / 20
        return float((away.T @ stats.out_gram * away.T).sum())

    assert error(new) < 0.5 * error(old)


def test_recovery_takes_them() -> None:
    asked: dict[str, Any] = {"method": "quantized", "policy": "spectrum", "unit": "bytes"}
    asked |= {"data": [batch.float() for batch in rows()], "target_modules": "all"}
    made = [
        lowrank.compress(net().float(), 0.12, progress=False, effort=effort, **asked)
        for effort in (None, Recovery())
    ]
    (plain, _), (refitted, report) = made
    assert report.achieved <= 0.12
    assert [type(m) for m in plain] == [type(m) for m in refitted]
    codes = [model[2].state_dict() for model in (plain, refitted)]
    name = next(key for key in codes[0] if key.endswith("codes"))
    assert not torch.equal(codes[0][name], codes[1][name])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "form": ({"forms": ("whole",)}, "whole"),
    "no form": ({"forms": ()}, "form"),
    "rounding": ({"rounding": "up"}, "rounding"),
    "bits": ({"bits": (0,)}, r"bits must be integers in \[1, 8\], got \(0,\)"),
    "factor bits": ({"factor_bits": (16,)}, "factor_bits must be integers"),
    "groups": ({"groups": (-1,)}, "groups must be integers >= 0"),
    "rounds": ({"rounds": -1}, "rounds must be an integer >= 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be(case: str) -> None:
    options, said = BAD[case]
    with pytest.raises(LowrankError, match=said):
        Quantized(**options)


@pytest.mark.parametrize(
    ("storage", "size", "said"),
    [
        (WHOLE, (4,), r"expected a size \(bits, group\) for shape \(40, 56\), got \(4,\)"),
        (FACTORS, (41, 8), "rank, bits"),
        (BOTH, (2, 8, 0, 56), "rank, factor_bits, bits, group"),
        (WHOLE, (4, 57), "group in"),
        ("factors", (4,), "storage"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(storage: str, size: tuple[int, ...], said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        made(Quantized(), storage, size, linear(40, 56), two_sides((40, 56)))
