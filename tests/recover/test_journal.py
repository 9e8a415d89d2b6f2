"""The journal gives back what was kept, and nothing that is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lowrank.nn import LowRankLinear
from lowrank.recover.journal import NAME, Journal


def factors(rank: int = 3) -> LowRankLinear:
    torch.manual_seed(rank)
    return LowRankLinear.from_factors(torch.randn(rank, 8), torch.randn(6, rank), torch.randn(6))


def test_layers_come_back_as_they_were(tmp_path: Path) -> None:
    layers = {"a.b": factors(), "a.c": factors(2)}
    Journal(tmp_path).keep_layers("a", layers, {"a.norm.weight": torch.ones(4)}, {"improved": True})
    found = Journal.read(tmp_path).layers("a")
    assert found is not None
    new, vectors, about = found
    assert [*new] == ["a.b", "a.c"]
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(new[name].state_dict()[key], tensor)
        assert new[name].rank == layer.rank
    assert torch.equal(vectors["a.norm.weight"], torch.ones(4))
    assert about == {"improved": True}
    assert Journal.read(tmp_path).layers("b") is None


def test_what_is_not_whole_was_not_finished(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.keep_layers("a", {"a.b": factors()}, {}, {})
    journal.keep_layers("c", {"c.b": factors()}, {}, {})
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    (tmp_path / NAME).write_text(lines[0] + lines[1][:-5])
    read = Journal.read(tmp_path)
    assert read.layers("a") is not None
    assert read.layers("c") is None
    file = tmp_path / json.loads(lines[0])["file"]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert read.layers("a") is None


def test_a_module_that_no_spec_describes_is_made_again(tmp_path: Path) -> None:
    Journal(tmp_path).keep_layers("a", {"a.b": nn.Linear(2, 2)}, {}, {})
    assert Journal.read(tmp_path).layers("a") is None
    assert list(tmp_path.iterdir()) == []
