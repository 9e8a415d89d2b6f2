"""The package's own small Llama, and the demonstration that `lowrank demo` runs on it."""

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
from .plans.report import Report

RATIOS = (0.8, 0.6, 0.4)
METHODS = ("svd", "whitened")
LENGTH = 256  # tokens of a row; the model was trained on rows of this length

# Runs in a process of its own: what was saved has to be enough.
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
    """The embedded model with everything that a measurement needs."""

    model: Any
    tokenizer: Any
    held_out: str
    calibration: str


def tiny_lm(dtype: torch.dtype = torch.float32) -> TinyLM:
    """Load the embedded model (0.87 M parameters), its tokenizer, held-out and calibration text.

    It was trained on the source of Python's standard library by recipes/train_tiny_lm.py; the two
    texts are modules that it never saw.

    Raises:
        LowrankError: the package was installed without its data.
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
    """Compress the embedded model, print the table, save, reload elsewhere, compare.

    Args:
        out: where the model compressed to 0.6 is kept; None: a temporary folder.

    Returns:
        0, or 1 when the reloaded model's logits differ.
    """
    from rich.console import Console

    started, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 100)
    with _quiet_transformers():
        dense = tiny_lm()
        kept = _table(dense, console)
        with tempfile.TemporaryDirectory() as scratch:
            folder = out or Path(scratch) / "compressed"
            model, report = kept
            save(model, folder, tokenizer=dense.tokenizer, card=f"```\n{report}\n```")
            equal = _reloads_equal(model, folder, Path(scratch) / "logits.safetensors")
    said = "equal, bit for bit" if equal else "NOT EQUAL"
    console.print(f"saved, reloaded in a new process: logits {said}")
    if out is not None:
        console.print(f"kept in {out} (whitened, 0.6): lowrank eval {out} --text FILE")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if equal else 1


def _table(dense: TinyLM, console: Any) -> tuple[nn.Module, Report]:
    """Compress, judge and print one row a model; returns what is to be saved."""
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
        f"{len(dense.held_out) // 1000} kB of text that it never saw",
        title_justify="left",
        caption=f"ratio: share kept of the targeted weights; KL to dense in nats per token; "
        f"ms: median per {2 * LENGTH} tokens",
        caption_justify="left",
    )
    for column in ("method", "ratio", "parameters", "bytes", "perplexity", "KL", "ms"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for ((method, ratio), model), (ppl, away) in zip(models.items(), judged, strict=True):
        measured = benchmark(model, torch.stack(rows[:2])[:, :-1])
        table.add_row(
            method, f"{ratio:.1f}", f"{measured.params:,}", f"{measured.bytes:,}", f"{ppl:,.2f}",
            f"{away:.3f}", f"{measured.latency_ms:.1f}",
        )  # fmt: skip
    console.print(table)
    return models["whitened", 0.6], reports["whitened", 0.6]


def held_out_rows(tiny: TinyLM) -> list[Tensor]:
    """The held-out text as rows of LENGTH + 1 tokens (int64); all but the last one predict."""
    rows = text_rows(tiny.held_out, tiny.tokenizer, LENGTH + 1)
    return [row for row in rows if len(row) == LENGTH + 1]


def judge(
    models: Sequence[nn.Module], rows: Sequence[Tensor], *, progress: bool = False
) -> list[tuple[float, float]]:
    """Perplexity, and mean KL to the first model, of each model, each row run once by each."""
    from tqdm.auto import tqdm

    nll, away = [0.0] * len(models), [0.0] * len(models)
    with torch.no_grad():
        for start in tqdm(range(0, len(rows), 16), "measure", disable=not progress, leave=False):
            batch = torch.stack(list(rows[start : start + 16]))
            reference = None
            for index, model in enumerate(models):
                logits = model(input_ids=batch[:, :-1]).logits.float()
                reference = logits if reference is None else reference
                lost = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
                nll[index] += float(lost)
                away[index] += float(divergence(reference, logits).double().sum())
    count = len(rows) * LENGTH
    return [(math.exp(a / count), b / count) for a, b in zip(nll, away, strict=True)]


def _reloads_equal(model: Any, folder: Path, logits: Path) -> bool:
    from safetensors.torch import load_file

    command = [sys.executable, "-c", RELOAD, str(folder), str(logits), str(LENGTH)]
    subprocess.run(command, check=True, capture_output=True)
    ids = torch.arange(LENGTH).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        here = model(input_ids=ids).logits
    return torch.equal(here, load_file(logits)["logits"])


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside; its own setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
