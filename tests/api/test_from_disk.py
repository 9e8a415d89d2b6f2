"""From folder to folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank import LowrankError, Recovery
from lowrank.api import estimating, from_disk
from lowrank.linalg import mapped
from tests import zoo

RATIO = 0.6


def rows() -> list[torch.Tensor]:
    drawn = torch.randint(2, 61, (24, 16), generator=torch.Generator().manual_seed(0))
    return list(drawn.split(8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    zoo.make("llama").save_pretrained(folder)
    return folder


def compressed(source: Path, out: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"data": rows(), "effort": "fast", "progress": False, **options}
    return lowrank.compress(str(source), RATIO, out=out, **given)


def test_it_is_what_compression_in_memory_gives(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SMALL", 512)  # so that this model's tensors go to files
    report = compressed(source, tmp_path / "out")
    model = zoo.make("llama")
    lean, expected = lowrank.compress(model, RATIO, data=rows(), effort="fast", progress=False)
    assert [e.size for e in report.plan.entries] == [e.size for e in expected.plan.entries]
    assert report.achieved == expected.achieved
    loaded = lowrank.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(zoo.tokens()).logits, lean(zoo.tokens()).logits)
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["achieved"] == report.achieved
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


def test_an_older_result_stays_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compressed(source, out)
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(from_disk.io, "save", full)
        with pytest.raises(LowrankError, match="out cannot be written: No space left on device"):
            compressed(source, out, seed=1)
    assert (out / "model.safetensors").read_bytes() == before
    compressed(source, out, seed=1)  # what was finished is taken up
    assert (out / "model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "SMALL", 512)
    monkeypatch.setattr(mapped, "_allocate", full)
    with pytest.raises(LowrankError, match="No space left on device"):
        compressed(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="is the model's own folder"):
        compressed(source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(LowrankError, match="is a file, expected a folder"):
        compressed(source, tmp_path / "file")
    with pytest.raises(LowrankError, match=r"got str: .* say with out="):
        lowrank.compress(str(source), RATIO)
    with pytest.raises(LowrankError, match="out is for a model that is given as a folder"):
        lowrank.compress(zoo.make("llama"), RATIO, out=tmp_path / "out")
    with pytest.raises(LowrankError, match="ratio is the fraction kept"):
        lowrank.compress(str(tmp_path / "absent"), 2.0, out=tmp_path / "out")
    with pytest.raises(LowrankError, match="cannot load"):
        lowrank.compress(str(tmp_path / "absent"), RATIO, out=tmp_path / "out")


@pytest.mark.parametrize(("memory", "place"), [(1 << 19, "from disk"), (1 << 34, "in memory")])
def test_the_place_is_chosen_by_the_memory(
    monkeypatch: pytest.MonkeyPatch, memory: int, place: str
) -> None:
    monkeypatch.setattr(from_disk, "available_memory", lambda: memory)
    room = from_disk.room_for(zoo.make("llama"))
    assert str(room).startswith(place)
    assert room.in_memory == (place == "in memory")
    weights = sum(p.nbytes for p in zoo.make("llama").parameters())
    assert room.needed > 2 * weights


def test_memory_is_available() -> None:
    assert from_disk.available_memory() > 1 << 20


def test_distillation_says_what_memory_it_needs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "available_memory", lambda: 1000)
    with pytest.raises(LowrankError, match=r"distillation trains all factors at once, .* GiB"):
        compressed(source, tmp_path / "out", effort="best")
    assert list(tmp_path.iterdir()) == []
    compressed(source, tmp_path / "out", effort=Recovery(block_steps=2))


def test_a_model_in_memory_keeps_in_files_what_does_not_fit(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result."""
    given: dict[str, Any] = {"data": rows(), "effort": "fast", "progress": False}
    expected, _ = lowrank.compress(zoo.make("llama"), RATIO, **given)
    monkeypatch.setattr(mapped, "SMALL", 512)
    made = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: made.append(a) or from_file(*a, **k))
    lowrank.compress(zoo.make("llama"), RATIO, **given)
    assert made == []
    monkeypatch.setattr(from_disk, "available_memory", lambda: 1000)
    with monkeypatch.context() as patch:
        full = shutil.disk_usage(".")._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: full)
        lowrank.compress(zoo.make("llama"), RATIO, **given)
    assert made == []  # a full disk is no reason to fail
    with monkeypatch.context() as patch:
        patch.setattr(from_disk, "available_memory", lambda: 1 << 40)
        patch.setattr(from_disk, "SPILLED", 1000)
        lowrank.compress(zoo.make("llama"), RATIO, **given)
    assert made  # much is not kept in memory, however much of that there is
    made.clear()
    lean, _ = lowrank.compress(zoo.make("llama"), RATIO, **given)
    assert made
    assert not mapped.is_in_files()
    for one, two in zip(lean.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)
