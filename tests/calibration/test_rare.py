"""Experts that saw few tokens borrow from their siblings."""

from __future__ import annotations

import torch

import lowrank
from lowrank.calibration.rare import routed, shrink, weight_of
from lowrank.types import Statistics
from lowrank.walk.parts import separate_parts

from .. import zoo

CHAINS = [["layers.0", "layers.1"]]


def test_layers_of_which_siblings_see_other_counts_are_routed() -> None:
    counts = {f"layers.{i}.experts.{e}.up": 5 + e for i in range(2) for e in range(3)}
    counts |= {f"layers.{i}.heads.{h}": 9 for i in range(2) for h in range(2)}
    counts |= {"layers.0.q": 9, "layers.1.q": 4}  # merged in between: no siblings
    groups = routed(counts, CHAINS)
    assert groups == [[f"layers.{i}.experts.{e}.up" for e in range(3)] for i in range(2)]


def _stats(count: int, scale: float, width: int = 4) -> Statistics:
    return Statistics(count, gram=scale * torch.eye(width, dtype=torch.float64))


def test_few_tokens_borrow_much_and_many_little() -> None:
    known = {"a": _stats(2, 8.0), "b": _stats(398, 1.0), "c": Statistics()}
    mean = (2 * 8.0 + 398 * 1.0) / 400
    shrink(known, [["a", "b", "c"]], "gram")
    for name, own, share in (("a", 8.0, 1 / 3), ("b", 1.0, 1 / 399)):
        gram = known[name].gram
        assert gram is not None
        expected = (1 - share) * own + share * mean
        torch.testing.assert_close(gram, expected * torch.eye(4, dtype=torch.float64))
    assert known["c"].gram is None
    assert (weight_of(0, 4), weight_of(8, 32)) == (1.0, 0.5)


def test_layers_that_read_one_tensor_are_shrunk_once() -> None:
    shared, other = _stats(1, 3.0), _stats(3, 1.0)
    known = {"a": shared, "b": shared, "c": other}
    shrink(known, [["a", "b", "c"]], "gram")
    assert shared.gram is not None
    mean = (1 * 3.0 + 3 * 1.0) / 4
    torch.testing.assert_close(shared.gram[0, 0], torch.tensor(0.5 * 3.0 + 0.5 * mean).double())


def test_siblings_of_other_widths_are_left_alone() -> None:
    known = {"a": _stats(2, 8.0, 4), "b": _stats(9, 1.0, 3)}
    shrink(known, [["a", "b"]], "gram")
    assert known["a"].gram is not None
    assert float(known["a"].gram[0, 0]) == 8.0


def test_a_calibration_has_shrunk_experts_and_counts_of_their_own() -> None:
    model, ids = zoo.make("mixtral"), zoo.tokens(4, 9)
    found = lowrank.calibrate(model, [ids], progress=False)
    names = [f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(4)]
    with separate_parts(model):
        rows = zoo.inputs_of(model, names, lambda: model(ids))
    grams = {n: torch.from_numpy(rows[n].T @ rows[n]) / len(rows[n]) for n in names}
    counts = {name: len(rows[name]) for name in names}
    assert counts == {name: found.statistics[name].count for name in names}
    mean = torch.stack([grams[n] * counts[n] / sum(counts.values()) for n in names]).sum(0)
    for name in names:
        share = weight_of(counts[name], 32)
        expected = (1 - share) * grams[name] + share * mean
        torch.testing.assert_close(found.statistics[name].gram, expected)
