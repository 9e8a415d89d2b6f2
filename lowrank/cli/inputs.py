"""Inputs of the commands: models, tokenizers, texts and folders, each checked first."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration.batches import LENGTH, Batch, materialise
from ..calibration.statistics import SELF
from ..errors import LowrankError, listed
from .console import hushed, one_line

Source = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="Folder of a transformers model, or model name on the hub.",
        show_default=False,
    ),
]  # fmt: skip
Length = Annotated[
    int | None,
    typer.Option(
        metavar="INT", show_default=False,
        help=f"Tokens per row of text, given or self-written; default {LENGTH}, or the model's "
        "limit if lower.",
    ),
]  # fmt: skip
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="FOLDER", help="Output folder.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing output.")]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(path: str) -> Any:
    """Load a transformers model in its stored dtype.

    Raises:
        LowrankError: there is none, or weights are missing, which transformers would initialise at
            random.
    """
    from ..io import from_pretrained

    where = located(path)
    auto_class = None if _has_architecture(where) else "AutoModelForCausalLM"
    with hushed():
        model, info = from_pretrained(where, auto_class, dtype="auto", output_loading_info=True)
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if missing:
        raise LowrankError(
            f"{path}: weights of {type(model).__name__} are missing: {listed(missing, 4)}"
        )
    return model.eval()


def load_tokenizer(path: str, why: str = "") -> Any:
    """Load the model's tokenizer; None if there is none and `why` is "".

    Raises:
        LowrankError: there is none, and `why` says what needs it.
    """
    from ..io import tokenizer_of

    with hushed():
        tokenizer = tokenizer_of(located(path))
    if tokenizer is None and why:
        raise LowrankError(f"{why} needs a tokenizer, but {path} has none")
    return tokenizer


def read_data(data: str | None) -> str | None:
    """The text of --data; None without it, or if the model is to write its own."""
    return None if data is None or data == SELF else read_text(Path(data))


def read_text(path: Path) -> str:
    """Read a text file; raises LowrankError unless it holds UTF-8 text."""
    if not path.is_file():
        what = "is a folder, expected a text file" if path.is_dir() else "does not exist"
        raise LowrankError(f"text file {path} {what}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LowrankError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise LowrankError(f"text file {path} is empty")
    return text


def batches_of_text(text: str, path: str, length: int) -> list[Batch]:
    """Tokenise a text into batches of rows of `length` token ids."""
    batches = materialise(text, load_tokenizer(path, "text"), length=length)
    assert isinstance(batches, list)
    return batches


def row_length(model: Any, asked: int | None, default: int = LENGTH, option: str = "length") -> int:
    """Tokens per row: `asked`, or the default, capped at the model's maximum.

    Raises:
        LowrankError: `asked` is below 1, or above the model's maximum.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if asked is None:
        return min(default, most)
    if not 1 <= asked <= most:
        raise LowrankError(f"{option} must be in [1, {most}], got {asked}")
    return asked


def check_reads_tokens(model: Any, command: str, *, causal: bool = False) -> None:
    """Raises LowrankError unless the model takes token ids, and is a causal LM if `causal`."""
    name = type(model).__name__
    if getattr(model, "main_input_name", None) != "input_ids":
        raise LowrankError(f"{command} is for models that take token ids, which {name} does not")
    if causal and (model.config.is_encoder_decoder or not model.can_generate()):
        raise LowrankError(f"{command} is for causal language models, {name} is not one")


def check_folder(out: Path, force: bool, source: str | None = None) -> Path:
    """Raises LowrankError unless `out` can be written without overwriting; returns it."""
    if out.exists() and not out.is_dir():
        raise LowrankError(f"{out} is a file, expected a folder")
    if source is not None and Path(source).exists() and out.resolve() == Path(source).resolve():
        raise LowrankError(f"{out} is the model's own folder: choose another")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise LowrankError(f"{out} is not empty: choose another folder, or add --force")
    nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise LowrankError(f"{out} cannot be created: {nearest} is not a writable folder")
    return out


def check_new(*files: Path | None, force: bool) -> None:
    """Raises LowrankError if one of the files that are to be written exists."""
    for file in files:
        if file is not None and file.exists() and not force:
            raise LowrankError(f"{file} exists: choose another name, or add --force")


def located(path: str) -> str:
    """The folder of a model, or a name that exists on the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / "lowrank.json").is_file():
            raise LowrankError(
                f"{path} holds weights without an architecture (lowrank.json): load it in Python "
                "with lowrank.load(path, skeleton)"
            )
        raise LowrankError(f"{path} is not a transformers model: it has no config.json")
    if folder.exists():
        raise LowrankError(f"{path} is a file, expected a model folder")
    if not _HUB_NAME.fullmatch(path):
        raise LowrankError(f"there is no folder {path}")
    _check_on_hub(path)
    return path


def _check_on_hub(name: str) -> None:
    """Ask the hub once, where a download would retry five times with pauses."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        with hushed():
            HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise LowrankError(f"{name} is neither a folder nor a public model on the hub") from error
    except Exception as error:  # network errors of many kinds
        raise LowrankError(
            f"there is no folder {name}, and the hub cannot be reached: {one_line(error)}"
        ) from error


def _has_architecture(where: str) -> bool:
    """Whether config.json names the model class; True if it cannot be read, to fail later."""
    try:
        config = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or bool(config.get("architectures"))
