"""Forms of convolutions: planted ranks, what they are near to, and what data make nearer."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, linalg
from lowrank.linalg import tucker as numerics
from lowrank.methods import (
    CP,
    Channel,
    Spatial,
    Tubal,
    Tucker,
    TwoSided,
    TwoSidedConv,
    TwoSidedStored,
    TwoSidedTucker,
    WhitenedChannel,
    WhitenedConv,
    WhitenedSpatial,
    WhitenedTubal,
    WhitenedTucker,
)
from lowrank.methods.conv_forms import FORMS, Metric
from lowrank.nn import ChannelConv, SpatialConv, TubalConv, TuckerConv
from lowrank.testing import Case
from lowrank.testing.cases import conv_case
from lowrank.types import Cost, Option

from ..nets import images, small_net
from ..nn.convs import waves


def planted(outputs: int, inputs: int, taps: int, ranks: tuple[int, int], seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    parts = [(outputs, ranks[0]), (ranks[0], ranks[1], taps), (ranks[1], inputs)]
    return numerics.rebuilt(
        tuple(torch.randn(s, generator=rng, dtype=torch.float64) for s in parts)  # type: ignore[arg-type]
    )


def case_of(weight: Tensor) -> Case:
    return conv_case("planted", weight.flatten(1), dtype=torch.float64, kernel=(3, 3), padding=1)


@pytest.mark.parametrize("way", [Tucker(), WhitenedTucker(), TwoSidedTucker()])
def test_planted_ranks_are_found(way) -> None:
    case = case_of(planted(9, 6, 9, (3, 2)))
    curve = way.curve(case.site, case.stats)
    exact = next(o for o in curve.options if o.error < 1e-9 * curve.total)
    assert exact.size == (3, 2)
    new = way.factor(case.module, exact, case.stats)
    assert isinstance(new, TuckerConv)
    with torch.no_grad():
        torch.testing.assert_close(new(case.inputs), case.module(case.inputs))
        new.first.weight.copy_(new.first.weight.flip(0))  # swapped channels show
        off = (new(case.inputs) - case.module(case.inputs)).abs().max()
    assert float(off) > 1e-3


def test_alternation_is_no_worse_and_near_the_best() -> None:
    """HOOI ≤ HOSVD ≤ √2 · best; the best by HOOI from many random starts."""
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 6, 4, generator=rng, dtype=torch.float64)
    table = numerics.hosvd_errors(weight)
    for ranks in itertools.product((1, 3, 5), (2, 4)):

        def error(parts) -> float:
            return float((weight - numerics.rebuilt(parts)).square().sum())

        start = numerics.tucker_factors(weight, ranks, sweeps=0)
        assert error(start) == pytest.approx(float(table[ranks]), rel=1e-9)
        found = error(numerics.tucker_factors(weight, ranks, sweeps=50))
        assert found <= error(start) * (1 + 1e-12)
        best = min([found, *(from_random(weight, ranks, seed) for seed in range(12))])
        assert error(start) ** 0.5 <= 2**0.5 * best**0.5 + 1e-9


def from_random(weight: Tensor, ranks: tuple[int, int], seed: int) -> float:
    """HOOI in NumPy from random subspaces: squared error."""
    rng, whole = np.random.default_rng(seed), weight.numpy()
    into = np.linalg.qr(rng.normal(size=(whole.shape[1], ranks[1])))[0]
    for _ in range(60):
        half = np.einsum("oik,ij->ojk", whole, into).reshape(len(whole), -1)
        out = np.linalg.svd(half)[0][:, : ranks[0]]
        other = np.einsum("oik,op->ipk", whole, out).reshape(whole.shape[1], -1)
        into = np.linalg.svd(other)[0][:, : ranks[1]]
    core = np.einsum("oik,op,ij->pjk", whole, out, into)
    return float((whole**2).sum() - (core**2).sum())


def test_the_outputs_are_nearer_than_by_the_weight_and_by_channels() -> None:
    """Measured by the convolution itself, on the inputs that the Gram matrix is of."""
    net, x = small_net(), images(64)
    seen = lowrank.calibrate(net, [x], progress=False)
    name = "stage2.1.conv2"
    site = next(s for s in lowrank.walk.sites.find_sites(net) if s.name == name)
    stats, conv = seen.statistics[name], net.get_submodule(name)
    curves = {way: way.curve(site, stats) for way in (Tucker(), WhitenedTucker())}
    with torch.no_grad():
        read = (
            net.stage2[1]
            .bn1(net.stage2[1].conv1(net.stage2[0](net.stage1(net.stem(x).relu()))))
            .relu()
        )
        want = conv(read)
    off = {}
    for way, curve in curves.items():
        option = [o for o in curve.options if o.cost.params <= 0.5 * site.cost.params][-1]
        new = way.factor(conv, option, stats)
        with torch.no_grad():
            off[type(way).__name__] = float((new(read) - want).square().sum() / stats.count)
        if isinstance(way, WhitenedTucker):
            lost = linalg.squared_error(
                conv.weight.flatten(1), new.dense_weight(torch.float64), stats.gram
            )
            assert off["WhitenedTucker"] == pytest.approx(lost, rel=1e-3)
            assert 0.5 * option.error < lost <= option.error * (1 + 1e-6)  # the curve's is a bound
            rank = int(0.5 * site.cost.params) // sum(site.shape)
            channels = float(
                linalg.tails(linalg.energies(conv.weight.flatten(1), stats.gram))[rank]
            )
            assert option.error < channels
    assert off["WhitenedTucker"] < off["Tucker"]


def test_rows_and_columns_apart_are_found() -> None:
    """A planted weight is found exactly, by the weight and by the outputs."""
    rng = torch.Generator().manual_seed(3)
    up, down = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((9, 2, 3), (2, 6, 3)))
    case = case_of(torch.einsum("orb,ria->oiab", up, down).flatten(2))
    for way in (Spatial(), WhitenedSpatial(), WhitenedConv(), TwoSidedConv()):
        curve = way.curve(case.site, case.stats)
        exact = next(o for o in curve.options if o.error < 1e-9 * curve.total)
        assert (exact.storage, exact.size) == ("spatial", (2,)), way
        new = way.factor(case.module, exact, case.stats)
        assert isinstance(new, SpatialConv)
        torch.testing.assert_close(new(case.inputs), case.module(case.inputs))
        with torch.no_grad():
            new.up.weight.copy_(new.up.weight.flip(3))  # columns exchanged show
            off = (new(case.inputs) - case.module(case.inputs)).abs().max()
        assert float(off) > 1e-3


def test_the_mirror_image_is_found() -> None:
    """Few channels go into a kernel with many outputs: planted, it is found; and it is the optimum
    of a matrix by the weight."""
    rng = torch.Generator().manual_seed(5)
    core, first = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((12, 2, 9), (2, 8)))
    case = case_of(torch.einsum("ojk,ji->oik", core, first))
    for way in (Channel(), WhitenedChannel()):
        curve = way.curve(case.site, case.stats)
        exact = next(o for o in curve.options if o.error < 1e-9 * curve.total)
        assert (exact.storage, exact.size) == ("kernel-last", (2,)), way
        new = way.factor(case.module, exact, case.stats)
        assert isinstance(new, ChannelConv)
        assert new.wide == "last"
        torch.testing.assert_close(new(case.inputs), case.module(case.inputs))
    form, weight = FORMS["kernel-last"], torch.randn(5, 4, 3, 3, generator=rng).double()
    conv = nn.Conv2d(4, 5, 3).double()
    for (rank,), error in form.errors(weight, Metric()):
        new = form.build(conv, weight, (rank,), Metric())
        lost = float((weight.flatten(1) - new.dense_weight()).detach().square().sum())
        assert lost == pytest.approx(error, abs=1e-9)
        matrix = weight.permute(0, 2, 3, 1).flatten(0, 2)
        tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
        assert lost == pytest.approx(float(tail), abs=1e-9)


def test_few_frequencies_are_found() -> None:
    """Three components, two of the mean and one of the highest frequency, planted by NumPy."""
    rng = torch.Generator().manual_seed(6)
    up, down = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((9, 3), (3, 6)))
    taps = torch.from_numpy(waves((3, 3))[:, [0, 0, 8]])
    case = case_of(torch.einsum("or,ri,kr->oik", up, down, taps))
    for way in (Tubal(), WhitenedTubal()):
        curve = way.curve(case.site, case.stats)
        exact = next(o for o in curve.options if o.error < 1e-9 * curve.total)
        assert (exact.storage, exact.size) == ("tubal", (3,)), way
        assert exact.cost.macs == case.site.cost.macs
        new = way.factor(case.module, exact, case.stats)
        assert isinstance(new, TubalConv)
        assert new.ranks == (2, *[0] * 7, 1)
        torch.testing.assert_close(new(case.inputs), case.module(case.inputs))


def test_tubal_from_one_line_to_the_file_and_back(tmp_path: Path) -> None:
    """A refit keeps the form; groups are factored one by one; a pixel has one frequency."""
    torch.manual_seed(2)
    grouped = nn.Conv2d(16, 20, 3, padding=1, groups=2)
    net = nn.Sequential(nn.Conv2d(6, 16, 3), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(20, 24, 1))
    x = torch.randn(24, 6, 7, 7)
    small, report = lowrank.compress(
        net, 0.6, method="whitened-tubal", data=[x], effort="fast", policy="uniform", copy=True,
        target_modules="all", progress=False,
    )  # fmt: skip
    kinds = {name: type(module).__name__ for name, module in small.named_modules()}
    assert kinds["0"] == kinds["2.0"] == kinds["2.1"] == "TubalConv"
    assert kinds["4"] == "ChannelConv"
    assert any("3 convolutions are stored by frequency" in note for note in report.notes)
    assert any("refitted in closed form" in note for note in report.notes)
    lowrank.save(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(lowrank.load(tmp_path, copy.deepcopy(net))(x), small(x))
        dense = lowrank.to_dense(small)
        torch.testing.assert_close(dense(x), small(x), rtol=1e-4, atol=1e-5)
    assert type(dense[0]) is nn.Conv2d
    for asked, said in (
        ({"ratio": 0.5, "unit": "macs"}, "does not measure what method 'tubal' saves: .*'params'"),
        ({"rank": 8}, "whose size is not the rank of two factors: give a ratio"),
    ):
        with pytest.raises(LowrankError, match=said):
            lowrank.plan(net, method="tubal", data=None, progress=False, **asked)


def test_where_storage_alone_counts_frequencies_compete_too(tmp_path: Path) -> None:
    """No kernel has a nearer form without them; linear layers are those of `two-sided`."""
    case = case_of(torch.randn(9, 6, 9, generator=torch.Generator().manual_seed(4)).double())
    every, plain = (way.curve(case.site, case.stats) for way in (TwoSidedStored(), TwoSidedConv()))
    assert "tubal" in {option.storage for option in every.options}
    for option in plain.options:
        cost = option.cost.params
        assert option.error >= min(o.error for o in every.options if o.cost.params <= cost)
    assert TwoSidedStored(damp=0.5).for_kind("linear") == TwoSided(damp=0.5)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 24))
    asked = {"method": "two-sided-stored", "policy": "uniform", "target_modules": "all"}
    data = [torch.randn(24, 6, 7, 7)]
    plan = lowrank.plan(net, 0.4, data=data, progress=False, **asked)
    plan.save(tmp_path / "plan.json")
    again = lowrank.Plan.load(tmp_path / "plan.json")
    small, _ = lowrank.compress(net, again, data=data, copy=True, progress=False)
    assert [type(small[i]).__name__ for i in (0, 3)] == ["TubalConv", "LowRankLinear"]
    with pytest.raises(LowrankError, match="does not measure what method 'two-sided-stored' saves"):
        lowrank.plan(net, 0.4, unit="macs", data=data, progress=False, **asked)


def test_no_form_is_worse_than_its_curve_says() -> None:
    case = case_of(torch.randn(9, 6, 9, generator=torch.Generator().manual_seed(4)).double())
    for way in (
        Tucker(),
        Spatial(),
        CP(),
        Tubal(),
        WhitenedTubal(),
        WhitenedConv(),
        TwoSidedConv(),
        TwoSidedStored(),
    ):
        curve, seen = way.curve(case.site, case.stats), set()
        for option in curve.options[:-1]:
            new = way.factor(case.module, option, case.stats)
            weight, dense = case.module.weight.flatten(1), new.dense_weight(torch.float64)
            own = getattr(way, "error", None)
            gram = case.stats.gram if curve.norm == "output" else None
            off = own(case.module, dense, case.stats) if own else None
            off = linalg.squared_error(weight, dense, gram) if off is None else off
            assert off <= option.error * (1 + 1e-6) + 1e-9 * curve.total, (way, option)
            assert new.cost() == option.cost
            seen.add(option.storage)
        assert len(seen) > 1 or isinstance(way, Spatial | Tubal | WhitenedTubal), way


def test_what_is_no_form_of_a_kernel_is_refused() -> None:
    flat = conv_case("flat", torch.randn(9, 12), dtype=torch.float64, kernel=(1, 1))
    assert {o.storage for o in Spatial().curve(flat.site, flat.stats).options} == {
        "factors", "dense"
    }  # fmt: skip
    option = Option("spatial", (2,), "spatial", Cost(1, 1, 1), 0.0)
    with pytest.raises(LowrankError, match=r"\(1, 1\) has no spatial form: it is a matrix"):
        Spatial().factor(flat.module, option, flat.stats)
    case = case_of(torch.randn(9, 6, 9, dtype=torch.float64))
    with pytest.raises(LowrankError, match=r"spatial ranks must be \(rank,\) from 1 up to \(18,\)"):
        Spatial().factor(
            case.module, Option("spatial", (19,), "spatial", Cost(1, 1, 1), 0.0), case.stats
        )


def test_both_forms_stand_in_one_curve_and_matrices_have_one() -> None:
    case = case_of(torch.randn(9, 6, 9, dtype=torch.float64))
    curve = WhitenedTucker().curve(case.site, case.stats)
    assert {o.storage for o in curve.options} >= {"tucker", "dense"}
    flat = conv_case("flat", torch.randn(9, 12), dtype=torch.float64, kernel=(1, 1))
    curve = WhitenedTucker().curve(flat.site, flat.stats)
    assert {o.storage for o in curve.options} == {"factors", "dense"}


def test_ranks_and_fixed_ranks() -> None:
    case = case_of(torch.randn(9, 6, 9, dtype=torch.float64))
    bad = Option("tucker", (10, 2), "tucker", Cost(1, 1, 1), 0.0)
    with pytest.raises(LowrankError, match=r"up to \(9, 6\), got \(10, 2\)"):
        Tucker().factor(case.module, bad, case.stats)
    net, data = small_net(), [images(24)]
    lean, _ = lowrank.compress(
        net, rank=3, target_modules=["conv2"], data=data, copy=True, progress=False
    )
    assert [lean.get_submodule(f"stage1.{i}.conv2").rank for i in (0, 1)] == [3, 3]
    lean, report = lowrank.compress(
        net, 0.6, rank_pattern={"stage1.0.conv1": 4}, data=data, copy=True, progress=False
    )
    assert isinstance(lean.stage1[0].conv1, ChannelConv)
    assert lean.stage1[0].conv1.rank == 4
    others = {e.storage for e in report.plan.entries} - {"factors", "dense"}
    assert others <= {"tucker", "spatial"}
    assert others


def test_a_zero_weight_and_a_dead_input() -> None:
    for weight in (torch.zeros(6, 4, 9), torch.randn(6, 4, 9)):
        case = case_of(weight.double())
        case.stats.gram[:9] = 0
        case.stats.gram[:, :9] = 0
        curve = WhitenedTucker().curve(case.site, case.stats)
        for option in curve.options[:-1]:
            new = WhitenedTucker().factor(case.module, option, case.stats)
            assert all(bool(torch.isfinite(p).all()) for p in new.parameters())


def test_the_mutation_of_two_modes_fails() -> None:
    """The laws above can fail: `core` with its channels exchanged is another convolution."""
    case = case_of(planted(6, 6, 9, (3, 3)))
    option = Option("tucker", (3, 3), "tucker", Cost(1, 1, 1), 0.0)
    new = Tucker().factor(case.module, option, case.stats)
    with torch.no_grad():
        good = (new(case.inputs) - case.module(case.inputs)).abs().max()
        new.core.weight.copy_(new.core.weight.transpose(0, 1).clone())
        bad = (new(case.inputs) - case.module(case.inputs)).abs().max()
    assert float(good) < 1e-9 < 1e-3 < float(bad)


def test_full_ranks_are_the_convolution() -> None:
    for stride, padding, mode, bias in itertools.product(
        (1, 2), (0, 1, 2), ("zeros", "reflect", "circular"), (True, False)
    ):
        conv = nn.Conv2d(4, 5, 3, stride, padding, bias=bias, padding_mode=mode)
        new = TuckerConv.from_parts(conv, *numerics.tucker_factors(conv.weight.flatten(2), (5, 4)))
        x = torch.randn(2, 4, 7, 6)
        torch.testing.assert_close(new(x), conv(x), rtol=1e-5, atol=1e-5)
        again = TuckerConv.empty(**new.spec())
        again.load_state_dict(new.state_dict(), assign=True)
        assert torch.equal(again(x), new(x))
        assert new.cost().params == sum(
            p.numel() for n, p in new.named_parameters() if "bias" not in n
        )
