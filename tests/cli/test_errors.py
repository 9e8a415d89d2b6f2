"""Help that reads well, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from safetensors.torch import load_file, save_file

import lowrank
from lowrank.cli import console, inputs

from .helpers import (
    invoke,
    refused,
    run,
)


def test_help_is_quick_and_names_every_command() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lowrank", "--help"],
        capture_output=True, text=True, env=env, check=True,
    )  # fmt: skip
    for command in ("plan", "compress", "inspect", "eval", "bench", "merge", "methods", "demo"):
        assert f"\n  {command} " in done.stdout
    assert "lowrank compress PATH --ratio 0.8" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lowrank.cli" in imported
    assert not any(name.partition(".")[0] == "transformers" for name in imported)


@pytest.mark.parametrize("command", ["plan", "compress", "inspect", "eval", "bench", "merge"])
def test_help_of_a_command_has_an_example(command: str) -> None:
    assert f"    lowrank {command} " in run(command, "--help")


def test_without_a_command_the_help_is_shown() -> None:
    assert run() == run("--help")
    assert run("--version").strip() == lowrank.__version__


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ratio", "0"], "ratio is the fraction kept and must be in (0, 1), got 0.0"),
        (["--ratio", "1"], "must be in (0, 1), got 1.0"),
        (["--ratio", "nan"], "must be in (0, 1), got nan"),
        (["--ratio", "much"], "Invalid value for '--ratio'"),
        (["--ratio", "0.001"], "ask for at least that"),
        ([], "no target size: give --ratio 0.8 or --rank 32"),
        (["--ratio", "0.5", "--rank", "4"], "either ratio or rank"),
        (["--rank", "four"], "--rank must be a number, got 'four'"),
        (["--rank", "0"], "got 0"),
        (["--ratio", "0.5", "--method", "whitend"], "did you mean 'whitened' or"),
        (["--ratio", "0.5", "--policy", "unifrm"], "did you mean 'uniform'?"),
        (["--ratio", "0.5", "--of", "all"], "(known: model, targets)"),
        (["--ratio", "0.5", "--target", "query"], "'query' matches none of 16 layers"),
        (["--ratio", "0.5", "--exclude", "("], "'(' is not a regular expression"),
        (["--ratio", "0.5", "--data", "self", "--length", "65"], "--length must be in [1, 64]"),
        (["--ratio", "0.5", "--data", "absent.txt"], "text file absent.txt does not exist"),
        (["--ratio", "0.5", "--data", "."], "is a folder, expected a text file"),
        (["--ratio", "0.5", "--length", "65"], "--length must be in [1, 64], got 65"),
        (["--plan", "absent.json"], "no plan at absent.json"),
        (["--ratio", "0.5", "--colour"], "No such option"),
    ],
)
def test_bad_choices(made: SimpleNamespace, tmp_path: Path, args: list[str], said: str) -> None:
    assert said in refused("compress", made.dense, "--out", tmp_path / "new", *args)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ratio", "2"], "must be in (0, 1), got 2.0"),
        (["--ratio", "0.5", "--policy", "none"], "unknown policy 'none'"),
        (["--ratio", "0.5", "--data", "absent.txt"], "absent.txt does not exist"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_typing_error_costs_no_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, args: list[str], said: str
) -> None:
    monkeypatch.delattr(inputs, "load_model")
    assert said in refused(command, "a-model", "--out", tmp_path / "new", *args)


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe\x00", b"\x89PNG\r\n"])
def test_bad_texts(made: SimpleNamespace, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    said = refused("eval", made.dense, "--text", file)
    assert str(file) in said
    assert ("is empty" in said) == (not content.strip())


def test_bad_paths(made: SimpleNamespace, tmp_path: Path) -> None:
    assert "is a file, expected a model folder" in refused("inspect", made.text)
    assert "it has no config.json" in refused("inspect", tmp_path)
    assert f"there is no folder {tmp_path}/absent" in refused("inspect", f"{tmp_path}/absent")
    assert "the hub cannot be reached: Cannot reach" in refused("inspect", "nobody/has-this")
    (tmp_path / "lowrank.json").write_text("{}")
    assert "lowrank.load(path, skeleton)" in refused("inspect", tmp_path)
    assert "it is dense already" in refused("merge", made.dense, "--out", tmp_path / "new")


def test_a_name_that_the_hub_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def absent(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError(
            "404\n\nlong story", response=SimpleNamespace(headers={}, request=None)
        )

    monkeypatch.setattr(HfApi, "model_info", absent)
    assert "neither a folder nor a public model on the hub" in refused("inspect", "nobody/has-this")


def test_damaged_checkpoints(made: SimpleNamespace, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(made.dense, broken)
    weights = broken / "model.safetensors"
    state = load_file(weights)
    del state["model.norm.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    said = refused("inspect", broken)
    assert "weights of LlamaForCausalLM are missing: model.norm.weight" in said
    weights.write_bytes(weights.read_bytes()[:3000])
    assert f"cannot load {broken}: SafetensorError" in refused("inspect", broken)
    (broken / "config.json").write_text("{")
    assert f"cannot load {broken}" in refused("inspect", broken)


def test_a_config_without_architecture_is_a_causal_model(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(made.dense, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert "LlamaForCausalLM" in run("inspect", tmp_path / "old")


def test_nothing_is_overwritten_unasked(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    args = ("compress", made.dense, "--ratio", 0.5, "--out")
    assert "is not empty: choose another folder, or add --force" in refused(*args, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert "is a file, expected a folder" in refused(*args, tmp_path / "mine.txt")
    assert "is not a writable folder" in refused(*args, tmp_path / "mine.txt" / "new")
    assert "the model's own folder" in refused(*args, made.dense, "--force")
    run(*args, tmp_path, "--force")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "model.safetensors").is_file()


def test_models_that_a_command_cannot_take(made: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**size, vocab_size=40)).save_pretrained(tmp_path / "bert")
    vit = ViTConfig(**size, intermediate_size=16, image_size=16, patch_size=8)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    said = refused("eval", tmp_path / "bert", "--text", made.text)
    assert "eval is for causal language models, BertForMaskedLM is not one" in said
    assert "that take token ids" in refused("bench", tmp_path / "vit")
    assert "text needs a tokenizer" in refused("inspect", tmp_path / "bert", "--data", made.text)
    assert "positions on cpu" in run("bench", tmp_path / "bert", "--tokens", 4, "--repeats", 1)


def test_verbose_says_when_stages_end_and_only_then(made: SimpleNamespace, tmp_path: Path) -> None:
    command = ["compress", str(made.dense), "--ratio", "0.7", "--method", "svd", "--out"]
    for i, flags in enumerate((["--verbose"], [])):
        result = invoke(*flags, *command, str(tmp_path / str(i)))
        assert result.exit_code == 0
        said = [line for line in result.stderr.splitlines() if " s, memory " in line]
        stages = [line.split(": ")[0] for line in said]
        wanted = ["loading", "decompositions", "choosing ranks", "factoring", "writing"]
        assert [stage for stage in wanted if stage in stages] == (wanted if flags else [])


def test_debug_shows_where_and_keeps_the_line(made: SimpleNamespace) -> None:
    for args in (["--debug", "inspect", "a/b/c"], ["inspect", "a/b/c", "--debug"]):
        result = invoke(*args)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.endswith("lowrank: there is no folder a/b/c\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("a\nb"), 1, "lowrank: RuntimeError: a b (--debug shows the traceback)\n"),
        (OSError(28, "No space left", "out"), 2, "lowrank: No space left: out\n"),
        (OSError("odd"), 2, "lowrank: odd\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Abort(), 130, ""),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(inputs, "load_model", fail)
    result = invoke("inspect", "anything")
    assert (result.exit_code, result.stderr) == (code, said)


def test_other_libraries_speak_again_afterwards(made: SimpleNamespace) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    with console.hushed():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() or console.on_terminal()
    assert logging.get_verbosity() == logging.WARNING
    assert logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()
    logging.set_verbosity_error()
