"""Large tensors in files."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank.linalg.mapped import SMALL, give_back, in_files, kept, settled, zeros
from lowrank.plans.stages import anonymous_bytes

LARGE = SMALL // 8 + 1  # numbers of eight bytes


def mapped_bytes(folder: Path) -> int:
    """Bytes of this process that lie in (unnamed) files of a folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = (line.split()[0].split("-") for line in lines if str(folder) in line)
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def test_large_tensors_lie_in_files_without_names(tmp_path: Path) -> None:
    with in_files(tmp_path):
        held = zeros(LARGE, dtype=torch.float64)
        copy = kept(torch.arange(LARGE).double())
        assert mapped_bytes(tmp_path) >= 2 * SMALL
        assert not list(tmp_path.iterdir())
    held += copy  # they outlive the context
    assert torch.equal(held, torch.arange(LARGE).double())
    del held, copy
    assert mapped_bytes(tmp_path) == 0


def test_small_ones_stay_in_memory_and_so_do_all_outside(tmp_path: Path) -> None:
    small, large = torch.ones(4), torch.ones(LARGE).double()
    assert kept(large) is large
    with in_files(tmp_path):
        assert kept(small) is small
        with in_files(None):
            assert kept(large) is large
        assert kept(large) is not large
    assert kept(large) is large


def test_a_settled_module_is_the_same(tmp_path: Path) -> None:
    layer = nn.Linear(256, 256)
    weight, own = layer.weight, layer.weight.detach().clone()
    with in_files(tmp_path):
        assert settled(layer) is layer
    assert layer.weight is weight
    assert torch.equal(weight, own)
    assert mapped_bytes(tmp_path) >= SMALL


def test_a_full_or_missing_place_raises(tmp_path: Path) -> None:
    with in_files(tmp_path / "absent"), pytest.raises(OSError, match="absent"):
        zeros(LARGE, dtype=torch.float64)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such call")
def test_freed_memory_is_given_back(tmp_path: Path) -> None:
    with in_files(tmp_path):
        pieces = [torch.ones(1 << 18) for _ in range(100)]  # a mebibyte each: of the heap
        held = pieces[::10]  # the heap does not shrink by itself
        del pieces
        before = anonymous_bytes()
        give_back()
        assert before - anonymous_bytes() > 60 << 20
    assert all(bool((piece == 1).all()) for piece in held)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such call")
def test_a_settled_module_gives_back_what_making_it_took(tmp_path: Path) -> None:
    with in_files(tmp_path):
        pieces = [torch.ones(1 << 18) for _ in range(100)]
        held = pieces[::10]
        del pieces
        before = anonymous_bytes()
        settled(nn.Linear(8, 8))
        assert before - anonymous_bytes() > 60 << 20
    assert len(held) == 10
