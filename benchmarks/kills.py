"""kill -9 at random moments of a compression from folder to folder, and the same command again.

    python benchmarks/kills.py [--times 10] [--seed 0] [--effort fast]

The model inside the package, keep 0.6, rows of its own calibration text. Each time a call is killed
at a random moment of its run, and run again to its end; every file of the model must be the bytes
of an undisturbed run, and the report but for seconds and memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import keep

ROWS = 64
RUN = """
import sys, torch, lowrank
from lowrank import demo
torch.set_num_threads(1)
tiny = demo.tiny_lm()
ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
rows = ids[: {rows} * 256].view({rows}, 256)
lowrank.compress(sys.argv[1], 0.6, data=list(rows.split(16)), out=sys.argv[2], effort={effort!r},
                 progress=False)
"""


def started(source: Path, out: Path, effort: str) -> subprocess.Popen[bytes]:
    code = RUN.format(rows=ROWS, effort=effort)
    own = [sys.executable, "-c", code, str(source), str(out)]
    return subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def printed(out: Path) -> dict[str, str]:
    """Digests of an output's files; of the report without what a clock or the memory decides."""
    found = {}
    for path in sorted(out.iterdir()):
        content = path.read_bytes()
        if path.name == "report.json":
            body = json.loads(content)
            for name in ("seconds", "stages"):
                body.pop(name, None)
            for layer in body["sites"]:
                layer.pop("seconds", None)
            content = json.dumps(body, sort_keys=True).encode()
        if path.suffix != ".md":  # the card tells the seconds
            found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", default="fast")
    given = parser.parse_args()
    from lowrank import demo

    draw, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory(dir=".") as directory:
        source, whole = Path(directory) / "dense", Path(directory) / "whole"
        demo.tiny_lm().model.save_pretrained(source)
        began = time.perf_counter()
        if started(source, whole, given.effort).wait():
            raise SystemExit("the undisturbed run failed")
        seconds, expected = time.perf_counter() - began, printed(whole)
        print(f"undisturbed: {seconds:.0f} s, {len(expected)} files")
        for number in range(given.times):
            out = Path(directory) / f"out{number}"
            process = started(source, out, given.effort)
            after = draw.uniform(0.1, 0.95) * seconds
            try:
                process.wait(timeout=after)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            journal = out.parent / f".{out.name}.unfinished" / "journal.jsonl"
            pieces = len(journal.read_text().splitlines()) if journal.is_file() else 0
            code = started(source, out, given.effort).wait()
            same = code == 0 and printed(out) == expected
            left = [path.name for path in out.parent.iterdir() if path.name.startswith(".")]
            rows.append({"after": after, "pieces": pieces, "same": same, "left": left})
            print(
                f"killed after {after:5.1f} s, {pieces} pieces finished: "
                f"{'the same bytes' if same else f'DIFFERENT (exit {code})'}{' '.join(left)}",
                flush=True,
            )
    same = sum(bool(row["same"]) for row in rows)
    print(f"{same} of {len(rows)} end in the same bytes")
    keep("kills", rows, effort=given.effort)


if __name__ == "__main__":
    main()
