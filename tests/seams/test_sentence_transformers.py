"""A SentenceTransformer is compressed, saved and loaded by its own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

import lowrank
from lowrank.nn import is_factored
from tests import zoo

TEXTS = ["w1 w2 w3", "w5 w6"]


@pytest.fixture
def embedder(tmp_path: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    tf.BertModel(zoo.make("bert").config).save_pretrained(tmp_path / "bert")
    tf.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return SentenceTransformer(modules=[Transformer(str(tmp_path / "bert")), Pooling(zoo.WIDTH)])


def test_it_comes_back_as_it_was(embedder: Any, tmp_path: Path) -> None:
    lean, report = lowrank.compress(embedder, 0.5, data=None, progress=False)
    assert report.achieved <= 0.5
    lean.save(str(tmp_path / "lean"))
    again = SentenceTransformer(str(tmp_path / "lean"))
    assert any(map(is_factored, again.modules()))
    assert np.array_equal(again.encode(TEXTS), lean.encode(TEXTS))
