"""Calibrations in files: what comes back is what went in, and other files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowrank
from lowrank import LowrankError
from tests import zoo


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return zoo.llama().eval()


def seen_by(model: nn.Module) -> lowrank.Calibration:
    ids = torch.randint(2, 60, (8, 12))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    batches = [ids, {"input_ids": ids, "attention_mask": mask}]
    seen = lowrank.calibrate(model, batches, hold_out=0.25, progress=False)
    return lowrank.with_fisher(model, seen)


@pytest.mark.parametrize("name", ["seen.safetensors", "seen"])
def test_everything_comes_back(model: nn.Module, tmp_path: Path, name: str) -> None:
    seen, path = seen_by(model), tmp_path / name
    for storage in ("factors", "pivoted"):
        lowrank.plan(model, 0.6, method="two-sided", data=seen, storage=storage, progress=False)
    lowrank.save_calibration(seen, path, model)
    back = lowrank.load_calibration(path, model)
    assert back.observation == seen.observation
    assert (back.tokens, back.min_tokens, back.source) == (seen.tokens, seen.min_tokens, "")
    for name, stats in seen.statistics.items():
        other = back.statistics[name]
        assert other.count == stats.count
        for key in ("gram", "mean", "freq", "out_gram", "row_fisher"):
            one, two = getattr(stats, key), getattr(other, key)
            assert one is two is None or torch.equal(one, two)
    assert back.spectra.keys() == seen.spectra.keys()
    assert len(seen.spectra) == 28
    for key, (stats, curve) in seen.spectra.items():
        again = back.spectra[key]
        assert again[0] is back.statistics[curve.sites[0]]
        assert again[1].options == curve.options
        assert (again[1].norm, again[1].total, again[1].exact) == (
            curve.norm, curve.total, curve.exact,
        )  # fmt: skip
        assert torch.equal(again[1].tails, curve.tails)
        assert again[0].count == stats.count
    plans = [
        lowrank.plan(model, 0.5, method="two-sided", data=each, progress=False)
        for each in (seen, back)
    ]
    assert plans[0] == plans[1]
    leans = [
        lowrank.compress(model, plans[0], data=each, copy=True, progress=False)[0]
        for each in (seen, back)
    ]
    ids = torch.arange(2, 14)[None]
    assert torch.equal(*(lean(input_ids=ids).logits for lean in leans))


def test_what_cannot_be_kept_is_refused(model: nn.Module, tmp_path: Path) -> None:
    ids = torch.randint(2, 60, (4, 8))
    seen = lowrank.calibrate(model, lambda m: m(input_ids=ids), progress=False)
    with pytest.raises(LowrankError, match="callable"):
        lowrank.save_calibration(seen, tmp_path / "a", model)
    seen = lowrank.calibrate(model, [{"input_ids": ids, "use_cache": False}], progress=False)
    with pytest.raises(LowrankError, match="only batches of tensors"):
        lowrank.save_calibration(seen, tmp_path / "a", model)
    with pytest.raises(LowrankError, match="no folder"):
        lowrank.save_calibration(seen_by(model), tmp_path / "none" / "a", model)


def test_other_files_stay(model: nn.Module, tmp_path: Path) -> None:
    foreign, text = tmp_path / "foreign.safetensors", tmp_path / "text"
    save_file({"a": torch.ones(2)}, foreign)
    text.write_text("words")
    for path in (foreign, text):
        content = path.read_bytes()
        with pytest.raises(LowrankError, match="not a lowrank calibration"):
            lowrank.save_calibration(seen_by(model), path, model)
        with pytest.raises(LowrankError, match="not a lowrank calibration"):
            lowrank.load_calibration(path, model)
        assert path.read_bytes() == content
    with pytest.raises(LowrankError, match="there is no calibration"):
        lowrank.load_calibration(tmp_path / "absent", model)


def test_it_belongs_to_its_weights(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "seen.safetensors"
    lowrank.save_calibration(seen_by(model), path, model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(LowrankError, match="another model, or other weights"):
        lowrank.load_calibration(path, model)


def test_a_folder_is_read_matrix_by_matrix(model: nn.Module, tmp_path: Path) -> None:
    """One file for each distinct input; a Gram matrix lies in its file's pages until it is used."""
    seen, path = seen_by(model), tmp_path / "seen"
    lowrank.save_calibration(seen, path, model)
    files = sorted(path.glob("statistics-*.safetensors"))
    assert len(files) == len({id(stats) for stats in seen.statistics.values()})
    back = lowrank.load_calibration(path, model)
    gram = next(stats.gram for stats in back.statistics.values() if stats.gram is not None)
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        start, end = gram.data_ptr(), gram.data_ptr() + gram.nbytes
        ranges = [line.split() for line in mapped.read_text().splitlines()]
        held = [
            line[-1]
            for line in ranges
            if int(line[0].split("-")[0], 16) <= start and end <= int(line[0].split("-")[1], 16)
        ]
        assert Path(held[0]) in files


def test_a_folder_is_replaced_whole(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "seen"
    lowrank.save_calibration(seen_by(model), path, model)
    before = set(path.iterdir())
    (path / "calibration.safetensors").unlink()  # killed before its end
    other = lowrank.calibrate(model, torch.arange(2, 18)[None], progress=False)
    lowrank.save_calibration(other, path, model)
    assert {file.name for file in set(path.iterdir()) & before} == {"calibration.safetensors"}
    back = lowrank.load_calibration(path, model)
    assert back.tokens == other.tokens


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_a_missing_or_damaged_matrix_is_told(model: nn.Module, tmp_path: Path, harm: Any) -> None:
    path = tmp_path / "seen"
    lowrank.save_calibration(seen_by(model), path, model)
    harm(next(path.glob("statistics-*.safetensors")))
    with pytest.raises(LowrankError, match="is missing or broken"):
        lowrank.load_calibration(path, model)


def test_a_folder_of_others_stays(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(LowrankError, match="is not a lowrank calibration"):
        lowrank.save_calibration(seen_by(model), tmp_path / "notes", model)
