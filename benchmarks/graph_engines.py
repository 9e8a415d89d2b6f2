"""Time and size of exported language models, dense against factored, engine by engine.

    python benchmarks/graph_engines.py [--width 1024] [--blocks 4] [--tokens 128] [--rounds 9]

Random Llamas without a cache, float32, two threads, one row: dense, and compressed without data to
0.6 in plain and pivoted storage. Each is written once by `lowrank.export`, and read by ONNX
Runtime, OpenVINO (float32) and ExecuTorch (XNNPACK; its graph is fixed to the largest example, so
that it gets one of its own for each length); transformers runs it as it is, and compiled. Engines
that are not installed are left out. Medians; dense and factored take turns. `off` is the largest
difference from transformers' logits, relative to the largest of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

import lowrank

RATIO, VOCABULARY, MIB = 0.6, 4096, 1 << 20
Run = Callable[[Tensor], Any]
FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "plain": {"storage": "factors"},
    "pivoted": {"storage": "pivoted"},
}


def llama(width: int, blocks: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 128,
        vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def in_transformers(model: nn.Module, folder: Path, ids: Tensor) -> tuple[Run, Path]:
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    return lambda ids: model(input_ids=ids, use_cache=False).logits, folder / "model"


def compiled(model: nn.Module, folder: Path, ids: Tensor) -> tuple[Run, Path]:
    run = torch.compile(model, dynamic=True)
    return lambda ids: run(input_ids=ids, use_cache=False).logits, folder / "model"


def in_onnxruntime(model: nn.Module, folder: Path, ids: Tensor) -> tuple[Run, Path]:
    import onnxruntime

    lowrank.export(model, folder, "onnx", example=ids.repeat(2, 1))  # a size of one is fixed
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)

    def run(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])

    return run, folder / "model.onnx"


def in_openvino(model: nn.Module, folder: Path, ids: Tensor) -> tuple[Run, Path]:
    import openvino

    if not (folder / "model.onnx").exists():
        lowrank.export(model, folder, "onnx", example=ids.repeat(2, 1))
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
    ready = openvino.Core().compile_model(folder / "model.onnx", "CPU", config)
    return lambda ids: torch.from_numpy(ready({"input_ids": ids.numpy()})[0]), folder / "model.onnx"


def in_executorch(model: nn.Module, folder: Path, ids: Tensor) -> tuple[Run, Path]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    methods: dict[int, Any] = {}

    def ready(length: int) -> Any:
        if length not in methods:
            lowrank.export(model, folder, "torch.export", example=ids[:, :length].repeat(2, 1))
            program = torch.export.load(folder / "model.pt2")
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path = folder / f"model{length}.pte"
            path.write_bytes(lowered.to_executorch().buffer)
            held = Runtime.get().load_program(path)
            methods[length] = held, held.load_method("forward")
        return methods[length][1]

    ready(ids.shape[1])
    return lambda ids: ready(ids.shape[1]).execute([ids])[0], folder / f"model{ids.shape[1]}.pte"


ENGINES: dict[str, tuple[str, Callable[[nn.Module, Path, Tensor], tuple[Run, Path]]]] = {
    "transformers": ("transformers", in_transformers),
    "torch.compile": ("torch", compiled),
    "ONNX Runtime": ("onnxruntime", in_onnxruntime),
    "OpenVINO": ("openvino", in_openvino),
    "ExecuTorch": ("executorch", in_executorch),
}


def size(path: Path) -> int:
    parts = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(part.stat().st_size for part in parts)


def milliseconds(run: Run, ids: Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        run(ids)
    return 1000 * (time.perf_counter() - start)


def measured(runs: dict[str, Run], lengths: list[Tensor], rounds: int) -> dict[str, list[float]]:
    """Form -> medians of milliseconds, one a length; the forms take turns."""
    medians: dict[str, list[float]] = {form: [] for form in runs}
    for ids in lengths:
        times: dict[str, list[float]] = {form: [] for form in runs}
        for _ in range(rounds + 2):
            for form, run in runs.items():
                times[form].append(milliseconds(run, ids))
        for form, found in times.items():
            medians[form].append(statistics.median(found[2:]))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    dense = llama(given.width, given.blocks)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, given.tokens), generator=draw)
    models: dict[str, nn.Module] = {"dense": dense}
    for form, options in FORMS.items():
        if options is not None:
            models[form], _ = lowrank.compress(
                llama(given.width, given.blocks), RATIO, data=None, progress=False, **options
            )
    with torch.no_grad():
        wanted = {form: model(input_ids=ids).logits for form, model in models.items()}
    rows = []
    print(f"{'engine':14} {'form':8} {'MiB':>6} {'read ms':>8} {'one ms':>7} {'off':>8}  × dense")
    with tempfile.TemporaryDirectory() as directory:
        for name, (module, build) in ENGINES.items():
            if name not in given.engines or importlib.util.find_spec(module) is None:
                continue
            runs, sizes, off = {}, {}, {}
            for form, model in models.items():
                folder = Path(directory) / form
                folder.mkdir(exist_ok=True)
                with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                    runs[form], path = build(model, folder, ids)
                    found = runs[form](ids)
                    runs[form](ids[:, :1])
                sizes[form] = size(path)
                away = (found - wanted[form]).abs().max() / wanted[form].abs().max()
                off[form] = float(away)
            medians = measured(runs, [ids, ids[:, :1]], given.rounds)
            for form, (read, one) in medians.items():
                times = [of / on for of, on in zip(medians["dense"], (read, one), strict=True)]
                rows.append(
                    {"engine": name, "form": form, "bytes": sizes[form], "read_ms": read,
                     "one_ms": one, "off": off[form], "read_times": times[0], "one_times": times[1]}
                )  # fmt: skip
                print(
                    f"{name:14} {form:8} {sizes[form] / MIB:6.0f} {read:8.1f} {one:7.1f} "
                    f"{off[form]:8.1e}  {times[0]:.2f} {times[1]:.2f}",
                    flush=True,
                )
    keep("graph_engines", rows, width=given.width, blocks=given.blocks, tokens=given.tokens)


if __name__ == "__main__":
    main()
