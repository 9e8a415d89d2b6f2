"""What the committed results say of each name: benchmarks/results/*.json, and nothing else.

A results file is read by its reader below. A benchmark or recipe that writes a list `gallery` at
the top of its file needs none: its rows are figures as they stand, with the fields of `Figure` but
`file`.
`python benchmarks/gallery.py --only NAME` writes one for a method, results/gallery/NAME.json.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

KL = "KL, nats per token"
EXCESS = "loss above dense, nats per token"
TOP1 = "top-1, %"
LOG_LOSS = "held-out log-loss"
COSINE = "cosine to the dense embedding"
TIME = "time over the dense layer's"
EQUAL_PARAMETERS = "equal parameters"
EQUAL_BYTES = "equal file bytes"


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        name: of the registry of `kind`; or a rival that is in none, of kind "rivals".
        keep: kept share, of what `setting` says.
        seconds: of the whole compression, where it was timed.
    """

    kind: str
    name: str
    model: str
    setting: str
    keep: float
    measure: str
    value: float
    file: str
    seconds: float | None = None


Made = tuple[str, str, str, str, float, str, float, float | None]  # a Figure without its file
Reader = Callable[[Mapping[str, Any]], Iterator[Made]]

# What benchmarks call a way -> kind and name; what stands for itself is left out.
WAYS = {
    "whitened (SVD-LLM)": ("methods", "whitened"),
    "fast": ("efforts", "fast"),
    "balanced": ("efforts", "balanced"),
    "best": ("efforts", "best"),
    "svd": ("methods", "svd"),
    "whitened": ("methods", "whitened"),
    "MPIFA-like": ("rivals", "MPIFA-like"),
    "AA-SVD-like, rate 0.01": ("rivals", "AA-SVD-like"),
    "AA-SVD-like, rate 0.003": ("rivals", "AA-SVD-like, lower rate"),
    "lowrank-masked, fast": ("methods", "lowrank-masked"),
}
FORMS_OF_CONVOLUTIONS = {
    "channel": "ChannelConv",
    "tucker": "TuckerConv",
    "spatial": "SpatialConv",
    "cp": "CPConv",
}
SPARSE_FORMS = {
    "low rank": "LowRankLinear",
    "dense-sparse, s / r 0.2": "DenseSparseLinear",
    "the same, by columns, 0.2": "SparseDenseLinear",
    "lowrank-sparse, 3 % of inputs": "LowRankSparseLinear",
    "lowrank-2:4": "LowRankMaskedLinear",
    "blast, 8 blocks": "BlastLinear",
}


def quality(model: str, setting: str = EQUAL_PARAMETERS, *, rivals: bool = False) -> Reader:
    """Of benchmarks/quality.py; the mean of its seeds. `rivals`: theirs alone."""

    def read(data: Mapping[str, Any]) -> Iterator[Made]:
        found: dict[tuple[str, float], list[Mapping[str, Any]]] = defaultdict(list)
        for row in data["rows"]:
            if row["method"] in WAYS and (WAYS[row["method"]][0] == "rivals" or not rivals):
                found[row["method"], row["ratio"]].append(row)
        for (method, keep), rows in found.items():
            kl = sum(row["kl"] for row in rows) / len(rows)
            timed = [row["seconds"] for row in rows if "seconds" in row]
            seconds = sum(timed) / len(timed) if timed else None
            yield (*WAYS[method], model, setting, keep, KL, kl, seconds)

    return read


def by_policy(model: str) -> Reader:
    """Of real_llama.py and policies.py: `svd` and `whitened` with each policy."""

    def read(data: Mapping[str, Any]) -> Iterator[Made]:
        for row in data["rows"]:
            common = (row["ratio"], KL, row["kl"], row.get("seconds"))
            if row["policy"] == "uniform":
                yield ("methods", row["method"], model, EQUAL_PARAMETERS, *common)
            setting = f"{EQUAL_PARAMETERS}, with {row['method']}"
            yield ("policies", row["policy"], model, setting, *common)

    return read


def sparse_quality(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        model = {"embedded": "embedded model"}.get(row["model"], row["model"])
        form, _, effort = row["form"].partition(", ")
        kind, name = ("forms", "PivotedLinear") if form == "pivoted" else ("methods", form)
        setting = EQUAL_BYTES + (f", effort {effort}" if effort else "")
        yield (kind, name, model, setting, row["ratio"], KL, row["kl"], row["seconds"])


def rank_and_bits(model: str) -> Reader:
    def read(data: Mapping[str, Any]) -> Iterator[Made]:
        for row in data["rows"]:
            if row["what"] in ("mix", "mix, refitted"):
                refitted = ", refitted" if "refitted" in row["what"] else ""
                yield (
                    "methods", "quantized", model, EQUAL_BYTES + refitted,
                    row["asked"], KL, row["kl"], row["seconds"],
                )  # fmt: skip

    return read


def real_llm(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        if row["way"] in WAYS:
            for text, on in (("wikitext", "WikiText-2"), ("stories", "TinyStories")):
                yield (
                    *WAYS[row["way"]], data["model"], f"{EQUAL_PARAMETERS}, on {on}",
                    row["ratio"], EXCESS, row[text]["excess"], row.get("seconds"),
                )  # fmt: skip


def embeddings(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        if row["targets"] == "pair":
            yield (
                "methods", row["method"], "embedded model", "the tied table alone",
                row["ratio"], KL, row["kl"], None,
            )  # fmt: skip
            if row["method"] == "head-aware":
                yield (
                    "forms", "TiedHead", "embedded model", "the tied table alone, by head-aware",
                    row["ratio"], KL, row["kl"], None,
                )  # fmt: skip


def factorllm(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        if row["way"] in ("coactive", "coactive, the same router"):
            setting = "active neurons, grouped by co-activation"
            yield (
                "forms", "RoutedMLP", "embedded model", setting,
                row["active neurons"], KL, row["kl"], None,
            )  # fmt: skip


def resnet20(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        method, _, policy = row["way"].partition(", ")
        common = (row["keep"], TOP1, row["top1"], row["seconds"])
        if row["way"] == "fast":
            yield ("efforts", "fast", "ResNet-20", EQUAL_PARAMETERS, *common)
        elif row["way"] == "stored, fast":
            setting = f"{EQUAL_PARAMETERS}, effort fast"
            yield ("methods", "two-sided-stored", "ResNet-20", setting, *common)
        elif policy in ("uniform", "spectrum"):
            method = {"whitened channels": "whitened-channel"}.get(method, method)
            ranks = "" if policy == "uniform" else ", with spectrum"
            yield ("methods", method, "ResNet-20", EQUAL_PARAMETERS + ranks, *common)
            setting = f"{EQUAL_PARAMETERS}, with {method}"
            yield ("policies", policy, "ResNet-20", setting, *common)


def sentences(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        if row["way"] in WAYS:
            yield (
                *WAYS[row["way"]], "all-MiniLM-L6-v2", EQUAL_PARAMETERS,
                row["ratio"], COSINE, row["cosine"], row["seconds"],
            )  # fmt: skip


def conv_speed(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        if row["form"] in FORMS_OF_CONVOLUTIONS:
            form = FORMS_OF_CONVOLUTIONS[row["form"]]
            layer = "{0} to {1} channels, {2} × {2}, stride {3}".format(*row["layer"])
            for batch in (1, 64):
                time = row[f"batch {batch}, last"]
                setting = f"products, batch {batch}, channels last"
                yield ("forms", form, layer, setting, row["asked"], TIME, time, None)


def sparse_speed(data: Mapping[str, Any]) -> Iterator[Made]:
    for row in data["rows"]:
        if row["form"] in SPARSE_FORMS:
            layer = f"linear {row['in']} to {row['out']}"
            setting = f"products, {row['tokens']} tokens"
            form = SPARSE_FORMS[row["form"]]
            yield ("forms", form, layer, setting, row["macs"], TIME, row["to_dense"], None)


def speed(data: Mapping[str, Any]) -> Iterator[Made]:
    """Rows such as "pivoted 2048x2048 float32 rank 599"."""
    forms = {"factors": "LowRankLinear", "pivoted": "PivotedLinear"}
    for row in data["rows"]:
        form, _, layer = row["form"].partition(" ")
        if form in forms and "share_of_products" in row:
            share, ratio = row["share_of_products"], row["time_ratio"]
            yield ("forms", forms[form], layer, "products", share, TIME, ratio, None)


def train(data: Mapping[str, Any]) -> Iterator[Made]:
    """Time and memory of a step beside those of dense training."""
    for row in data["rows"]:
        name = row["method"].partition(",")[0]
        if name in ("DLRT", "Maestro", "LoQT", "TuckerDLRT"):
            rest = row["method"].partition(", ")[2]
            setting = f"60 steps{', ' + rest if rest else ''}"
            share = row["settled_to_dense"]
            time = ("time of a step over dense", row["time_to_dense"], None)
            yield ("controllers", name, row["net"], f"memory, {setting}", share, *time)


# In order of preference: the overview shows the first of several figures for the same thing.
READERS: dict[str, tuple[Reader, str]] = {
    "quality_stories260K.json": (quality("stories260K"), "benchmarks/quality.py"),
    "real_llama.json": (by_policy("stories260K"), "benchmarks/real_llama.py"),
    "policies.json": (by_policy("embedded model"), "benchmarks/policies.py"),
    "quality_embedded_fast.json": (quality("embedded model"), "benchmarks/quality.py"),
    "quality_embedded_best.json": (
        quality("embedded model", f"{EQUAL_PARAMETERS}, a quarter of the steps"),
        "benchmarks/quality.py",
    ),
    "quality_embedded_seeds12.json": (
        quality(
            "embedded model",
            f"{EQUAL_PARAMETERS}, two draws, a quarter of the steps",
            rivals=True,
        ),
        "benchmarks/quality.py",
    ),
    **{
        f"quality_{title}_masked.json": (
            quality(model, f"{EQUAL_PARAMETERS}, masks not counted, effort fast"),
            "benchmarks/quality.py",
        )
        for title, model in (("stories260K", "stories260K"), ("embedded", "embedded model"))
    },
    "real_llm_shrunk.json": (real_llm, "benchmarks/real_llm.py"),
    "real_llm.json": (real_llm, "benchmarks/real_llm.py"),
    "resnet20.json": (resnet20, "recipes/compress_resnet_cifar.py"),
    "sparse_quality.json": (sparse_quality, "benchmarks/sparse_quality.py"),
    "rank_and_bits_embedded.json": (rank_and_bits("embedded model"), "benchmarks/rank_and_bits.py"),
    "rank_and_bits_stories260K.json": (rank_and_bits("stories260K"), "benchmarks/rank_and_bits.py"),
    "rank_and_bits_smollm2.json": (rank_and_bits("SmolLM2-135M"), "benchmarks/rank_and_bits.py"),
    "embeddings.json": (embeddings, "benchmarks/embeddings.py"),
    "factorllm.json": (factorllm, "benchmarks/factorllm.py"),
    "sentences.json": (sentences, "benchmarks/sentences.py"),
    "conv_speed.json": (conv_speed, "benchmarks/conv_speed.py"),
    "sparse_speed.json": (sparse_speed, "benchmarks/sparse_speed.py"),
    "speed.json": (speed, "benchmarks/speed.py"),
    "train.json": (train, "benchmarks/train.py"),
}


def figures() -> list[Figure]:
    """All figures of all results."""
    found = []
    for file, (read, _) in READERS.items():
        for *values, seconds in read(_loaded(file)):
            found.append(Figure(*values, file, seconds))
    for path in sorted(RESULTS.rglob("*.json")):
        file = path.relative_to(RESULTS).as_posix()
        data = _loaded(file)
        for row in data.get("gallery", ()) if isinstance(data, dict) else ():
            found.append(Figure(**row, file=file))
    return found


def _loaded(file: str) -> Any:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))
