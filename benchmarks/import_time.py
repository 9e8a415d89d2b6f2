"""What `import lowrank` costs over `import torch`: medians of paired fresh processes.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from machine import keep

MEASURE = """
import time
import torch
started = time.perf_counter()
import lowrank
print(time.perf_counter() - started)
import sys
heavy = ("transformers", "accelerate", "matplotlib", "rich", "typer")
print(sorted(name for name in heavy if name in sys.modules))
"""


def main() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for _ in range(7)
    ]
    seconds = [float(lines[0]) for lines in runs]
    print(f"import lowrank after import torch: {statistics.median(seconds):.3f} s")
    print(f"heavy libraries loaded by it: {runs[0][1]}")
    keep("import_time", {"seconds": seconds, "loaded": runs[0][1]})


if __name__ == "__main__":
    main()
