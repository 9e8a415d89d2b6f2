"""Entries that share one basis change together, by hand and in the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import lowrank
from lowrank import LowrankError, Plan
from tests.zoo import make, tokens

Q, K, V, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")


@pytest.fixture(scope="module")
def plan() -> Plan:
    data = [tokens()]
    return lowrank.plan(make("llama"), 0.6, method="basis-sharing", data=data, progress=False)


def by_name(plan: Plan) -> dict[str, Any]:
    return {entry.name: entry for entry in plan.entries}


def text_of(plan: Plan, change: Callable[[dict[str, Any]], object]) -> str:
    """The plan's JSON after a change to its entries, by name."""
    body = json.loads(plan.to_json())
    change({entry["sites"][0]: entry for entry in body["entries"]})
    return json.dumps(body)


def test_naming_one_changes_all(plan: Plan) -> None:
    found = by_name(plan.edit({V: 5}))
    assert [found[name].size for name in (Q, K, V)] == [(5,)] * 3
    assert [found[name].cost.params for name in (Q, K, V)] == [5 * (32 + 32), 5 * 16, 5 * 16]
    assert [found[name].cost.bytes for name in (Q, K, V)] == [4 * 5 * 64, 4 * 80, 4 * 80]
    assert [found[name].error for name in (Q, K, V)] == [None] * 3
    assert found[OUT] == by_name(plan)[OUT]
    assert plan.edit({V: 5, Q: 5}).entries == plan.edit({V: 5}).entries


def test_none_leaves_all_dense_and_apart(plan: Plan) -> None:
    edited = plan.edit({K: None})
    found = by_name(edited)
    assert [found[name].size for name in (Q, K, V)] == [None] * 3
    assert [found[name].group for name in (Q, K, V)] == [""] * 3
    again = by_name(edited.edit({K: 3}))[K]
    assert (again.method, again.storage, again.size) == ("whitened", "factors", (3,))
    assert Plan.from_json(edited.to_json()) == edited


def test_edits_that_cannot_be(plan: Plan) -> None:
    with pytest.raises(LowrankError, match=r"rank must be in \[1, 32\] for the rows of .*q_proj"):
        plan.edit({V: 22})  # 22 · (32 + 64) is more than 32 · 64
    assert by_name(plan.edit({V: 21}))[Q].size == (21,)
    with pytest.raises(LowrankError, match="conflicting ranks for"):
        plan.edit({Q: 4, V: 5})


def test_the_text_says_the_same(plan: Plan) -> None:
    def resize(entries: dict[str, Any], size: list[int] | None, names: tuple[str, ...]) -> None:
        for name in names:
            entries[name]["size"] = size

    text = text_of(plan, lambda e: resize(e, [5], (Q, K, V)))
    assert Plan.from_json(text).entries == plan.edit({Q: 5}).entries
    text = text_of(plan, lambda e: resize(e, None, (Q, K, V)))
    assert Plan.from_json(text).entries == plan.edit({Q: None}).entries
    for size in ([5], None):
        with pytest.raises(LowrankError, match="share one basis: they need one size"):
            Plan.from_json(text_of(plan, lambda e, s=size: resize(e, s, (K,))))
    for size in ([22], [0], [2, 2]):
        with pytest.raises(LowrankError, match="rank must be in"):
            Plan.from_json(text_of(plan, lambda e, s=size: resize(e, s, (Q, K, V))))
    with pytest.raises(LowrankError, match="basis belongs to 'elsewhere', which is not in this"):
        Plan.from_json(text_of(plan, lambda e: e[K].update(group="elsewhere")))
