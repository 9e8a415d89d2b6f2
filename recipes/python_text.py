"""Text that every Python has, for the recipes that train or fine-tune the embedded language model.

The source of the standard library: its training documents, on which the embedded model was trained
too, and held-out modules, which it never saw (train_tiny_lm.py says which).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_tiny_lm import sources

from lowrank.demo import TinyLM, held_out_rows, judge


class Text(NamedTuple):
    """Tokens to train on (n,), rows of held-out ones, and the token that ends a text."""

    stream: Tensor
    held_out: list[Tensor]
    end: int


def read(tiny: TinyLM, documents: int, every: int = 4) -> Text:
    """So many documents, spread over the library, and every so many of the held-out rows."""
    texts = sources()[0]
    texts = texts[:: max(len(texts) // documents, 1)]
    tokens = [tiny.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    stream = torch.tensor([token for text in tokens for token in text])
    return Text(stream, held_out_rows(tiny)[::every], tiny.tokenizer.eos_token_id)


def draws(text: Text, steps: int, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Rows (batch, length + 1) for each step, the same for all that give the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text.stream) - length, (batch,), generator=generator)
        yield torch.stack([text.stream[s : s + length + 1] for s in starts])


def next_token(model: Any, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next token, in nats."""
    logits = model(input_ids=rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: nn.Module, text: Text) -> float:
    """The same on the held-out rows."""
    ((perplexity, _),) = judge([model.eval()], text.held_out)
    return math.log(perplexity)


def tune(
    model: Any, text: Text, lr: float, seed: int, options: Any,
    control: Callable[[nn.Module, Any], Any] | None = None,
) -> Any:  # fmt: skip
    """Fine-tune with AdamW for `options.steps`, with a controller that `control` builds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    controller = control(model, optimizer) if control else None
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for rows in draws(text, options.steps, options.batch, options.length, seed):
        next_token(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if controller:
            controller.before_step()
        optimizer.step()
        if controller:
            controller.after_step()
        optimizer.zero_grad()
        schedule.step()
    return (controller.finish() if controller else model).eval()


def over_seeds(
    rates: Sequence[float], seeds: int, run: Callable[[float, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs of all rates by seed 0, and of the best one by the other seeds; those count."""
    tried = [run(lr, 0) for lr in rates]
    best = min(tried, key=lambda one: one["loss"])
    more = [run(best["lr"], seed) for seed in range(1, seeds)]
    return [
        *({**one, "counts": one is best} for one in tried),
        *({**o, "counts": True} for o in more),
    ]


def counted(runs: list[dict[str, Any]]) -> tuple[float, float, str]:
    """The rate that was chosen, the mean loss at it, and that of each seed, to print."""
    those = [run for run in runs if run["counts"]]
    mean = statistics.fmean(run["loss"] for run in those)
    return those[0]["lr"], mean, " ".join(f"{run['loss']:.3f}" for run in those)
