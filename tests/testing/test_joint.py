"""The laws of joint methods bite: methods that break one law each are caught by that law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.methods import BasisSharing
from lowrank.nn import LowRankLinear, SharedLowRankLinear
from lowrank.testing import JOINT_CASES, JOINT_LAWS, check_joint_method
from lowrank.types import Curve, Option, Site, Statistics
from lowrank.walk import layouts

Modules = Sequence[nn.Module]


@dataclass(frozen=True)
class Broken(BasisSharing):
    """Basis sharing with one thing wrong."""

    bend: Callable[[Curve], Curve] = lambda curve: curve
    spoil: Callable[[Modules, list[Any]], list[Any]] = lambda modules, new: new

    def curve(self, sites: Sequence[Site], stats: Statistics) -> Curve:
        return self.bend(super().curve(sites, stats))

    def factor(self, modules: Modules, option: Option, stats: Statistics) -> Any:
        return self.spoil(modules, super().factor(modules, option, stats))


def scaled(curve: Curve) -> Curve:
    options = tuple(replace(o, error=1.1 * o.error) for o in curve.options)
    return replace(curve, options=options)


def cheap(**less: int) -> Callable[[Curve], Curve]:
    def bend(curve: Curve) -> Curve:
        costs = (replace(o.cost, **{k: getattr(o.cost, k) - n for k, n in less.items()})
                 for o in curve.options[:-1])  # fmt: skip
        options = [replace(o, cost=c) for o, c in zip(curve.options[:-1], costs, strict=True)]
        return replace(curve, options=(*options, curve.dense))

    return bend


def misplaced(modules: Modules, new: list[Any]) -> list[Any]:
    """The rows of `up` cut one row too late."""
    rows = torch.cat([each.up.weight for each in new]).roll(1, 0)
    for each, part in zip(new, rows.split([len(m.up.weight) for m in new]), strict=True):
        each.up.weight = nn.Parameter(part.detach().clone())
    return new


def biasless(modules: Modules, new: list[Any]) -> list[Any]:
    return [new[0], *(SharedLowRankLinear.from_factors(new[0], m.up.weight, None) for m in new[1:])]


def apart(modules: Modules, new: list[Any]) -> list[Any]:
    """A basis of their own for all."""
    return [LowRankLinear.from_factors(m.down.weight, m.up.weight, m.bias) for m in new]


def elsewhere(modules: Modules, new: list[Any]) -> list[Any]:
    """Bound to a copy of the owner that nobody stores."""
    stranger = LowRankLinear.from_factors(new[0].down.weight, new[0].up.weight, None)
    for each in new[1:]:
        each.bind(stranger)
    return new


def wide(modules: Modules, new: list[Any]) -> list[Any]:
    return [each.double() for each in new]


def written(modules: Modules, new: list[Any]) -> list[Any]:
    with torch.no_grad():
        layouts.matrix(modules[-1])[0, 0] += 1
    return new


def noisy(modules: Modules, new: list[Any]) -> list[Any]:
    with torch.no_grad():
        new[0].up.weight.mul_(1 + 1e-3 * torch.rand(()))
    return new


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("curve", {"bend": lambda c: replace(c, sites=c.sites[1:])}),
    "total": ("curve", {"bend": lambda c: replace(c, total=2 * c.total)}),
    "order": ("curve", {"bend": lambda c: replace(c, options=c.options[1::-1] + c.options[2:])}),
    "error": ("exact", {"bend": scaled}),
    "rows": ("planted", {"spoil": misplaced}),
    "params": ("cost", {"bend": cheap(params=1)}),
    "products": ("macs", {"bend": cheap(macs=1)}),
    "stored twice": ("cost", {"spoil": apart}),
    "computed twice": ("macs", {"spoil": elsewhere}),
    "wrong owner": ("gradients", {"spoil": elsewhere}),
    "no bias": ("forward", {"spoil": biasless}),
    "dtype": ("forward", {"spoil": wide}),
    "input": ("untouched", {"spoil": written}),
    "chance": ("deterministic", {"spoil": noisy}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_law_catches_it(what: str) -> None:
    law, wrong = BROKEN[what]
    case = JOINT_CASES["three"](dtype=torch.float32)
    JOINT_LAWS[law](BasisSharing(), case)
    with pytest.raises((AssertionError, RuntimeError)):
        JOINT_LAWS[law](Broken(**wrong), JOINT_CASES["three"](dtype=torch.float32))


def test_all_laws_in_one_call_and_the_law_is_named() -> None:
    with pytest.raises(AssertionError, match=r"Broken breaks the law 'exact': three, float64.*"):
        check_joint_method(Broken(bend=scaled), dtypes=[torch.float64])


@pytest.mark.parametrize("name", JOINT_LAWS)
def test_a_law_leaves_the_modules_that_others_read_as_they_were(name: str) -> None:
    case, method = JOINT_CASES["pair"](dtype=torch.float32), BasisSharing()
    modules = [each for _, new in case.built(method) for each in new]
    before = [[tensor.clone() for tensor in each.state_dict().values()] for each in modules]
    JOINT_LAWS[name](method, case)
    assert [each for _, new in case.built(method) for each in new] == modules
    for each, tensors in zip(modules, before, strict=True):
        assert all(map(torch.equal, each.state_dict().values(), tensors))


def test_what_was_made_for_another_law_was_watched_too() -> None:
    method, case = Broken(spoil=written), JOINT_CASES["three"](dtype=torch.float32)
    list(case.built(method))
    with pytest.raises(AssertionError, match=r"three, float32: .* layer2, weight at size \(1,\)"):
        JOINT_LAWS["untouched"](method, case)
