"""Which tool takes which form: benchmarks/results/matrix.json, and what vLLM's plug-in serves."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lowrank.engines.fused import SERVED

from .figures import RESULTS

# Forms as that file calls them. What is not in it was not tried there.
TRIED = {
    "plain": "LowRankLinear",
    "pivoted": "PivotedLinear",
    "table": "LowRankEmbedding",
    "shared basis": "SharedLowRankLinear",
    "low rank and columns": "LowRankSparseLinear",
    "low rank and entries": "LowRankMaskedLinear",
    "low rank and 2:4": "LowRankMaskedLinear",
    "dense-sparse": "DenseSparseLinear",
    "blast": "BlastLinear",
    "columns and rows": "CURLinear",
    "integers": "QuantizedLinear",
    "convolution by channels": "ChannelConv",
    "convolution by axes": "SpatialConv",
    "Tucker": "TuckerConv",
    "convolution by frequencies": "TubalConv",
}
# Columns of that file -> headings here.
TOOLS = {
    "save, load": "transformers",
    "generate": "generate",
    "compile": "torch.compile",
    "torch.export": "torch.export",
    "ONNX": "ONNX Runtime",
    "int8": "torchao int8",
    "LoRA, merge": "peft LoRA",
    "FSDP2": "FSDP2",
}
VLLM = "vLLM"


def support() -> dict[str, dict[str, str]]:
    """By form and tool: "yes", "3 of 4" (architectures on which it works), or "no".

    An architecture counts where it has layers of that form, and can do what the tool is asked for:
    a network of images writes no text.
    """
    counted: dict[str, dict[str, list[bool]]] = {}
    for row in json.loads((RESULTS / "matrix.json").read_text(encoding="utf-8")):
        form = counted.setdefault(TRIED[row["form"]], {tool: [] for tool in TOOLS})
        if isinstance(row["cells"], Mapping):
            for tool in TOOLS:
                cell = row["cells"].get(tool, "-")
                if cell not in ("-", "writes no text"):
                    form[tool].append(cell == "yes")
    served = {cls.__name__ for cls in SERVED}
    return {
        form: {
            **{TOOLS[tool]: _said(works) for tool, works in tools.items()},
            VLLM: "yes" if form in served else "no",
        }
        for form, tools in counted.items()
    }


def _said(works: list[bool]) -> str:
    if not works:
        return "not tried"
    if all(works):
        return "yes"
    return f"{sum(works)} of {len(works)}" if any(works) else "no"
