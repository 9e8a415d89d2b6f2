"""vLLM's own engine on the folders of `tests.engines.served`: the same greedy tokens.

    python tests/engines/check_vllm.py FOLDER

Runs in the environment that `make vllm-check` makes, where lowrank is installed and its tests are
not. The last check starts the server, and asks it over HTTP.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 4,
}  # fmt: skip
PORT = 8187


def engine_tokens(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    engine = LLM(str(folder), **OPTIONS)
    greedy = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
    asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
    return [list(o.outputs[0].token_ids) for o in engine.generate(asked, greedy, use_tqdm=False)]


def served_tokens(folder: Path, prompt: list[int], new: int) -> list[int]:
    """What `vllm serve` starts; the wheel for CPUs lacks the metadata that this command reads."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(PORT), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", "--max-num-seqs", "4"]
    with subprocess.Popen(command) as server:
        try:
            _wait(f"http://localhost:{PORT}/health", server)
            body = {
                "model": str(folder), "prompt": prompt, "max_tokens": new, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True,
            }  # fmt: skip
            asked = urllib.request.Request(
                f"http://localhost:{PORT}/v1/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(asked) as answer:
                return list(json.load(answer)["choices"][0]["token_ids"])
        finally:
            server.terminate()


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server ended with {server.returncode}")


def main() -> None:
    faults = 0
    places = sorted(path.parent for path in Path(sys.argv[1]).glob("*/tokens.json"))
    for place in places:
        known = json.loads((place / "tokens.json").read_text())
        prompts, wanted = known["prompts"], known["tokens"]
        found = engine_tokens(place, prompts, len(wanted[0]))
        faults += said(place.name, found, wanted)
    found = [served_tokens(place, prompts[0], len(wanted[0]))]
    faults += said(f"{place.name}, over HTTP", found, wanted[:1])
    raise SystemExit(faults)


def said(name: str, found: list[list[int]], wanted: list[list[int]]) -> int:
    """Print how many tokens are equal, from the first on; 1 if not all are."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(f, w, strict=True)) if a != b), len(w))
        for f, w in zip(found, wanted, strict=True)
    ]
    print(f"{name}: equal tokens {equal} of {[len(w) for w in wanted]}", flush=True)
    return int(found != wanted)


if __name__ == "__main__":
    main()
