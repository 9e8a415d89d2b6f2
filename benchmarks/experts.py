"""KL of ways to compress the experts of a small trained mixture, at equal stored parameters.

    python recipes/train_tiny_lm.py --out MIXTURE --experts 8 --tokens-per-parameter 2
    python benchmarks/experts.py MIXTURE [--ratios 0.8 0.6 0.4] [--only NAME …]
    python benchmarks/experts.py --speed

Calibrated on rows of 256 tokens of the mixture's own calibration text, judged on its held-out text;
float32, two threads. Ratios are of the targets: all experts and the attention. `--speed`: time of
random mixtures of 8, 64 and 128 experts (two blocks of width 512, experts of width 256, two a
token), factored at 0.5 without data, beside the dense ones; 8 rows of 256 tokens, medians of 9
alternating runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from expert_rivals import RIVALS, Way
from machine import keep

import lowrank
from lowrank import Recovery, demo
from lowrank.demo import judge
from lowrank.walk.surgery import copied

PLAIN = {"policy": "uniform", "storage": "factors"}
WAYS: dict[str, dict[str, Any]] = {
    "SVD of each expert": {"method": "svd", **PLAIN},
    "whitened, each expert": {"method": "whitened", **PLAIN},
    "whitened, pivoted": {"method": "whitened", "policy": "uniform", "storage": "pivoted"},
    "MPIFA-like": {
        "method": "whitened", "policy": "uniform", "storage": "pivoted",
        "effort": Recovery(
            dense=0.25, sums=False, shrinkage=0.0, temperature=False
        ),
    },
    "default": {},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
}  # fmt: skip


def with_rival(model: Any, calibration: Any, way: Way, ratio: float, data: Any) -> Any:
    """The experts in a rival's way, attention whitened and pivoted, both at the ratio; None where
    the rival cannot be that small. The numbers of a rival's weights are counted, not stored."""
    small = copied(model)
    for name, parameter in small.named_parameters():
        if parameter.ndim != 3:
            continue
        layers = [calibration.statistics[f"{name}.{e}"] for e in range(len(parameter))]
        if any(layer.gram is None for layer in layers):
            raise SystemExit(f"an expert of {name} was given no token")
        grams = torch.stack([layer.gram.double() for layer in layers])
        counts = torch.tensor([layer.count for layer in layers], dtype=torch.float64)
        found = way(parameter.detach().double(), grams, counts, ratio)
        if found is None:
            return None
        parameter.data.copy_(found)
    options = {"method": "whitened", "policy": "uniform", "storage": "pivoted", "align": 1}
    attention = r".*self_attn.*"
    return lowrank.compress(
        small, ratio, data=data, target_modules=attention, progress=False, **options
    )[0]


def speed() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    rows = []
    for experts in (8, 64, 128):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=1024, hidden_size=512, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=8, num_key_value_heads=4, num_local_experts=experts,
            num_experts_per_tok=2, dtype=torch.bfloat16,
        )  # fmt: skip
        model = MixtralForCausalLM(config).to(torch.bfloat16).eval()
        small, _ = lowrank.compress(model, 0.5, data=None, copy=True, progress=False)
        ids = torch.randint(0, 1024, (8, 256), generator=torch.Generator().manual_seed(0))
        found = lowrank.benchmark(small, ids, reference=model, repeats=9)
        assert found.reference is not None
        tokens = {"dense": found.reference.tokens_per_s, "factored": found.tokens_per_s}
        rows.append({"experts": experts, **tokens, "time_ratio": found.time_ratio or 0.0})
        print(rows[-1], flush=True)
    keep("experts_speed", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixture", type=Path, nargs="?")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.speed:
        speed()
        return
    if given.mixture is None:
        parser.error("name the folder of a mixture, or --speed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(given.mixture, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.mixture)
    texts = [(given.mixture / f"{n}.txt").read_text("utf-8") for n in ("heldout", "calibration")]
    held = demo.held_out_rows(demo.TinyLM(model, tokenizer, *texts))
    ids = torch.tensor(tokenizer(texts[1], verbose=False)["input_ids"])
    data = [ids[: len(ids) // 256 * 256].view(-1, 256)]
    calibration = lowrank.calibrate(model, data, hold_out=0.2, progress=False)
    counts = [s.count for n, s in calibration.statistics.items() if ".experts.gate_up_proj." in n]
    print(f"{len(counts)} experts, given {min(counts):,} to {max(counts):,} tokens")
    names = given.only or [*WAYS, *RIVALS]
    ways = {name: WAYS[name] for name in names if name in WAYS}
    rows = []
    for ratio in given.ratios:
        for name, options in ways.items():
            start = time.perf_counter()
            source: Any = None if options.get("method") == "svd" else data
            small, report = lowrank.compress(
                model, ratio, data=source, copy=True, align=1, progress=False, **options
            )
            seconds = time.perf_counter() - start
            _, (perplexity, kl) = judge([model, small], held)
            row = {"ratio": ratio, "way": name, "kl": kl, "perplexity": perplexity}
            rows.append({**row, "kept": report.achieved, "seconds": seconds})
            print(f"{ratio:4} {name:24} KL {kl:.4f}  ppl {perplexity:7.2f}  {seconds:5.0f} s",
                  flush=True)  # fmt: skip
        for name in (name for name in names if name in RIVALS):
            start = time.perf_counter()
            rival = with_rival(model, calibration, RIVALS[name], ratio, data)
            seconds = time.perf_counter() - start
            if rival is None:
                print(f"{ratio:4} {name:24} cannot be that small", flush=True)
                continue
            _, (perplexity, kl) = judge([model, rival], held)
            row = {"ratio": ratio, "way": name, "kl": kl, "perplexity": perplexity}
            rows.append({**row, "kept": ratio, "seconds": seconds})
            print(f"{ratio:4} {name:24} KL {kl:.4f}  ppl {perplexity:7.2f}  {seconds:5.0f} s",
                  flush=True)  # fmt: skip
    if not given.only:
        keep("experts", rows, tokens=[min(counts), max(counts)])


if __name__ == "__main__":
    main()
