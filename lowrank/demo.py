"""The package's own small Llama, and the demonstration that `lowrank demo` runs on it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .api import compress
from .bench import benchmark
from .calibrate import calibrate
from .errors import LowrankError
from .eval import kl, perplexity
from .io import save
from .plan import Report

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


def run(out: Path | None = None) -> int:
    """Compress the embedded model, print the table, save, reload elsewhere, compare.

    Args:
        out: where the model compressed to 0.6 is kept; None: a temporary folder.

    Returns:
        0, or 1 when the reloaded model's logits differ.
    """
    from rich.console import Console

    started, console = time.perf_counter(), Console()
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
    """Print one row a compression; returns the model that is to be saved."""
    from rich.progress import track
    from rich.table import Table

    rows = 2 * LENGTH
    example = torch.arange(rows).remainder(dense.model.config.vocab_size).view(2, LENGTH)
    table = Table(
        title=f"a Llama of {dense.model.num_parameters():,} parameters, "
        f"measured on {len(dense.held_out) // 1000} kB of text that it never saw",
        title_justify="left",
        caption=f"KL: nats per token to the dense model; ms: median per {rows} tokens; "
        "ratio: share kept of the targeted weights",
        caption_justify="left",
    )
    for column in ("method", "ratio", "parameters", "bytes", "perplexity", "KL", "ms"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    seen = calibrate(
        dense.model, dense.calibration, tokenizer=dense.tokenizer, length=LENGTH, progress=False
    )
    runs = [("dense", 1.0), *((m, r) for r in RATIOS for m in METHODS)]
    kept: tuple[nn.Module, Report] | None = None
    shown = track(runs, "measuring", console=console, transient=True)
    for method, ratio in shown if console.is_terminal else runs:
        model, report = dense.model, None
        if method != "dense":
            model, report = compress(
                dense.model, ratio, method=method, data=seen, copy=True, progress=False
            )
        if report is not None and (method, ratio) == ("whitened", 0.6):
            kept = model, report
        table.add_row(method, f"{ratio:.1f}", *_measure(model, dense, example))
    console.print(table)
    assert kept is not None
    return kept


def _measure(model: nn.Module, dense: TinyLM, example: Tensor) -> tuple[str, ...]:
    found = benchmark(model, example)
    text, tokenizer = dense.held_out, dense.tokenizer
    away = 0.0
    if model is not dense.model:
        away = kl(model, dense.model, text, tokenizer=tokenizer, length=LENGTH)
    return (
        f"{found.params:,}",
        f"{found.bytes:,}",
        f"{perplexity(model, tokenizer, text, length=LENGTH):.2f}",
        f"{away:.3f}",
        f"{found.latency_ms:.1f}",
    )


def _reloads_equal(model: nn.Module, folder: Path, logits: Path) -> bool:
    from safetensors.torch import load_file

    command = [sys.executable, "-c", RELOAD, str(folder), str(logits), str(LENGTH)]
    subprocess.run(command, check=True, capture_output=True)
    ids = torch.arange(LENGTH).remainder(model.config.vocab_size)[None]  # type: ignore[union-attr]
    with torch.no_grad():
        here = model(input_ids=ids).logits
    return torch.equal(here, load_file(logits)["logits"])


def _quiet_transformers() -> Any:
    """No progress bars of transformers inside; its own settings are put back."""
    from contextlib import contextmanager

    from transformers.utils import logging

    @contextmanager
    def quiet() -> Any:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()

    return quiet()
