"""Scores on the tasks of lm-eval (EleutherAI's harness), whose own code runs them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..calibration.running import quiet
from ..errors import LowrankError
from ..walk.checks import check_module


class Score(NamedTuple):
    """One figure of one task.

    Attributes:
        error: its standard error; None if the harness gives none.
    """

    task: str
    metric: str
    value: float
    error: float | None


def task_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Score]:
    """What lm-eval measures of a language model, compressed or not; extra: `lowrank[eval]`.

    Args:
        tasks: names of lm-eval's tasks, or of those in `folder`.
        limit: of examples a task; None for all.
        folder: with tasks of one's own, as lm-eval's YAML files.
        seed: of few-shot examples and of bootstrapping.

    Raises:
        LowrankError: lm-eval is not installed, or knows no such task.
    """
    check_module(model)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LowrankError("tasks need lm-eval: pip install 'lowrank[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of how we call it
    manager = TaskManager(include_path=None if folder is None else str(folder))
    missing = [name for name in tasks if name not in manager.all_tasks]
    if missing or not tasks:
        raise LowrankError(
            f"lm-eval has no task {', '.join(missing) or '(none given)'}; `lm-eval ls tasks` lists "
            "them"
        )
    with quiet(model):
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=1000,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False,
        )  # fmt: skip
    return [
        score
        for task, figures in sorted(found["results"].items())
        for score in _scores_of(task, figures)
    ]


def _scores_of(task: str, figures: dict[str, Any]) -> list[Score]:
    scores = []
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{kind}")
            known = float(error) if isinstance(error, int | float) else None
            scores.append(Score(task, metric, float(value), known))
    return scores
