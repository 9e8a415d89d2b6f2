"""Models of transformers as graphs: other batches and lengths than the example's, and a cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.io import export
from tests import zoo
from tests.zoo import said

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SIZES = [(1, 3), (3, 17), (2, 9)]


@cache
def compressed(kind: str, storage: str = "pivoted") -> Any:
    model = zoo.make(kind).eval()
    return lowrank.compress(model, 0.6, data=None, method="svd", storage=storage, progress=False)[0]


def text(rows: int, length: int) -> dict[str, Tensor]:
    """Ids with padding on the left of all rows but the first."""
    ids = zoo.tokens(rows, length)
    mask = torch.ones_like(ids)
    mask[1:, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loaded(folder: Path) -> Any:
    program = torch.export.load(folder / "model.pt2").module()
    return lambda given: program(**given)


def close(found: Any, wanted: Any, mask: Tensor | None = None) -> None:
    keep = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[keep], wanted[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "mixtral"])
def test_language_models_at_other_sizes(kind: str, tmp_path: Path) -> None:
    model = compressed(kind)
    export(model, tmp_path, "torch.export", example=text(2, 9))
    run = loaded(tmp_path)
    with torch.no_grad():
        for size in SIZES:
            given = text(*size)
            found = run(given)
            assert set(found) == {"logits"}  # no cache
            close(found["logits"], model(**given).logits, given["attention_mask"])


def test_encoders_at_other_sizes(tmp_path: Path) -> None:
    model = compressed("bert")
    export(model, tmp_path, "torch.export", example=text(2, 9))
    run = loaded(tmp_path)
    with torch.no_grad():
        for size in SIZES:
            given = text(*size)
            want = model(**given)
            found = run(given)
            assert set(found) == {k for k, v in want.items() if isinstance(v, Tensor)}
            for key, tensor in found.items():
                close(tensor, want[key])


def test_images_and_a_bare_tensor(tmp_path: Path) -> None:
    """One tensor is the model's main input."""
    model, x = compressed("vit"), zoo.example("vit")
    export(model, tmp_path, "torch.export", example=x)
    more = torch.cat([x, -x, x])
    with torch.no_grad():
        for key, tensor in loaded(tmp_path)({"pixel_values": more}).items():
            close(tensor, model(more)[key])


def test_a_cache_is_read_and_written(tmp_path: Path) -> None:
    model = compressed("llama")
    export(model, tmp_path, "torch.export", example=text(2, 9), cache=True)
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for rows, length, more in [(1, 3, 1), (3, 17, 5), (2, 9, 1)]:
            given = text(rows, length + more)
            before = {key: value[:, :length] for key, value in given.items()}
            held = model(**before, use_cache=True).past_key_values
            past = [(layer.keys, layer.values) for layer in held.layers]
            inputs = {**given, "input_ids": given["input_ids"][:, length:]}
            logits, present = program(inputs=inputs, past=past)
            want = model(**given, use_cache=True)
            close(logits, want.logits[:, length:])
            assert present[0][0].shape[2] == length + more
            real = given["attention_mask"][:, None, :, None].expand_as(present[1][1])
            close(present[1][1], want.past_key_values.layers[1].values, real)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = compressed("llama").train()
    export(model, tmp_path, "torch.export", example=text(2, 9))
    assert all(part.training for part in model.modules())
    assert model.config.use_cache
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = compressed(kind)
    export(model, tmp_path, "onnx", example=text(2, 9))
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    names = [o.name for o in session.get_outputs()]
    for size in SIZES:
        given = text(*size)
        found = session.run(None, {key: value.numpy() for key, value in given.items()})
        with torch.no_grad():
            want = model(**given)
        for name, array in zip(names, found, strict=True):
            mask = given["attention_mask"] if kind == "llama" else None
            close(torch.from_numpy(array), want[name], mask)


@pytest.mark.slow
def test_onnx_with_a_cache(tmp_path: Path) -> None:
    """From no token on, as a runtime that generates begins."""
    runtime = pytest.importorskip("onnxruntime")
    model = compressed("llama", "factors")
    export(model, tmp_path, "onnx", example=text(2, 9), cache=True)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    shapes = {i.name: i.shape for i in session.get_inputs()}
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    assert list(past)[:2] == ["past_key_values.0.key", "past_key_values.0.value"]
    ids = zoo.tokens(1, 8)
    outputs = [o.name for o in session.get_outputs()]
    with torch.no_grad():
        want = model(ids).logits
    for step in range(8):
        given = {
            "input_ids": ids[:, step : step + 1].numpy(),
            "attention_mask": np.ones((1, step + 1), np.int64),
        }
        found = dict(zip(outputs, session.run(None, {**given, **past}), strict=True))
        close(torch.from_numpy(found["logits"])[:, 0], want[:, step])
        past = {name: found[name.replace("past_key_values", "present")] for name in past}


# What is refused


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="Branching cannot be traced") as caught:
        export(Branching(), tmp_path / "out", "torch.export", example=torch.ones(2, 2))
    said(caught)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else(tmp_path: Path) -> None:
    class Frozen(nn.Module):
        """Traced with values that are others when it runs."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Frozen.calls += 1
            return x * Frozen.calls

    with pytest.raises(LowrankError, match="the graph differs from the model by") as caught:
        export(Frozen(), tmp_path / "out", "torch.export", example=torch.ones(2, 2))
    said(caught)


def test_a_cache_where_there_is_none(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(LowrankError, match="cache is for language models of transformers"):
        export(net, tmp_path, "torch.export", example=torch.ones(2, 2), cache=True)
    with pytest.raises(LowrankError, match="cache is for a graph"):
        export(net, tmp_path, cache=True)
    with pytest.raises(LowrankError, match="input_ids of at least four tokens"):
        export(compressed("llama"), tmp_path, "torch.export", example=text(2, 3), cache=True)
