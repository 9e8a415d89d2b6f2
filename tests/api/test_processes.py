"""Compression by two processes: that of one, and the same on both."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration.digests import model_print
from lowrank.recover.recovery import Recovery
from lowrank.walk.surgery import factored
from tests.nets import images, small_net
from tests.processes import in_processes
from tests.zoo import VOCABULARY, make

pytestmark = pytest.mark.slow
CLOSE = 1e-5


def ids(rows: int = 96, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def padded() -> dict[str, Tensor]:
    mask = torch.ones(40, 12, dtype=torch.long)
    mask[::3, 8:] = 0
    return {"input_ids": ids(40), "attention_mask": mask}


def runs(model: nn.Module) -> None:
    model(ids(16))


STEPS = Recovery(block_steps=3, distill_steps=3)
# Name -> the model, its data, and the options of compress.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "fast": (lambda: make("llama"), lambda: list(ids().split(16)), {"effort": "fast"}),
    "whitened": (lambda: make("llama"), ids, {"method": "whitened", "target_modules": "all"}),
    "padded": (lambda: make("bert"), padded, {"effort": "fast"}),
    "experts": (lambda: make("mixtral"), ids, {"effort": "fast"}),
    "shared": (lambda: make("llama"), ids, {"method": "basis-sharing"}),
    "convolutions": (small_net, lambda: images(80), {"effort": "fast"}),
    "steps": (lambda: make("llama"), ids, {"effort": STEPS}),
    "callable": (lambda: make("llama"), lambda: runs, {"method": "whitened"}),
    "written": (lambda: make("llama"), lambda: "self", {"method": "whitened", "rows": 40}),
    "without data": (lambda: make("gpt2"), lambda: None, {}),
    "one row": (lambda: make("llama"), lambda: ids(1), {"method": "two-sided"}),
}


def compressed(name: str) -> dict[str, Any]:
    """What the options of a case make of its model."""
    model, data, options = CASES[name]
    small, report = lowrank.compress(model(), 0.6, data=data(), progress=False, **options)
    return {
        "ranks": {entry.name: (entry.method, entry.size) for entry in report.plan.entries},
        "weights": {n: f.dense_weight(torch.float64).detach() for n, f in factored(small).items()},
        "rest": {n: t for n, t in small.state_dict().items() if "running" in n or "norm" in n},
        "print": model_print(small),
        "notes": report.notes,
        "tokens": report.tokens,
    }


def swept() -> list[tuple[Any, ...]]:
    """Ratio, ranks and KL of each point."""
    sweep = lowrank.sweep(make("llama"), [0.8, 0.5], data=ids(), effort="fast", progress=False)
    points = sweep.points
    return [(p.ratio, [entry.size for entry in p.plan.entries], p.kl) for p in points]


def from_folder() -> tuple[str, list[str]]:
    """What a folder is compressed to, and the files that are there when the call returns."""
    folder = Path(os.environ["LOWRANK_FOLDER"])
    out = folder / "out"
    lowrank.compress(folder / "dense", 0.6, data=ids(), out=out, progress=False)
    return model_print(lowrank.from_pretrained(out)), sorted(p.name for p in folder.iterdir())


def applied() -> str:
    """What a plan makes that was made before, on a calibration that was."""
    model = make("llama")
    calibration = lowrank.calibrate(model, ids(), hold_out=1 / 8, progress=False)
    calibration = lowrank.with_fisher(model, calibration)
    plan = lowrank.plan(model, 0.6, data=calibration, effort="fast", progress=False)
    return model_print(lowrank.apply(model, plan, data=calibration, progress=False)[0])


def all_compressed() -> dict[str, Any]:
    """In each of two processes."""
    found: dict[str, Any] = {name: compressed(name) for name in CASES}
    return {**found, "swept": swept(), "folder": from_folder(), "applied": applied()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("folder")
    make("llama").save_pretrained(folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_FOLDER", str(folder))
        return in_processes(__name__, "all_compressed", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_what_one_makes(name: str, both: list[dict[str, Any]]) -> None:
    alone, (first, second) = compressed(name), (each[name] for each in both)
    assert first["print"] == second["print"]
    assert first["notes"] == second["notes"]
    assert first["ranks"] == alone["ranks"]
    assert first["tokens"] == alone["tokens"]
    assert first["weights"].keys() == alone["weights"].keys() != set()
    for kind in ("weights", "rest"):
        for key, tensor in alone[kind].items():
            apart = (first[kind][key] - tensor).double().norm()
            assert float(apart) <= CLOSE * float(tensor.double().norm()), key


def test_a_sweep_by_two_processes_is_that_of_one(both: list[dict[str, Any]]) -> None:
    assert both[0]["swept"] == both[1]["swept"]
    for (ratio, sizes, kl), alone in zip(both[0]["swept"], swept(), strict=True):
        assert (ratio, sizes) == alone[:2]
        assert kl == pytest.approx(alone[2], rel=1e-4)


def test_a_plan_is_applied_by_both(both: list[dict[str, Any]]) -> None:
    fast = {each["fast"]["print"] for each in both}
    assert fast == {each["applied"] for each in both}


def test_one_process_writes_and_both_find_the_folder(both: list[dict[str, Any]]) -> None:
    (first, names), second = both[0]["folder"], both[1]["folder"]
    assert names == ["dense", "out"]
    assert (first, names) == second
