"""What an effort costs: sizes of decompositions, passes over the data; and that two runs agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import linalg
from lowrank.calibration import gradients as gradients_module
from lowrank.calibration.gathering import _Gather
from lowrank.calibration.gradients import Gradients

from .. import zoo

SPECTRAL = ("eigh", "eigvalsh", "eig", "eigvals", "svd", "svdvals")
OTHERS = ("qr", "cholesky", "cholesky_ex", "solve", "lstsq", "pinv", "inv", "lu_factor_ex")
ELSEWHERE = ("svd", "svd_lowrank", "pca_lowrank", "pinverse", "inverse", "qr", "lobpcg")
WIDE = {"hidden_size": 24, "intermediate_size": 80}  # q, o: 24 × 24; k, v: 12 × 24


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Counter[tuple[int, ...]]]]:
    """Shapes that every decomposition of torch is given, by its name."""
    seen: dict[str, Counter[tuple[int, ...]]] = {n: Counter() for n in (*SPECTRAL, *OTHERS)}
    elsewhere: Counter[str] = Counter()

    def spy(name: str, real: Any) -> Any:
        def call(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name][tuple(matrix.shape)] += 1
            return real(matrix, *args, **kwargs)

        return call

    def banned(name: str) -> Any:
        return lambda *_, **__: elsewhere.update([name])

    with monkeypatch.context() as patch:
        for name in (*SPECTRAL, *OTHERS):
            patch.setattr(torch.linalg, name, spy(name, getattr(torch.linalg, name)))
        for name in ELSEWHERE:
            patch.setattr(torch, name, banned(name))
        yield seen
    assert not elsewhere, "a decomposition outside torch.linalg is not counted"


def shapes_of(model: nn.Module, report: lowrank.Report) -> list[tuple[int, int]]:
    return [entry.shape for entry in report.plan.entries if entry.target]


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
def test_eigenproblems_are_on_the_smaller_side(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every layer, the wide down projection's 80 inputs included."""
    model = zoo.llama(**WIDE).eval()
    with watched(monkeypatch) as seen:
        _, report = lowrank.compress(
            model, 0.5, data=zoo.tokens(16, 12), effort="fast", storage=storage, progress=False
        )
    shapes = shapes_of(model, report)
    assert (24, 80) in shapes
    sides = Counter(min(shape) for shape in shapes)
    assert sides == {24: 10, 12: 4}
    # One for each curve, then those of the layers that are made: all of their own size.
    assert seen["eigvalsh"] == {(side, side): count for side, count in sides.items()}
    assert set(seen["eigh"]) == {(24, 24), (12, 12)}
    assert not any(seen[name] for name in SPECTRAL if name not in ("eigvalsh", "eigh"))


def test_what_is_decomposed_on_the_larger_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cholesky of G (out, out) and of H' (in, in): neither has a smaller form. Nothing else."""
    model = zoo.llama(**WIDE).eval()
    with watched(monkeypatch) as seen:
        _, report = lowrank.compress(
            model, 0.5, data=zoo.tokens(16, 12), effort="fast", storage="factors", progress=False
        )
    large = {name: [s for s in sizes if min(s) > 24] for name, sizes in seen.items()}
    assert {name for name, sizes in large.items() if sizes} == {"cholesky_ex"}
    assert set(large["cholesky_ex"]) == {(80, 80)}
    assert not seen["solve"] + seen["inv"] + seen["pinv"] + seen["lstsq"]
    # A tall layer's QR is thin.
    assert {min(shape) for shape in seen["qr"]} <= {12, 24}
    factored = {e.name for e in report.plan.entries if e.size}
    assert any(name.endswith("down_proj") for name in factored)


@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (24, 24)])
@pytest.mark.parametrize("sided", [False, True])
def test_a_refit_decomposes_one_matrix_of_its_smaller_side(
    shape: tuple[int, int], sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(200, shape[1], generator=generator, dtype=torch.float64)
    y = x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    root = torch.eye(shape[0], dtype=torch.float64) if sided else None
    with watched(monkeypatch) as seen:
        linalg.refit_factors(weight, 5, y.T @ y, x.T @ y, root=root)
    assert seen["eigh"] == {(24, 24): 1}
    assert seen["cholesky_ex"] == {(shape[1], shape[1]): 1}
    assert seen["qr"] == ({shape: 1} if shape[0] > shape[1] else {})
    counted = ("eigh", "cholesky_ex", "qr")
    assert not any(sizes for name, sizes in seen.items() if name not in counted)


# Two runs, and two ratios of one calibration


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_the_same_seed_gives_the_same_bits(kind: str) -> None:
    data = zoo.tokens(16, 12)
    if kind == "vit":
        data = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    with one_thread():
        for noise in (1, 2):
            torch.manual_seed(noise)  # the caller's own random state says nothing
            lean, report = lowrank.compress(
                zoo.make(kind), 0.6, data=data, effort="fast", seed=7, progress=False
            )
            found.append((lean.state_dict(), [e.size for e in report.plan.entries], report.notes))
    (first, *told), (second, *again) = found
    assert told == again
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often statistics were gathered, and backward passes were made."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    count(_Gather, "__enter__", "grams")
    count(Gradients, "__enter__", "gradients")
    count(gradients_module, "cross_entropy", "losses")
    count(torch.Tensor, "backward", "backwards")
    return found


def forwards_of(model: nn.Module) -> list[int]:
    """Rows of every forward pass from now on."""
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: rows.append(len((args or (kwargs["input_ids"],))[0])),
        with_kwargs=True,
    )
    return rows


def test_one_calibration_serves_every_ratio(passes: Counter[str]) -> None:
    model = zoo.make("llama")
    seen = zoo.calibration(model, zoo.tokens(16, 12), hold_out=0.25)
    seen = lowrank.with_fisher(model, seen, seed=0)
    once = dict(passes)
    # Gradients flow back through what comes after the blocks, and through each of the two.
    assert once == {"grams": 1, "gradients": 3, "losses": 1, "backwards": 3}
    had = {name: stats.gram for name, stats in seen.statistics.items()}
    grams = {name: gram.clone() for name, gram in had.items() if gram is not None}
    stored = []
    for ratio in (0.7, 0.5, 0.3):
        lean, report = lowrank.compress(
            model, ratio, data=seen, effort="fast", copy=True, progress=False
        )
        assert dict(passes) == once
        assert report.achieved <= ratio
        assert any(note.startswith("refitted in closed form") for note in report.notes)
        stored.append(zoo.numbers(lean))
    assert stored == sorted(stored, reverse=True)
    assert len(set(stored)) == 3
    assert all(torch.equal(seen.statistics[name].gram, gram) for name, gram in grams.items())
    again, _ = lowrank.compress(model, 0.3, data=seen, effort="fast", copy=True, progress=False)
    pairs = zip(again.parameters(), lean.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_plans_of_a_calibration_run_nothing() -> None:
    """Where nothing is compared: the statistics alone decide."""
    model = zoo.make("llama")
    seen = lowrank.with_fisher(model, zoo.calibration(model, zoo.tokens(16, 12)))
    rows = forwards_of(model)
    for ratio in (0.7, 0.5):
        lowrank.plan(model, ratio, data=seen, effort="fast", policy="uniform", progress=False)
        lowrank.plan(model, ratio, data=seen, method="two-sided", policy="uniform", progress=False)
    assert rows == []
    lowrank.plan(model, 0.5, data=zoo.tokens(4), method="two-sided", progress=False)
    assert rows  # the count can fail
