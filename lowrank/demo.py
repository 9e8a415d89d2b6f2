"""The embedded small Llama, and `lowrank demo`, which runs on it."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .api import compress
from .calibration.batches import text_rows
from .calibration.statistics import calibrate
from .errors import LowrankError
from .io import save
from .measure.bench import benchmark
from .measure.eval import divergence
from .plans.progress import steps
from .plans.report import Report

RATIOS = (0.8, 0.6, 0.4)
METHODS = ("svd", "whitened")
LENGTH = 256  # tokens per row, as in training

# Run in a new process, with nothing but the saved files.
RELOAD = """
import sys, torch
from safetensors.torch import save_file
import lowrank
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(int(sys.argv[3])).remainder(model.config.vocab_size)[None]
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits}, sys.argv[2])
"""


class TinyLM(NamedTuple):
    """The embedded model, its tokenizer, and text to calibrate and measure on."""

    model: Any
    tokenizer: Any
    held_out: str
    calibration: str


def tiny_lm(dtype: torch.dtype = torch.float32) -> TinyLM:
    """Load the embedded model (0.87 M parameters), its tokenizer, held-out and calibration text.

    It was trained on the source of Python's standard library by recipes/train_tiny_lm.py; neither
    text was in the training data.

    Raises:
        LowrankError: the installation lacks the model's files.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with as_file(files("lowrank") / "tiny_lm") as folder:
        if not (folder / "model.safetensors").is_file():
            raise LowrankError("the embedded model is missing from this installation")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        held_out = (folder / "heldout.txt").read_text(encoding="utf-8")
        calibration = (folder / "calibration.txt").read_text(encoding="utf-8")
    return TinyLM(model, tokenizer, held_out, calibration)


def run_demo(out: Path | None = None) -> int:
    """Compress the embedded model, print a table, save, and compare after reloading.

    Args:
        out: folder to keep the model compressed to 0.6 in; None for a temporary one.

    Returns:
        Exit code: 0, or 1 if the reloaded model's logits differ.
    """
    from rich.console import Console

    started, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 100)
    with _quiet_transformers():
        dense = tiny_lm()
        model, report = _table(dense, console)
        with tempfile.TemporaryDirectory() as scratch:
            folder = out or Path(scratch) / "compressed"
            save(model, folder, tokenizer=dense.tokenizer, card=f"```\n{report}\n```")
            equal = _reloads_equal(model, folder, Path(scratch) / "logits.safetensors")
    verdict = "are equal bit for bit" if equal else "DIFFER"
    console.print(f"saved, and reloaded in a new process: logits {verdict}")
    if out is not None:
        console.print(f"kept in {out} (whitened, 0.6): lowrank eval {out} --text FILE")
    console.print(f"{time.perf_counter() - started:.0f} s in total")
    return 0 if equal else 1


def _table(dense: TinyLM, console: Any) -> tuple[nn.Module, Report]:
    """Compress, measure and print one row per model; returns the model to save."""
    from rich.table import Table

    calibration = calibrate(
        dense.model, dense.calibration, tokenizer=dense.tokenizer, length=LENGTH, progress=False
    )
    models: dict[tuple[str, float], nn.Module] = {("dense", 1.0): dense.model}
    reports: dict[tuple[str, float], Report] = {}
    for ratio in RATIOS:
        for method in METHODS:
            models[method, ratio], reports[method, ratio] = compress(
                dense.model, ratio, method=method, data=calibration, copy=True, progress=False
            )
    rows = held_out_rows(dense)
    judged = judge(list(models.values()), rows, progress=console.is_terminal)
    table = Table(
        title=f"a Llama of {dense.model.num_parameters():,} parameters on "
        f"{len(dense.held_out) // 1000} kB of held-out text",
        title_justify="left",
        caption=f"ratio: share kept of the targeted weights; KL to dense in nats per token; "
        f"ms: median per {2 * LENGTH} tokens",
        caption_justify="left",
    )
    for column in ("method", "ratio", "parameters", "bytes", "perplexity", "KL", "ms"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for ((method, ratio), model), (ppl, kl) in zip(models.items(), judged, strict=True):
        measured = benchmark(model, torch.stack(rows[:2])[:, :-1])
        table.add_row(
            method, f"{ratio:.1f}", f"{measured.params:,}", f"{measured.bytes:,}", f"{ppl:,.2f}",
            f"{kl:.3f}", f"{measured.latency_ms:.1f}",
        )  # fmt: skip
    console.print(table)
    return models["whitened", 0.6], reports["whitened", 0.6]


def held_out_rows(tiny: TinyLM) -> list[Tensor]:
    """The held-out text as rows of LENGTH + 1 token ids (int64), for LENGTH predictions each."""
    rows = text_rows(tiny.held_out, tiny.tokenizer, LENGTH + 1)
    return [row for row in rows if len(row) == LENGTH + 1]


def judge(
    models: Sequence[nn.Module], rows: Sequence[Tensor], *, progress: bool = False
) -> list[tuple[float, float]]:
    """(perplexity, mean KL from the first model) of each model; each row is run once per model."""
    nll, kl = [0.0] * len(models), [0.0] * len(models)
    with torch.no_grad():
        for start in steps(range(0, len(rows), 16), "batch", progress):
            batch = torch.stack(list(rows[start : start + 16]))
            reference = None
            for index, model in enumerate(models):
                logits = model(input_ids=batch[:, :-1]).logits.float()
                reference = logits if reference is None else reference
                loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
                nll[index] += float(loss)
                kl[index] += float(divergence(reference, logits).double().sum())
    count = len(rows) * LENGTH
    return [(math.exp(a / count), b / count) for a, b in zip(nll, kl, strict=True)]


def _reloads_equal(model: Any, folder: Path, logits: Path) -> bool:
    from safetensors.torch import load_file

    command = [sys.executable, "-c", RELOAD, str(folder), str(logits), str(LENGTH)]
    subprocess.run(command, check=True, capture_output=True)
    ids = torch.arange(LENGTH).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    return torch.equal(expected, load_file(logits)["logits"])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars inside; the setting is restored."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
