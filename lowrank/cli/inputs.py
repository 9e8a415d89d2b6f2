"""What the commands are given: models, tokenizers, texts and folders, each checked first."""

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
        metavar="PATH", help="Folder of a transformers model, or its name on the hub.",
        show_default=False,
    ),
]  # fmt: skip
Length = Annotated[
    int | None,
    typer.Option(
        metavar="INT", show_default=False,
        help=f"Tokens of a row of text, read or written; {LENGTH} if not given, or less for a "
        "small model.",
    ),
]  # fmt: skip
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Write where something is already.")]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(path: str) -> Any:
    """The transformers model, in the dtype that was stored.

    Raises:
        LowrankError: there is none, or weights are missing: transformers would make them up.
    """
    from ..io import from_pretrained

    where = _located(path)
    auto_class = None if _has_architecture(where) else "AutoModelForCausalLM"
    with hushed():
        model, info = from_pretrained(where, auto_class, dtype="auto", output_loading_info=True)
    absent = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if absent:
        raise LowrankError(
            f"{path}: the weights of {type(model).__name__} are incomplete: {listed(absent, 4)}"
        )
    return model.eval()


def load_tokenizer(path: str, why: str = "") -> Any:
    """The tokenizer that lies beside the model; None if there is none and nothing needs it.

    Raises:
        LowrankError: there is none, and `why` says what it is needed for.
    """
    from transformers import AutoTokenizer

    where = _located(path)
    try:
        with hushed():
            tokenizer = AutoTokenizer.from_pretrained(where)
        # Without its files transformers makes one up, of nothing but special tokens.
        if len(tokenizer) > len(tokenizer.all_special_tokens) + 1:
            return tokenizer
    except Exception as error:  # whatever the many readers behind it raise
        if why:
            raise LowrankError(f"{why} needs a tokenizer, and {path} holds none") from error
    if why:
        raise LowrankError(f"{why} needs a tokenizer, and {path} holds none")
    return None


def read_data(data: str | None) -> str | None:
    """The text behind --data; None without one, and where the model is to write it itself."""
    return None if data is None or data == SELF else read_text(Path(data))


def read_text(path: Path) -> str:
    """Raises LowrankError unless the file holds text in UTF-8."""
    if not path.is_file():
        what = "is a folder, expected a text file" if path.is_dir() else "does not exist"
        raise LowrankError(f"text file {path} {what}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LowrankError(f"{path} is no text in UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise LowrankError(f"text file {path} is empty")
    return text


def batches_of_text(text: str, path: str, length: int) -> list[Batch]:
    """Batches of token ids, of rows of `length`."""
    batches = materialise(text, load_tokenizer(path, "text"), length=length)
    assert isinstance(batches, list)
    return batches


def row_length(model: Any, asked: int | None, default: int = LENGTH, option: str = "length") -> int:
    """Tokens of a row: `asked`, or the default as far as the model has positions for it.

    Raises:
        LowrankError: fewer than one, or more than the model has positions for.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    if asked is None:
        return min(default, most)
    if not 1 <= asked <= most:
        raise LowrankError(f"{option} must be in [1, {most}], got {asked}")
    return asked


def check_reads_tokens(model: Any, command: str, *, causal: bool = False) -> None:
    """Raises LowrankError for a model that takes no token ids, or predicts no next token."""
    name = type(model).__name__
    if getattr(model, "main_input_name", None) != "input_ids":
        raise LowrankError(f"{command} is for models that read tokens, {name} reads other things")
    if causal and (model.config.is_encoder_decoder or not model.can_generate()):
        raise LowrankError(f"{command} is for causal language models, {name} is none")


def check_folder(out: Path, force: bool, source: str | None = None) -> Path:
    """Raises LowrankError when `out` cannot be written to without loss."""
    if out.exists() and not out.is_dir():
        raise LowrankError(f"{out} is a file, expected a folder")
    if source is not None and Path(source).exists() and out.resolve() == Path(source).resolve():
        raise LowrankError(f"{out} is the model's own folder: choose another one")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise LowrankError(f"{out} is not empty: choose another folder, or add --force")
    nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise LowrankError(f"{out} cannot be made: no folder can be written in {nearest}")
    return out


def _located(path: str) -> str:
    """A folder with a model in it, or a name that the hub knows."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / "lowrank.json").is_file():
            raise LowrankError(
                f"{path} holds weights without their architecture (lowrank.json): load it in "
                "Python, by lowrank.load(path, skeleton)"
            )
        raise LowrankError(f"{path} holds no transformers model: there is no config.json")
    if folder.exists():
        raise LowrankError(f"{path} is a file, expected the folder of a model")
    if not _HUB_NAME.fullmatch(path):
        raise LowrankError(f"there is no folder {path}")
    _check_on_hub(path)
    return path


def _check_on_hub(name: str) -> None:
    """Ask once, and not five times with pauses as a download would."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        with hushed():
            HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise LowrankError(f"{name} is no folder here, and no public model on the hub") from error
    except Exception as error:  # whatever a network may raise
        raise LowrankError(
            f"{name} is no folder here, and the hub cannot be asked: {one_line(error)}"
        ) from error


def _has_architecture(where: str) -> bool:
    """Whether a folder's config.json names the class; what cannot be read is reported later."""
    try:
        config = json.loads((Path(where) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(config, dict) or bool(config.get("architectures"))
