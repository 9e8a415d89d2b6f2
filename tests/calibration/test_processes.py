"""What several processes share: sums, results and errors are the same on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank
from lowrank.calibration.fisher import with_fisher
from lowrank.calibration.processes import (
    agreed,
    alone,
    check_same,
    dealt,
    from_first,
    gathered,
    in_step,
    is_main,
    mine,
    rank,
    summed,
    world,
)
from lowrank.errors import LowrankError
from tests.processes import in_processes
from tests.zoo import mlp

WORLD = 3  # more than there are batches in some of what follows
FIRST = 16 + 26  # rows that all run: to see the order of calls, and whether rows are independent


def said(call: Callable[[], object]) -> str:
    """What an error says, and of which type it is."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def net() -> nn.Module:
    """Two layers behind a table; the second is called for rows of an odd first id alone."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.second = nn.Embedding(50, 8), mlp(8, 8), mlp(8, 5)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.first(self.table(ids)).relu()
            return self.second(hidden) if bool(ids[0, 0] % 2) else hidden[..., :5]

    torch.manual_seed(0)
    return Odd().eval()


def rows(count: int) -> list[Tensor]:
    """Batches of 16 rows, of which the first alone has an odd first id."""
    ids = torch.randint(0, 50, (count, 4), generator=torch.Generator().manual_seed(0))
    ids[::16, 0] = 2 * ids[::16, 0] % 50
    ids[0, 0] = 7
    return list(ids.split(16))


def statistics(data: Any) -> tuple[dict[str, dict[str, Any]], int]:
    """Those of `net`, with the Fisher, and how many rows this process ran."""
    model, seen = net(), 0

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(args[0])

    model.register_forward_pre_hook(count)
    calibration = lowrank.calibrate(model, data, progress=False)
    run, seen = seen, 0
    if not callable(data):
        calibration = with_fisher(model, calibration)
    return {name: dict(vars(stats)) for name, stats in calibration.statistics.items()}, run


class Sick(nn.Module):
    """Gives NaN, or an error of Python's, for rows that begin with a number."""

    def __init__(self, error: bool) -> None:
        super().__init__()
        self.layers, self.error = mlp(8, 8, 5), error

    def forward(self, x: Tensor) -> Tensor:
        if self.error and bool((x[:, 0] == 9).any()):
            raise ZeroDivisionError("nine")
        return self.layers(x.masked_fill(x == 9, float("nan")))


def sick(error: bool) -> str:
    data = torch.ones(48, 8).split(16)
    data[1][3, 0] = 9  # the second process has this batch
    return said(lambda: lowrank.calibrate(Sick(error), list(data), progress=False))


def by_itself() -> None:
    """Would wait for the others, which do not come."""
    with alone():
        assert world() == 1
        lowrank.compress(mlp(8, 8), 0.7, data=torch.ones(4, 8), progress=False)
    assert world() == WORLD


def work() -> dict[str, Any]:
    """In each of several processes."""
    number = rank()
    torch.manual_seed(0)
    numbers = torch.randn(world(), 257, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (257,))
    total, first = numbers[number].clone(), nn.Parameter(torch.full((3,), float(number)))
    summed(total)
    from_first([first])

    def fail() -> int:
        return number if number != 1 else 1 // 0

    model = mlp(4, 4)
    other = mlp(4, 4)
    nn.init.constant_(other[0].weight, number)
    return {
        "number": (number, world(), is_main()),
        "mine": mine(range(8)),
        "numbers": numbers,
        "total": total,
        "first": first.detach(),
        "gathered": gathered(number),
        "agreed": agreed(f"of {number}"),
        "dealt": list(dealt((lambda i=i: (i, rank())) for i in range(5))),
        "failed": said(lambda: in_step(fail)),
        "unsent": said(lambda: in_step(lambda: fail if number == 1 else 0)),
        "sixteen": statistics(rows(80)),
        "one": statistics(rows(16)[0]),
        "callable": statistics(lambda m: [m(batch) for batch in rows(80)]),
        "nan": sick(error=False),
        "error": sick(error=True),
        "data": said(lambda: lowrank.calibrate(net(), rows(80 - 16 * number), progress=False)),
        "calls": said(
            lambda: lowrank.calibrate(net(), lambda m: m(rows(16)[0][number:]), progress=False)
        ),
        "ratio": said(lambda: lowrank.plan(model, 0.5 + number / 10, data=None)),
        "sets": said(lambda: lowrank.plan(model, 0.5, data=None, target_modules={*"0abcdef"})),
        "model": said(lambda: lowrank.plan(other, 0.5, data=None)),
        "wrapped": said(lambda: lowrank.plan(DistributedDataParallel(mlp(4, 4)), 0.5, data=None)),
        "same": said(lambda: check_same(x=1)),
        "alone": said(by_itself) if number == 0 else "",
        "by design": said(lambda: lowrank.factorize_by_design(other, 0.5)),
    }


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(__name__, "work", tmp_path_factory.mktemp("several"), WORLD)


@pytest.mark.slow
def test_sums_and_results_are_those_of_all(every: list[dict[str, Any]]) -> None:
    assert [each["number"] for each in every] == [(i, WORLD, i == 0) for i in range(WORLD)]
    assert [each["mine"] for each in every] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    for each in every:
        assert torch.equal(each["total"], every[0]["total"])
        torch.testing.assert_close(each["total"], each["numbers"].sum(0), rtol=1e-14, atol=0)
        assert torch.equal(each["first"], torch.zeros(3))
        assert each["gathered"] == [0, 1, 2]
        assert each["agreed"] == "of 0"
        assert each["dealt"] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "shares"),
    [
        ("sixteen", lambda: rows(80), [FIRST + 32, FIRST + 32, FIRST + 16]),
        ("one", lambda: rows(16)[0], [FIRST + 16, FIRST, FIRST]),
        ("callable", lambda: lambda m: [m(batch) for batch in rows(80)], [160] * 3),
    ],
)
def test_statistics_are_those_of_one_process(
    name: str, data: Callable[[], Any], shares: list[int], every: list[dict[str, Any]]
) -> None:
    alone, _ = statistics(data())
    assert [each[name][1] for each in every] == shares
    for each in every:
        found = each[name][0]
        assert found.keys() == alone.keys()
        for site, stats in alone.items():
            for key, value in stats.items():
                if isinstance(value, Tensor):
                    assert torch.equal(found[site][key], every[0][name][0][site][key]), (site, key)
                    torch.testing.assert_close(found[site][key], value, rtol=1e-12, atol=1e-14)
                else:
                    assert found[site][key] == value, (site, key)


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_by_all(every: list[dict[str, Any]]) -> None:
    own = "ZeroDivisionError: integer division or modulo by zero"
    sent = f"LowrankError: process 1: {own}"
    assert [each["failed"] for each in every] == [sent, own, sent]
    assert all("fail" in each["unsent"] for each in every)  # a function that has no address
    assert every[0]["unsent"].startswith("LowrankError: process 1: ")
    assert len({each["nan"] for each in every}) == 1
    assert every[0]["nan"].startswith("LowrankError: layers.0: its input holds NaN")
    assert [each["error"] for each in every] == [
        "LowrankError: process 1: ZeroDivisionError: nine",
        "ZeroDivisionError: nine",
        "LowrankError: process 1: ZeroDivisionError: nine",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "calls", "ratio", "model", "wrapped"])
def test_what_the_processes_must_have_in_common(what: str, every: list[dict[str, Any]]) -> None:
    assert {each["same"] for each in every} == {""}
    assert not any("differs" in each["sets"] for each in every)  # in another order on each
    assert len({each[what] for each in every}) == 1
    name = {"calls": "data"}.get(what, what)
    start = f"LowrankError: {name} differs between the processes ("
    if what == "wrapped":
        start = "LowrankError: the model is wrapped in DistributedDataParallel"
    assert every[0][what].startswith(start), every[0][what]


@pytest.mark.slow
def test_a_process_may_work_by_itself(every: list[dict[str, Any]]) -> None:
    assert {each["alone"] for each in every} == {each["by design"] for each in every} == {""}


def test_one_process_is_a_world_of_its_own() -> None:
    assert (rank(), world(), is_main()) == (0, 1, True)
    assert mine(range(3)) == [0, 1, 2]
    tensor, value = torch.ones(2), object()
    summed(tensor)
    from_first([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert gathered(value)[0] is agreed(value) is value
    done: list[int] = []
    results = dealt((lambda i=i: done.append(i)) for i in range(3))
    next(results)
    assert done == [0]  # one after the other: what is made can be put in place between
    with pytest.raises(ZeroDivisionError):
        in_step(lambda: 1 // 0)
    with pytest.raises(LowrankError, match="once"):
        in_step(lambda: (_ for _ in ()).throw(LowrankError("once")))
    check_same(data=object())
