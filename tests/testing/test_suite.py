"""The conformance suite bites: methods that break one law each are caught by that law."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.methods import SVD, Whitened
from lowrank.nn import LowRankLinear
from lowrank.testing import (
    CASES,
    check_laws,
    check_method,
    laws,
    linear_case,
    low_rank_weight,
)
from lowrank.testing.cases import MANY
from lowrank.testing.memo import snapshot
from lowrank.types import Cost, Curve, Option, Site, Statistics
from lowrank.walk import layouts


@dataclass(frozen=True)
class Broken(SVD):
    """Plain SVD with one thing wrong."""

    bend: Callable[[Curve], Curve] = lambda curve: curve
    spoil: Callable[[nn.Module, Any], Any] = lambda module, new: new
    choose: Callable[[Option], Option] = lambda option: option

    def curve(self, site: Site, stats: Statistics) -> Curve:
        return self.bend(super().curve(site, stats))

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> Any:
        return self.spoil(module, super().factor(module, self.choose(option), stats))


def options(change: Callable[[Option], Option]) -> Callable[[Curve], Curve]:
    def bend(curve: Curve) -> Curve:
        factored = tuple(change(option) for option in curve.options[:-1])
        return replace(curve, options=(*factored, curve.dense))

    return bend


def cost_of(option: Option, **other: int) -> Option:
    return replace(option, cost=replace(option.cost, **other))


def with_factors(new: LowRankLinear, down: torch.Tensor, up: torch.Tensor) -> LowRankLinear:
    return LowRankLinear.from_factors(down, up, new.bias)


def transpose_up(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    up = new.up.weight
    return with_factors(new, new.down.weight, up.T.reshape(up.shape))


def drop_bias(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return LowRankLinear.from_factors(new.down.weight, new.up.weight, None)


def zero_bias(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    bias = None if new.bias is None else torch.zeros_like(new.bias)
    return LowRankLinear.from_factors(new.down.weight, new.up.weight, bias)


def write_input(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    with torch.no_grad():
        layouts.matrix(module).mul_(1.0)  # the same bytes, but written
    return new


def train_input(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    module.train()
    return new


def share_bias(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    new.up.bias = module.bias
    return new


def draw(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    noise = torch.randn_like(new.up.weight) * 1e-9
    return with_factors(new, new.down.weight, new.up.weight + noise)


def turn_over(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return with_factors(new, new.down.weight.flip(0), new.up.weight.flip(1))


CALLS = itertools.count()


def count(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return with_factors(new, new.down.weight, new.up.weight + 1e-9 * next(CALLS))


def widen(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return new.float()


def view(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    new.up.weight = nn.Parameter(new.up.weight.T.contiguous().T)
    return new


def join(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    both = torch.cat([new.down.weight.flatten(), new.up.weight.flatten()]).detach()
    cut = new.down.weight.numel()
    new.down.weight = nn.Parameter(both[:cut].view_as(new.down.weight))
    new.up.weight = nn.Parameter(both[cut:].view_as(new.up.weight))
    return new


def scale_up(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return with_factors(new, new.down.weight, new.up.weight * 1.01)


def infinite(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return with_factors(new, new.down.weight, new.up.weight * float("inf"))


def kill(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
    return with_factors(new, new.down.weight * 0, new.up.weight * 0)


class Forgetful(LowRankLinear):
    """Its spec lacks the bias; its forward does something else than its dense weight."""

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "bias": False}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.relu())

    def cost(self) -> Cost:
        return Cost(1, 1, 1)


class Greedy(LowRankLinear):
    """Empty, it takes memory."""

    @classmethod
    def empty(cls, **spec: Any) -> Greedy:
        return cls(**spec)


def become(cls: type[nn.Module]) -> Callable[[nn.Module, nn.Module], nn.Module]:
    def spoil(module: nn.Module, new: nn.Module) -> nn.Module:
        new.__class__ = cls
        return new

    return spoil


def smaller(option: Option) -> Option:
    return replace(option, size=(max(1, option.size[0] - 1),))


def larger(option: Option) -> Option:
    return replace(option, size=(option.size[0] + 1,))


# What is wrong -> the law that has to notice.
BROKEN = {
    "transposed factor": ("exact", Broken(spoil=transpose_up)),
    "transposed factor, planted": ("planted", Broken(spoil=transpose_up)),
    "slightly wrong factor": ("exact", Broken(spoil=scale_up)),
    "slightly wrong factor, planted": ("planted", Broken(spoil=scale_up)),
    "dropped bias": ("forward", Broken(spoil=drop_bias)),
    "zero bias": ("forward", Broken(spoil=zero_bias)),
    "not nested": ("nested", Broken(spoil=turn_over)),
    "rank too small": ("cost", Broken(choose=smaller)),
    "rank too large": ("bound", Broken(choose=larger)),
    "another curve's sites": ("curve", Broken(bend=lambda c: replace(c, sites=("else",)))),
    "dense is missing": ("curve", Broken(bend=lambda c: replace(c, options=c.options[:-1]))),
    "total is off": ("curve", Broken(bend=lambda c: replace(c, total=c.total * 1.01))),
    "spectrum rises": ("curve", Broken(bend=lambda c: replace(c, spectrum=c.spectrum.flip(0)))),
    "error is NaN": ("curve", Broken(bend=options(lambda o: replace(o, error=float("nan"))))),
    "error is constant": ("curve", Broken(bend=options(lambda o: replace(o, error=0.1)))),
    "cost is constant": ("curve", Broken(bend=options(lambda o: cost_of(o, params=9)))),
    "error too small": ("exact", Broken(bend=options(lambda o: replace(o, error=o.error * 0.99)))),
    "below the optimum": ("bound", Broken(bend=options(lambda o: replace(o, error=o.error / 2)))),
    "no options": ("forward", Broken(bend=lambda c: replace(c, options=(c.dense,)))),
    "params miscounted": ("cost", Broken(bend=options(lambda o: cost_of(o, params=9)))),
    "bytes miscounted": ("cost", Broken(bend=options(lambda o: cost_of(o, bytes=9)))),
    "macs miscounted": ("macs", Broken(bend=options(lambda o: cost_of(o, macs=9)))),
    "module miscounts": ("cost", Broken(spoil=become(Forgetful))),
    "another forward": ("forward", Broken(spoil=become(Forgetful))),
    "a spec that lies": ("rebuilt", Broken(spoil=become(Forgetful))),
    "empty takes memory": ("rebuilt", Broken(spoil=become(Greedy))),
    "not contiguous": ("rebuilt", Broken(spoil=view)),
    "shared storage": ("rebuilt", Broken(spoil=join)),
    "input is written to": ("untouched", Broken(spoil=write_input)),
    "input's mode changes": ("untouched", Broken(spoil=train_input)),
    "bias is shared with the input": ("untouched", Broken(spoil=share_bias)),
    "global generator is used": ("untouched", Broken(spoil=draw)),
    "two runs differ": ("deterministic", Broken(spoil=draw)),
    "it counts its calls": ("deterministic", Broken(spoil=count)),
    "another dtype": ("dtype", Broken(spoil=widen)),
    "infinite": ("dtype", Broken(spoil=infinite)),
    "dead factors": ("gradients", Broken(spoil=kill)),
    "not a factored module": ("forward", Broken(spoil=lambda module, new: nn.Identity())),
}


@pytest.mark.parametrize("wrong", BROKEN)
def test_the_law_notices(wrong: str) -> None:
    law, method = BROKEN[wrong]
    check = laws()[law]
    check(SVD(), CASES["square"](dtype=torch.float64))
    with pytest.raises(AssertionError, match="square, float64"):
        check(method, CASES["square"](dtype=torch.float64))


def test_an_error_of_the_method_itself_is_passed_on_with_a_note() -> None:
    def fail(module: nn.Module, new: LowRankLinear) -> LowRankLinear:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        check_method(Broken(spoil=fail))
    (note,) = caught.value.__notes__
    assert "Broken fails under the law 'exact': wide, bfloat16: ZeroDivisionError()" in note
    assert "'curve'" not in note


def test_a_broken_law_hides_no_other() -> None:
    with pytest.raises(AssertionError) as caught:
        check_laws(Broken(spoil=drop_bias), CASES["wide"](dtype=torch.float32), laws())
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        ["Broken breaks the law 'forward'", "wide, float32, size (1,)"]
    ]
    both = Broken(spoil=scale_up, bend=options(lambda o: cost_of(o, macs=9)))
    with pytest.raises(AssertionError) as caught:
        check_laws(both, CASES["wide"](dtype=torch.float32), laws())
    assert re.findall(r"the law '(.*)'", str(caught.value)) == ["exact", "cost", "planted", "macs"]


@dataclass(frozen=True)
class Counting(SVD):
    """It writes down what it is asked for."""

    sizes: list[Any] = field(default_factory=list)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> Any:
        self.sizes.append(option.size)
        return super().factor(module, option, stats)


def test_every_module_is_made_once_for_all_laws_but_those_that_need_another_run() -> None:
    method, case = Counting(), CASES["wide"](dtype=torch.float32)
    chosen = laws()
    rest = {name: chosen.pop(name) for name in ("deterministic", "planted")}
    check_laws(method, case, chosen)
    every = [option.size for option, _ in case.built(method)]
    assert method.sizes == every
    check_laws(method, case, rest)
    assert method.sizes == [*every, *every, (2,)]
    for law in chosen.values():  # of a case of its own, a law makes its own
        method.sizes.clear()
        law(method, case.fresh())
        assert method.sizes in (every, [])


def test_of_a_long_curve_what_takes_long_looks_at_some_sizes_and_the_rest_at_all() -> None:
    case, every = linear_case("long", torch.eye(40, 44), dtype=torch.float32), range(1, 21)
    asked = {}
    for name in ("cost", "rebuilt", "gradients"):
        method = Counting()
        laws()[name](method, case)
        asked[name] = [size for (size,) in method.sizes]
    assert asked["cost"] == list(every)
    assert asked["rebuilt"] == asked["gradients"]
    assert set(asked["rebuilt"]) < set(every)
    assert len(asked["rebuilt"]) == MANY
    assert (asked["rebuilt"][0], asked["rebuilt"][-1]) == (1, 20)


@pytest.mark.parametrize("name", laws())
def test_a_law_leaves_the_modules_that_others_read_as_they_were(name: str) -> None:
    case, method = CASES["square"](dtype=torch.float32), SVD()
    modules = [new for _, new in case.built(method)]
    before = [snapshot(new, Statistics()) for new in modules]
    laws()[name](method, case)
    assert [new for _, new in case.built(method)] == modules
    after = [snapshot(new, Statistics()) for new in modules]
    for one, other in zip(before, after, strict=True):
        one.pop("the global generator"), other.pop("the global generator")
        assert one == other


@pytest.mark.parametrize("spoil", [write_input, train_input, share_bias, draw])
def test_what_was_made_for_another_law_was_watched_too(spoil: Any) -> None:
    method, case = Broken(spoil=spoil), CASES["square"](dtype=torch.float32)
    made = list(case.built(method))
    with pytest.raises(
        AssertionError, match=r"square, float32.* at size \(1,\)|size \(1,\): up.bias lies"
    ):
        laws()["untouched"](method, case)
    assert list(case.built(method)) == made


def test_a_weight_that_is_not_reproduced_is_named() -> None:
    case = CASES["wide"](dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"lacks the planted size \(9,\)"):
        laws(planted=low_rank_weight(9))["planted"](SVD(), case)


def test_traits_choose_the_laws() -> None:
    every = set(laws())
    assert every - set(laws(planted=None)) == {"planted"}
    assert every - set(laws(low_rank=False)) == {"bound"}
    assert every - set(laws(plain_products=False)) == {"macs"}


@dataclass(frozen=True)
class Odd(SVD):
    kinds = frozenset({"tensor train"})


@dataclass(frozen=True)
class Needy(SVD):
    needs = frozenset({"weather"})


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Broken(spoil=drop_bias), r"Broken breaks the law 'forward': wide, bfloat16, s"),
        (Broken(bend=lambda curve: replace(curve, norm="taxicab")), "no oracle .* 'taxicab'"),
        (Odd(), r"no case for the kinds \['tensor train'\]"),
        (Needy(), r"wide, bfloat16: the suite has no statistics \['weather'\]"),
    ],
)
def test_what_is_wrong_is_said_with_where(method: SVD, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_method(method)


def test_the_oracle_of_outputs_is_not_that_of_weights() -> None:
    """A method that claims the other's norm is caught: the cases' inputs are correlated."""

    @dataclass(frozen=True)
    class Liar(Whitened):
        def curve(self, site: Site, stats: Statistics) -> Curve:
            return replace(super().curve(site, stats), norm="weight")

    with pytest.raises(AssertionError, match="total"):
        laws()["curve"](Liar(), CASES["wide"](dtype=torch.float64))


def test_a_case_of_ones_own() -> None:
    weight = torch.eye(6, 9)
    case = linear_case("mine", weight, dtype=torch.float32, bias=False)
    assert case.name == "mine, float32"
    assert torch.equal(layouts.matrix(case.module), weight)
    assert case.site.shape == (6, 9)
    assert case.stats.gram is not None
    assert torch.allclose(case.stats.gram, case.inputs.double().T @ case.inputs.double() / 64)
