"""Run by test_registration.py in new processes: `orders.py <what> <folder>` prints one JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

TARGET = "transformers.quantizers.auto"


def lowrank_first(folder: Path) -> dict[str, object]:
    import lowrank

    found: dict[str, object] = {"imported": "transformers" in sys.modules, "finders": finders()}
    importlib.reload(lowrank)
    found["finders_reloaded"] = finders()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    found["finders_after"] = finders()
    found["loader"] = type(sys.modules[TARGET].__spec__.loader).__name__
    importlib.reload(lowrank)
    importlib.reload(sys.modules["lowrank.io.import_hooks"])
    importlib.reload(sys.modules["lowrank.io.registration"]).install()
    again = AutoModelForCausalLM.from_pretrained(folder / "llama")
    return {**found, "error": error(model, folder, "llama"), "again": error(again, folder, "llama")}


def transformers_first(folder: Path) -> dict[str, object]:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import auto

    before = "lowrank" in auto.AUTO_QUANTIZER_MAPPING
    import lowrank  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder / "gpt2")
    return {"before": before, "finders": finders(), "error": error(model, folder, "gpt2")}


def without_lowrank(folder: Path) -> dict[str, object]:
    """First the refusal, then trust_remote_code, which imports lowrank."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder / "llama")
        said = ""
    except RuntimeError as refusal:
        said = str(refusal)
    found: dict[str, object] = {"said": said, "imported": "lowrank" in sys.modules}
    for kind in ("llama", "mixtral"):
        model = AutoModelForCausalLM.from_pretrained(folder / kind, trust_remote_code=True)
        model.save_pretrained(folder / f"{kind}-again")
        found[kind] = error(model, folder, kind)
        found[f"{kind}_class"] = f"{type(model).__module__}.{type(model).__name__}"
        again = AutoModelForCausalLM.from_pretrained(folder / f"{kind}-again")
        found[f"{kind}_again"] = error(again, folder, kind)
    return found


def stock(folder: Path) -> dict[str, object]:
    """A script that never names lowrank, where it is installed; then it saves and loads again."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "packaging"))
    import _lowrank_autoload  # what lowrank_autoload.pth does at every start

    found: dict[str, object] = {"early": "torch" in sys.modules or "lowrank" in sys.modules}
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    found["error"], found["left"] = error(model, folder, "llama"), finders()
    found["waits"] = _lowrank_autoload.Finder in sys.meta_path
    model.save_pretrained(folder / "stock")
    again = AutoModelForCausalLM.from_pretrained(folder / "stock")
    return {**found, "again": error(again, folder, "llama")}


def hf_first(folder: Path) -> dict[str, object]:
    """Our transformers classes are imported before transformers' quantizers are."""
    import warnings

    warnings.simplefilter("error")
    import lowrank  # noqa: F401
    from lowrank.io.hf import LowRankConfig

    warnings.simplefilter("default")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    ours = type(model.config.quantization_config) is LowRankConfig
    return {"error": error(model, folder, "llama"), "ours": ours}


def no_transformers(folder: Path) -> dict[str, object]:
    """Everything but transformers models works where transformers is not installed."""
    sys.modules["transformers"] = None  # type: ignore[assignment]
    import torch

    import lowrank.io
    from lowrank.nn import LowRankLinear

    layer = LowRankLinear.from_factors(torch.ones(2, 5), torch.ones(7, 2), None)
    lowrank.io.save(torch.nn.Sequential(layer), folder / "net")
    skeleton = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False))
    loaded = lowrank.io.load(folder / "net", skeleton)
    try:
        lowrank.io.from_pretrained(folder / "llama")
        said = ""
    except lowrank.io.checkpoint.LowrankError as error:
        said = str(error)
    return {"output": loaded(torch.ones(5)).sum().item(), "said": said, "finders": finders()}


def finders() -> int:
    return sum(type(finder).__module__ == "lowrank.io.import_hooks" for finder in sys.meta_path)


def error(model, folder: Path, kind: str) -> float:  # type: ignore[no-untyped-def]
    import torch

    tokens = torch.arange(14).reshape(2, 7) % 59 + 2
    with torch.no_grad():
        got = model(input_ids=tokens).logits
    return (got - torch.load(folder / f"{kind}.pt")).abs().max().item()


if __name__ == "__main__":
    result = globals()[sys.argv[1]](Path(sys.argv[2]))
    print("\n" + json.dumps(result))
