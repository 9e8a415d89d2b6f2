"""Where layers stand on a map, from their names alone."""

from __future__ import annotations

import pytest

from lowrank.page.grid import grid_of, ranks_text
from lowrank.walk.layouts import kind
from tests.zoo import BUILDERS, make


def test_kinds_and_depths() -> None:
    names = [f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in ("attn.q", "mlp.up")]
    found = grid_of([*names, "head"])
    assert found.rows == ("q", "up", "head")
    assert found.columns == ("0", "1", "10", "")
    assert found.cells == ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 3))


def test_kinds_are_as_long_as_they_have_to_be() -> None:
    names = ["l.0.attn.out.dense", "l.0.out.dense", "l.0.mid.dense", "pool.dense"]
    assert grid_of(names).rows == ("attn.out.dense", "l.out.dense", "mid.dense", "pool.dense")


def test_names_of_numbers_or_of_nothing() -> None:
    assert grid_of(["0", "2", "4"]).columns == ("0", "2", "4")
    assert grid_of(["0", "2"]).rows == ("layer",)
    assert grid_of([""]).rows == ("(root)",)
    assert grid_of([]).cells == ()
    assert grid_of(["blocks.0.experts.3.up", "blocks.0.experts.11.up"]).rows == ("3.up", "11.up")


def test_experts_share_a_row_where_there_would_be_too_many() -> None:
    names = [f"l.{n}.{part}" for n in (0, 1) for part in ("q", "up.0", "up.1", "e.0.up", "e.1.up")]
    assert len(grid_of(names, most_rows=5).rows) == 5
    found = grid_of(names, most_rows=4)
    assert found.rows == ("q", "up.*", "e.*.up")
    members = found.members()
    assert members[1, 0] == [1, 2]
    assert members[2, 1] == [8, 9]
    assert sorted(i for found in members.values() for i in found) == list(range(10))


def test_ranks_of_a_cell() -> None:
    assert ranks_text([None, None]) == "–"
    assert ranks_text([(8,), None, (8,)]) == "8"
    assert ranks_text([(24,), (8,), (9,)]) == "8–24"
    assert ranks_text([(16, 4), (8, 12)]) == "8,12–16,4"


@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_has_a_cell_of_its_own(name: str) -> None:
    names = [n for n, module in make(name).named_modules() if kind(module)]
    found = grid_of(names)
    assert len(set(found.cells)) == len(names)
    assert len(set(found.rows)) == len(found.rows)
