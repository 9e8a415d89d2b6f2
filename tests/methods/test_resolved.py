"""What a request's method makes of a site: its storage, the method of its kind, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from lowrank import Calibration, LowrankError
from lowrank.calibration.observation import Observation
from lowrank.methods import METHODS, SVD
from lowrank.methods.common import pivoted_curve
from lowrank.methods.resolved import Resolved, names_of, own_form
from lowrank.nn import LowRankLinear, PivotedLinear
from lowrank.testing import CASES, DTYPES, check_laws
from lowrank.types import Cost, Curve, Method, Option, Site, Statistics
from tests.roster import ROSTER

from .layers import at_rank, inputs, linear, ranks, site, statistics

LINEAR = [name for name in CASES if CASES[name](dtype=torch.float64).site.kind == "linear"]
METHODS_OF_LAYERS = [
    name for name, method in METHODS.items() if "linear" in method().kinds and not own_form(name)
]

# Of these nothing is known beyond the rank of their sketches, the largest that saves as factors.
SKETCHED = {"nystrom", "whitened-nystrom"}


@dataclass(frozen=True)
class Pivoted:
    """A method as a request for pivoted storage uses it."""

    method: Method

    @property
    def kinds(self) -> frozenset[str]:
        return self.method.kinds

    @property
    def needs(self) -> frozenset[str]:
        return self.method.needs

    def curve(self, site: Site, stats: Statistics) -> Curve:
        seen = Calibration({site.name: stats}, Observation((), (), ()), [], stats.count)
        return self._resolved().curve([site], seen)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        known = self._resolved().knowing([Curve((), (option,), 0.0, None, "", exact=False)])
        (new,) = known.factor([site(module)], option, stats)
        return new

    def _resolved(self) -> Resolved:
        return Resolved(self.method, storage="pivoted")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LINEAR)
def test_all_laws(case: str, dtype: torch.dtype) -> None:
    check_laws(Pivoted(SVD()), CASES[case](dtype=dtype), ROSTER["svd"])


@pytest.mark.parametrize("name", METHODS_OF_LAYERS)
def test_every_method_of_layers_gives_the_matrix_that_it_gave(name: str) -> None:
    layer, stats = linear(9, 14), statistics(inputs(14))
    gradients = inputs(9)
    stats = replace(
        stats,
        out_gram=gradients.T @ gradients / len(gradients),
        row_fisher=gradients.square().mean(0),
    )
    plain, stored = METHODS[name](), Pivoted(METHODS[name]())
    assert (stored.kinds, stored.needs) == (plain.kinds, plain.needs)
    before, after = plain.curve(site(layer), stats), stored.curve(site(layer), stats)
    most = ranks(before.options)[-1] if name in SKETCHED else 8
    assert ranks(after.options) == list(range(1, most + 1))
    assert [o.error for o in after.options[: len(before.options) - 1]] == [
        o.error for o in before.options[:-1]
    ]
    (known,) = names_of(Resolved(plain).for_kind("linear"))  # some leave layers to another method
    for option in after.options[:-1]:
        assert (option.method, option.storage) == (known, "pivoted")
        new = stored.factor(layer, option, stats)
        assert isinstance(new, PivotedLinear)
        assert new.cost() == option.cost
        want = plain.factor(layer, replace(option, storage="factors"), stats)
        assert isinstance(want, LowRankLinear)
        torch.testing.assert_close(new.dense_weight(), want.dense_weight(), rtol=0, atol=1e-11)
        direct = plain.factor(layer, option, stats)
        assert isinstance(direct, PivotedLinear), "rounded factors would be rounded once more"


def test_at_equal_cost_the_rank_is_higher() -> None:
    """Of a square matrix r(2n − r) = keep · n² at r = n(1 − √(1 − keep)), 38 % more at 0.8."""
    with torch.device("meta"):
        layer = nn.Linear(1000, 1000)
    falling = torch.arange(1000, -1, -1).double()
    whole = Cost(10**6, 4 * 10**6, 10**6)
    one = Option("m", (1,), "factors", Cost(2000, 8000, 2000), 999.0)
    dense = Option("dense", None, "dense", whole, 0.0)
    curve = Curve(("fc",), (one, dense), 1000.0, None, "weight", True, falling)
    found = pivoted_curve(curve, site(layer)).options[:-1]
    for keep in (0.8, 0.6, 0.4):
        rank = max(o.size[0] for o in found if o.size and o.cost.params <= keep * 10**6)
        assert rank == int(1000 * (1 - (1 - keep) ** 0.5)) > 1.12 * keep * 500
    assert found[-1].size == (968,)  # (1000 − r)² numbers are saved, 1000 indices are added


def test_without_tails_the_ranks_of_the_curve_are_priced_anew() -> None:
    layer = linear(9, 14)
    curve = SVD().curve(site(layer), Statistics())
    blind = pivoted_curve(replace(curve, tails=None), site(layer))
    assert ranks(blind.options) == ranks(curve.options) == [1, 2, 3, 4, 5]
    assert at_rank(blind, 5) == at_rank(pivoted_curve(curve, site(layer)), 5)
    assert at_rank(blind, 5).cost == Cost(5 * 18, 5 * 18 * 8 + 4 * 9, 5 * 18)


def test_the_order_of_the_features_is_counted() -> None:
    """In 16 bits, near full rank, it outweighs what is saved: those ranks are no options."""
    layer = linear(8, 8).bfloat16()
    found = Pivoted(SVD()).curve(site(layer), Statistics())
    assert ranks(found.options) == [1, 2, 3]  # rank 4: 48 numbers and 8 indices are 128 bytes
    assert [o.cost.bytes for o in found.options] == [62, 88, 110, 128]


def test_embeddings_and_layers_that_no_rank_makes_smaller_are_left_alone() -> None:
    case = CASES["embedding"](dtype=torch.float64)
    curve = SVD().curve(case.site, case.stats)
    assert Pivoted(SVD()).curve(case.site, case.stats).options == curve.options
    for shape in ((1, 9), (9, 1), (2, 2), (1, 1)):
        one = site(linear(*shape))
        assert [o.dense for o in Pivoted(SVD()).curve(one, Statistics()).options] == [True]


@dataclass(frozen=True)
class Foreign:
    """A method that knows nothing of storages."""

    gives: type[nn.Module] = LowRankLinear
    storage: str = "factors"
    kinds = frozenset({"linear"})
    needs = frozenset[str]()

    def curve(self, site: Site, stats: Statistics) -> Curve:
        curve = SVD().curve(site, stats)
        options = (replace(curve.options[1], storage=self.storage), curve.dense)
        return replace(curve, options=options, tails=None)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        plain = SVD().factor(module, replace(option, storage="factors"), stats)
        return plain if self.gives is LowRankLinear else self.gives()


def test_plain_factors_of_any_method_are_converted() -> None:
    layer, stored = linear(9, 14), Pivoted(Foreign())
    (option,) = stored.curve(site(layer), Statistics()).options[:-1]
    assert (option.size, option.storage) == ((2,), "pivoted")
    new = stored.factor(layer, option, Statistics())
    assert isinstance(new, PivotedLinear)
    want = Foreign().factor(layer, option, Statistics())
    torch.testing.assert_close(new.dense_weight(), want.dense_weight(), rtol=0, atol=1e-11)
    same = stored.factor(layer, replace(option, storage="factors"), Statistics())
    assert isinstance(same, LowRankLinear)


def test_what_is_no_plain_factor_is_refused() -> None:
    layer = linear(9, 14)
    with pytest.raises(LowrankError, match=r"fc: storage 'pivoted' needs .* stores 'own' of size"):
        Pivoted(Foreign(storage="own")).curve(site(layer), Statistics())
    other = Pivoted(Foreign(gives=nn.Identity))
    option = other.curve(site(layer), Statistics()).options[0]
    with pytest.raises(LowrankError, match="svd gives Identity: omit storage"):
        other.factor(layer, option, Statistics())


@pytest.mark.parametrize("bias", [True, False])
def test_several_ranks_are_cut_from_the_largest(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(12, 16, bias=bias)
    stats, place, sizes = statistics(inputs(16)), site(layer), (2, 6, 4, 6)
    resolved = Resolved(METHODS["whitened"]())
    curve = resolved.curve(
        [place], Calibration({place.name: stats}, Observation((), (), ()), [], stats.count)
    )
    resolved = resolved.knowing([curve])
    options = [at_rank(curve, rank) for rank in sizes]
    alone = [resolved.factor([place], option, stats)[0] for option in options]
    real, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: seen.append(m.shape) or real(m))
    each = resolved.factor_each([place], options, stats)
    assert seen == [(12, 12)]
    for rank, [new], other in zip(sizes, each, alone, strict=True):
        assert new.rank == rank
        torch.testing.assert_close(new.dense_weight(), other.dense_weight())
        assert (new.bias is None) == (not bias)
        assert not bias or torch.equal(new.bias, layer.bias)
    # Pivots are not nested: such layers are made one by one.
    seen.clear()
    pivoted = [replace(option, storage="pivoted") for option in options]
    made = [new for (new,) in resolved.factor_each([place], pivoted, stats)]
    assert [type(new) for new in made] == [PivotedLinear] * 4
    assert len(seen) == 3
