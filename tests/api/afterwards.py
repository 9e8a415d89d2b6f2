"""Run by test_families.py in a new process: `afterwards.py <folder>` prints one JSON object.

Of every saved model inside the folder: whether it gives the outputs that were saved beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def outcome(folder: Path) -> dict[str, object]:
    """Loaded by stock transformers; the class is the one that config.json names."""
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    seen = torch.load(folder / "seen.pt")
    with torch.no_grad():
        logits = model(**seen["batch"]).logits
    # Memory-mapped weights are aligned otherwise, and some CPUs' products then round otherwise.
    rounding = 1e-6 * float(seen["logits"].abs().max())
    loaded = model.state_dict()
    found: dict[str, object] = {
        "same weights": all(torch.equal(loaded[key], w) for key, w in seen["weights"].items()),
        "keys": [sorted(info["missing_keys"]), sorted(info["unexpected_keys"])],
        "equal": torch.allclose(logits, seen["logits"], rtol=0, atol=rounding),
        "factored": sum(type(part).__module__.startswith("lowrank.") for part in model.modules()),
    }
    if "written" in seen:
        written = model.generate(**seen["prompt"], **seen["how"])
        found["written"] = torch.equal(written, seen["written"])
    return found


if __name__ == "__main__":
    import lowrank  # noqa: F401  (what registers the format)

    result = {p.parent.name: outcome(p.parent) for p in Path(sys.argv[1]).glob("*/config.json")}
    print("\n" + json.dumps(result))
