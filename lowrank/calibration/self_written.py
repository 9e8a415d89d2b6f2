"""Calibration text sampled from the causal language model itself, for want of other text.

Generated text reflects the training text (data-free calibration by generation: LLM-QAT, arXiv
2305.17888). Here every token is sampled from the model's softmax at temperature 1, without
truncation, so that the rows are a sample of the model's distribution; the paper takes the first few
greedily. Random first tokens make the rows differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..plans.progress import Steps
from .batches import LENGTH, ROWS, Batch
from .running import FAILED, bare_forward, logits_of, quiet

COUNT = 192  # rows to write
TOGETHER = 64  # rows written at a time
WRITING = 0.8  # of the time that calibration on them takes
FROM_START = 0.25  # share of rows from the start token; benchmarks/self_calibration.py
# What models give back to be called with next: keys and values, or the state of a recurrence.
# Settings that limit the positions; -1 stands for no limit.
LIMITS = ("max_position_embeddings", "max_seq_len")
CACHES = ("past_key_values", "cache_params", "state")


def writes(model: nn.Module) -> bool:
    """Whether a model can write text: it generates token by token from the previous ones."""
    generates, config = getattr(model, "can_generate", None), _config(model)
    if not callable(generates) or not isinstance(getattr(config, "vocab_size", None), int):
        return False
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "main_input_name", "") == "input_ids" and bool(generates())


def described(
    model: nn.Module, *, length: int = LENGTH, seed: int = 0, rows: int | None = None
) -> str:
    """A description of `written_batches`, which for one model is equal if the tokens are."""
    words = f"{rows or COUNT} rows of {_fitting(model, length)} tokens"
    return f"{words} that the model wrote itself, seed {seed}"


def written_batches(
    model: nn.Module,
    *,
    length: int = LENGTH,
    seed: int = 0,
    rows: int | None = None,
    progress: bool = False,
) -> list[Batch]:
    """The rows of `write` in batches of 16; COUNT of them if `rows` is None."""
    written = write(model, rows=rows or COUNT, length=length, seed=seed, progress=progress)
    return list(written.split(ROWS))


def write(
    model: nn.Module,
    *,
    rows: int = COUNT,
    length: int = LENGTH,
    seed: int = 0,
    batch: int = TOGETHER,
    progress: bool = False,
) -> Tensor:
    """Text sampled from a causal language model; it and the global random state are unchanged.

    A quarter of the rows begin with the model's start token, the others with random tokens, not
    special and distinct while there are enough. Without a start token all are random. The rest is
    sampled at temperature 1. An end token is followed by a new start token, or, if the model has
    none or one token is both, by what the model samples: rows are full, none is padded.

    Args:
        rows: number of rows.
        length: tokens per row, limited by the model's positions.
        seed: determines all samples, whatever the batch: the same model writes the same.
        batch: rows written at a time.

    Returns:
        Token ids (rows, length), int64, on the CPU.

    Raises:
        LowrankError: the model is no causal language model, fails, or its logits are NaN.
    """
    if not writes(model):
        raise LowrankError(
            f"{type(model).__name__} cannot write its calibration data, only causal language "
            "models of transformers can: pass data=…, or data=None to work without"
        )
    generator = torch.Generator().manual_seed(seed)
    written = torch.zeros(rows, _fitting(model, length), dtype=torch.long)
    written[:, 0] = _first(model, rows, generator)
    chances = torch.rand(written.shape, generator=generator, dtype=torch.float64)
    tokens = written[:, 1:].numel()
    try:
        with quiet(model), Steps(tokens, "token", progress, upto=WRITING) as bar:
            cached = _remembers(model)
            for start in range(0, rows, batch):
                part = slice(start, start + batch)
                _write_on(model, written[part], chances[part], cached, bar)
    except LowrankError:
        raise
    except FAILED as error:
        raise LowrankError(
            f"{type(model).__name__} failed to write its calibration data "
            f"({' '.join(str(error).split())[:200]}): pass data=…, or data=None to work without"
        ) from error
    return written


def _first(model: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
    """The first token of every row (rows,)."""
    vocabulary, start = _words(model), _start(model)
    drawn = 0 if start is None else round(rows * FROM_START)
    rounds = range(0, max(rows - drawn, 1), len(vocabulary))
    shuffled = [vocabulary[torch.randperm(len(vocabulary), generator=generator)] for _ in rounds]
    return torch.cat([torch.full((drawn,), start or 0), *shuffled])[:rows]


def _write_on(model: nn.Module, rows: Tensor, chances: Tensor, cached: bool, bar: Any) -> None:
    """Sample all tokens of some rows (rows, length) but the first, in place."""
    start, ends = _start(model), _known(model, "eos_token_id")
    restart = torch.tensor(sorted(ends), dtype=torch.long) if start not in {None, *ends} else None
    past = None
    for position in range(1, rows.shape[1]):
        given = rows[:, :position] if past is None else rows[:, position - 1 : position]
        logits, past = _next(model, given, past, cached)
        drawn = _drawn(logits, chances[:, position])
        if restart is not None and start is not None:
            drawn[torch.isin(rows[:, position - 1], restart)] = start
        rows[:, position] = drawn
        bar.update(len(rows))


def _next(model: nn.Module, ids: Tensor, past: Any, cached: bool) -> tuple[Tensor, Any]:
    """Logits (rows, vocabulary) of the next token, and the cache by its name; `past` is one."""
    inputs = {"input_ids": ids, **({"use_cache": True} if cached else {}), **(past or {})}
    output = bare_forward(model, inputs)
    kept = ((name, getattr(output, name, None)) for name in CACHES if cached)
    return logits_of(output)[:, -1], next(({n: c} for n, c in kept if c is not None), None)


def _drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """One id sampled per row of logits (rows, vocabulary), by inverse transform sampling.

    Raises:
        LowrankError: logits are NaN.
    """
    sums = logits.double().softmax(-1).cumsum(-1)
    whole = sums[:, -1:]
    if not bool(torch.isfinite(whole).all()):
        raise LowrankError("the model's logits are NaN: pass data=None to work without data")
    # `right`: a token of probability 0 leaves the sum as it is, and is never the first above.
    drawn = torch.searchsorted(sums, chances[:, None].to(sums.device) * whole, right=True)
    return drawn[:, 0].clamp(max=logits.shape[-1] - 1).cpu()


def _remembers(model: nn.Module) -> bool:
    """Whether the model's cache works: one token at a time gives the same as all at once.

    Raises:
        LowrankError: a token changes earlier predictions.
    """
    ids = _words(model)[None, :4]
    whole, past = _next(model, ids, None, False)
    first = logits_of(bare_forward(model, {"input_ids": ids}))[:, 0]
    if not _alike(first, _next(model, ids[:, :1], None, False)[0]):
        raise LowrankError(
            f"{type(model).__name__} attends to later tokens too, and cannot write its calibration "
            "data: pass data=…, or data=None to work without"
        )
    last = first
    try:
        for token in ids.T[:, None]:
            last, past = _next(model, token, past, True)
            if past is None:
                return False
    except LowrankError:
        raise
    except FAILED:  # its forward takes no cache, or has one of an earlier call in the way
        return False
    return _alike(whole, last)


def _alike(logits: Tensor, others: Tensor) -> bool:
    """Whether two distributions are equal up to rounding, in total variation."""
    apart = (logits.double().softmax(-1) - others.double().softmax(-1)).abs().sum(-1) / 2
    return not bool(
        (apart > torch.finfo(logits.dtype).eps ** 0.5).any()
    )  # NaN is handled elsewhere


def _config(model: Any) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _words(model: Any) -> Tensor:
    """All ids but the model's special ones."""
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = set().union(*(_known(model, kind) for kind in kinds))
    ids = [i for i in range(_config(model).vocab_size) if i not in special]
    return torch.tensor(ids or [0])


def _known(model: Any, name: str) -> set[int]:
    """A setting's token ids, without those beyond the vocabulary."""
    places = (getattr(model, "generation_config", None), _config(model))
    settings = [getattr(place, name, None) for place in places]
    value = next((ids for ids in settings if ids is not None), None)
    ids = value if isinstance(value, list | tuple) else [value]
    return {int(i) for i in ids if i is not None and 0 <= i < _config(model).vocab_size}


def _start(model: Any) -> int | None:
    return min(_known(model, "bos_token_id"), default=None)


def _fitting(model: Any, length: int) -> int:
    """`length`, limited by the model's positions."""
    limits = (getattr(_config(model), name, None) for name in LIMITS)
    return min(length, *(most for most in limits if most and most > 0), length)
