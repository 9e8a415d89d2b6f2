"""One dense model, its compressed form and a text, for all tests of the commands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from .helpers import LINES, run, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders: dense, its compressed form out, and text, a file. Nobody writes into them."""
    root = tmp_path_factory.mktemp("cli")
    dense, out, text = root / "dense", root / "out", root / "text.txt"
    tiny_llama().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text.write_text("\n".join(LINES * 3), encoding="utf-8")
    said = run(
        "compress", dense, "--ratio", 0.6, "--method", "whitened", "--data", text, "--out", out,
        "--align", 1, "--length", 32,
    )  # fmt: skip
    return SimpleNamespace(dense=dense, out=out, text=text, said=said)
