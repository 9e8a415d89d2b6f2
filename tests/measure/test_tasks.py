"""lm-eval's own code on a task of four questions: of an object, of a folder, and at the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank import LowrankError, demo
from lowrank.measure.tasks import task_scores
from tests.cli.helpers import invoke, refused
from tests.zoo import said

pytest.importorskip("lm_eval", reason="needs the extra lowrank[eval]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lm-eval and datasets warn of much
]
QUESTIONS = [
    ("def f(x):\n    return", [" x", " zebra"], 0),
    ("import", [" os", " ;;;;"], 0),
    ("for i in range(", ["10)", "while"], 0),
    ("class", [" A:", " 7"], 0),
]
TASK = """
task: guesses
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and the package's model compressed."""
    place = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    file = place / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    (place / "guesses.yaml").write_text(TASK.format(file=file))
    tiny = demo.tiny_lm()
    model, _ = lowrank.compress(tiny.model, 0.8, method="svd", progress=False)
    model.save_pretrained(place / "out")
    tiny.tokenizer.save_pretrained(place / "out")
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def accuracy_by_hand(model: Any, tokenizer: Any) -> float:
    """The share of questions whose right answer has the larger log-likelihood."""
    right = 0
    for question, choices, answer in QUESTIONS:
        begun = tokenizer(question)["input_ids"]
        values = []
        for choice in choices:
            ids = tokenizer(question + choice)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            values.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(begun), len(ids))))
        right += values.index(max(values)) == answer
    return right / len(QUESTIONS)


def test_scores_are_those_of_the_predictions(folder: Path) -> None:
    model, tokenizer = lowrank.from_pretrained(folder / "out"), demo.tiny_lm().tokenizer
    model.train()
    (score,) = task_scores(model, tokenizer, ["guesses"], folder=folder)
    assert model.training
    model.eval()
    assert (score.task, score.metric) == ("guesses", "acc")
    assert score.value == pytest.approx(accuracy_by_hand(model, tokenizer))
    assert score.error is not None


def test_the_command(folder: Path) -> None:
    out = folder / "out"
    shown = invoke("eval", out, "--tasks", "guesses", "--task-folder", folder, "--limit", 2).stdout
    assert re.search(r"guesses +acc +[01]\.\d{4} ± \d", shown)
    assert "the first 2 examples of each task" in shown
    assert "nothing to measure: add --text TEXT or --tasks" in refused("eval", out)
    assert "lm-eval has no task nonsense" in refused("eval", out, "--tasks", "nonsense")


def test_no_such_task(folder: Path) -> None:
    tiny = demo.tiny_lm()
    with pytest.raises(LowrankError, match="lm-eval has no task nonsense; `lm-eval ls") as caught:
        task_scores(tiny.model, tiny.tokenizer, ["nonsense"])
    said(caught)
    with pytest.raises(LowrankError, match=r"no task \(none given\)"):
        task_scores(tiny.model, tiny.tokenizer, [])
