"""What the README and docs/ say: links lead somewhere, code runs, the README stays short."""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import demo

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
GALLERY = ROOT / "docs" / "gallery" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *GUIDE, GALLERY]
LIMIT = 6000  # bytes of the README: it is read on one screen

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of a list around them."""
    found = []
    for indent, said, body in FENCE.findall(text):
        if said == language:
            found.append(re.sub(rf"^{indent}", "", body, flags=re.MULTILINE))
    return found


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    outside = FENCE.sub("", text)
    titles = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> list[str]:
    """Relative links that lead to no file, or to no heading of it."""
    found = []
    for link in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        there = target.exists()
        if there and anchor:
            there = anchor in anchors(target.read_text(encoding="utf-8"))
        if not there:
            found.append(link)
    return found


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return page.name


def test_the_readme_fits_on_a_screen() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= LIMIT


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken(page, read(page)) == []


def test_a_broken_link_is_found() -> None:
    text = (
        "[a](docs/none.md) [b](docs/results.md#nothing) [c](docs/results.md#efforts) [d](#x)\n# X"
    )
    assert broken(ROOT / "README.md", text) == ["docs/none.md", "docs/results.md#nothing", "#x"]
    assert anchors("# X y, z\n```shell\n# no heading\n```\n") == {"x-y-z"}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_is_python_or_marked_otherwise(page: Path) -> None:
    assert {language for _, language, _ in FENCE.findall(read(page))} <= {"python", "shell", "text"}
    for block in blocks(read(page), "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist(page: Path) -> None:
    """Every command with its options, and every script with its own."""
    for line in "".join(blocks(read(page), "shell")).splitlines():
        said = shlex.split(line, comments=True)
        options = {word for word in said if word.startswith("-")}
        if said[0] == "lowrank":
            assert options <= options_of(said[1]), line
        elif said[0] == "python":
            source = read(ROOT / said[1])
            assert all(f'"{option}"' in source for option in options), line


def options_of(command: str) -> set[str]:
    from typer.main import get_command

    from lowrank.cli import app

    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {option for parameter in found.params for option in parameter.opts}


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(read(ROOT / "README.md"))}
    assert {f"docs/{page.name}" for page in DOCS} <= linked


def test_every_method_and_policy_is_listed() -> None:
    methods = read(ROOT / "docs" / "methods.md") + read(ROOT / "docs" / "convolutions.md")
    for name in (*lowrank.METHODS, "basis-sharing"):
        assert f"`{name}`" in methods
    for name in lowrank.POLICIES:
        assert f"`{name}`" in read(ROOT / "docs" / "policies.md")


@pytest.fixture(scope="module")
def tiny() -> demo.TinyLM:
    """As `demo.tiny_lm()`, with a much smaller model that was never trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer, held_out, text = demo.tiny_lm()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return demo.TinyLM(model, tokenizer, held_out[:2_000], text[:12_000])


def shape(line: str) -> str:
    """What a printed line looks like, whatever its numbers and the widths of its columns are."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,]*(\.\d+)?", "#", line)).strip()


def test_the_first_example_prints_what_the_readme_shows(
    tiny: demo.TinyLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a smaller model: the same lines, with other numbers. If a line of the report has changed,
    run the example and paste what it prints."""
    monkeypatch.setattr(demo, "tiny_lm", lambda: tiny._replace(model=copy.deepcopy(tiny.model)))
    text = read(ROOT / "README.md")
    exec(compile(blocks(text, "python")[0], "README.md", "exec"), {})
    printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
    shown = [shape(line) for line in blocks(text, "text")[0].splitlines() if line != "…"]
    assert [line for line in shown if line not in printed] == []


class Net(nn.Sequential):
    """Convolutions and a linear layer, images (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        )  # fmt: skip


def variables(tiny: demo.TinyLM, page: str) -> dict[str, Any]:
    """What the examples of a page take for granted, made anew for every one of them."""
    import transformers

    torch.manual_seed(0)
    images = torch.randn(24, 3, 8, 8)
    lm = copy.deepcopy(tiny.model)
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False).input_ids)[:512].view(8, 64)
    tokenizer = copy.deepcopy(tiny.tokenizer)  # an example extends it
    given: dict[str, Any] = {
        "torch": torch, "lowrank": lowrank, "model": lm, "tokenizer": tokenizer,
        "texts": [tiny.calibration], "held_out": tiny.held_out, "cnn": Net().eval(),
        "net": Net().eval(), "images": images, "skeleton": Net,
    }  # fmt: skip
    if page != "training.md":
        return given
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))
    x, y = torch.randn(4, 16, 12), torch.randint(5, (4, 16))
    arguments = transformers.TrainingArguments(
        "trained", max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    small, _ = lowrank.compress(lm, 0.5, data=None, copy=True, progress=False)
    return {
        **given, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "criterion": nn.functional.cross_entropy, "loader": list(zip(x, y, strict=True)),
        "transformers": transformers, "lm": lm, "arguments": arguments, "small": small,
        "rows": [{"input_ids": row, "labels": row} for row in ids],
        "fresh": nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)),
    }  # fmt: skip


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporters
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", [p for p in DOCS if blocks(read(p), "python")], ids=named)
def test_the_examples_run(
    page: Path,
    tiny: demo.TinyLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet_transformers: None,
) -> None:
    """All of a page, one after the other; each begins with dense models."""
    monkeypatch.chdir(tmp_path)
    steps = lowrank.Recovery(block_steps=2, distill_steps=2, written=4)
    short = dataclasses.replace(lowrank.EFFORTS["best"], recovery=steps)
    monkeypatch.setitem(lowrank.EFFORTS, "best", short)
    kept: dict[str, Any] = {}
    for number, block in enumerate(blocks(read(page), "python")):
        kept |= variables(tiny, page.name)
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), kept)
