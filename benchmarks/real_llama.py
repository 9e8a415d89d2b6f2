"""A real Llama, end to end: KL per method and policy, then save, reload elsewhere and continue.

    LOWRANK_ASSETS=… python benchmarks/real_llama.py

Protocol: stories260K, its own samples tokenised in one call and cut into 287 rows of 257; the first
172 rows calibrate, the last 115 evaluate; input row[:-1], fp32, mean KL over all positions, no
rank alignment. Whitened SVD with uniform ranks has a known optimum: 1.960 at 0.8, 3.321 at 0.6.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import keep
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank

CONTINUE = """
import sys, lowrank, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([tokenizer("Once upon a time").input_ids])
out = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False, pad_token_id=2)
print(tokenizer.decode(out[0], skip_special_tokens=True))
print(float(model(input_ids=ids).logits.double().sum()))
"""


def main() -> None:
    assets = os.environ.get("LOWRANK_ASSETS")
    if not assets:
        raise SystemExit("set LOWRANK_ASSETS to a folder that holds stories260K/ and text/")
    torch.set_num_threads(2)
    source = Path(assets) / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = (Path(assets) / "text" / "stories260K_selfgenerated.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    rows = ids[: 287 * 257].view(287, 257)[:, :-1]
    calibration, held_out = list(rows[:172].split(43)), list(rows[172:].split(23))
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen = lowrank.with_fisher(dense, lowrank.calibrate(dense, calibration, progress=False))
    found = []
    print(f"{'method':13} {'policy':10} {'keep':>5} {'kept':>7} {'KL':>8} {'seconds':>8}")
    for method, policy in (
        ("svd", "uniform"),
        ("fwsvd", "uniform"),
        ("whitened", "uniform"),
        ("two-sided", "uniform"),
        ("whitened", "energy"),
        ("whitened", "welore"),
        ("whitened", "spectrum"),
        ("basis-sharing", "uniform"),
        ("basis-sharing", "energy"),
        ("basis-sharing", "spectrum"),
        ("svd", "welore"),
        ("svd", "spectrum"),
    ):
        for ratio in (0.8, 0.6, 0.4):
            model, report = lowrank.compress(
                dense, ratio, method=method, policy=policy, data=seen, align=1, copy=True,
                progress=False,
            )  # fmt: skip
            divergence = lowrank.kl(model, dense, held_out)
            print(
                f"{method:13} {policy:10} {ratio:5.1f} {report.achieved:7.4f} {divergence:8.4f} "
                f"{report.seconds:8.2f}"
            )
            found.append(
                {
                    "method": method, "policy": policy, "ratio": ratio, "kl": divergence,
                    "kept": report.achieved, "seconds": report.seconds,
                }
            )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model, _ = lowrank.compress(
            dense, 0.8, method="whitened", data=seen, copy=True, progress=False
        )
        lowrank.save(model, folder, tokenizer=tokenizer)
        done = subprocess.run(
            [sys.executable, "-c", CONTINUE, folder], capture_output=True, text=True, check=True
        )
        story, total = done.stdout.strip().rsplit("\n", 1)
        prompt = torch.tensor([tokenizer("Once upon a time").input_ids])
        here = float(model(input_ids=prompt).logits.double().sum())
        print(f"\nreloaded in a new process, logits equal: {here == float(total)}\n{story}")
    keep("real_llama", found, continuation=story, logits_equal=here == float(total))


if __name__ == "__main__":
    main()
