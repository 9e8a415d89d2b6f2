"""One call of `compress` stays in few rooms, and does nothing twice."""

from __future__ import annotations

from tests.trace import BATCHES, traced


def test_one_call_of_compress_enters_few_rooms_and_works_once() -> None:
    calls, passes = traced()
    # Three of them, which time stages, show them, and know of other processes, are only passed
    # through, eight are for weights that are not in layers, two for time and gain of stages, and
    # two for corrections of sums and logits. (50 before files of more than 400 lines were
    # parted, the last of them recovery.)
    assert len({file for file, _ in calls}) <= 70
    assert calls["walk/sites.py", "find_sites"] == 1
    # The dense model's stream is recorded once, without the held-out rows, since no block is
    # trained.
    assert calls["calibration/chain.py", "Recording.record"] == BATCHES - 1
    # Of three candidates two are far behind before the refit: it is run for the one chosen alone.
    assert calls["recover/sequential.py", "SequentialPass.run"] == 1
    assert passes <= 28
