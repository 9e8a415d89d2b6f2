"""Damage files at random and load them: one LowrankError or a working model, and nothing else.

`python -m tests.fuzz` makes 30,000 mutations of the files of a saved model (`lowrank.json`, the
header and bytes of `model.safetensors`, `config.json`) and of a plan; `--seed` and `--count` choose
others. `tests/test_fuzz.py` makes 300.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank import nn as forms
from tests.limits import limited
from tests.zoo import Custom, make, tokens

SECONDS = 20  # for one mutation: more is a hang
DEEP = 5000
INDEX, WEIGHTS, CONFIG = "lowrank.json", "model.safetensors", "config.json"
FORMS: tuple[Callable[[], nn.Module], ...] = (
    lambda: forms.LowRankLinear(12, 12, 3),
    lambda: forms.PivotedLinear(12, 12, 3),
    lambda: forms.LowRankSparseLinear(12, 12, 3, 2),
    lambda: forms.LowRankMaskedLinear(12, 12, 3, 20),
    lambda: forms.DenseSparseLinear(12, 12, 6, 2),
    lambda: forms.SparseDenseLinear(12, 12, 6, 2),
    lambda: forms.BlastLinear(12, 12, 3, 2),
    lambda: forms.CURLinear(12, 12, 3),
    lambda: forms.BlockLowRankLinear(12, 12, 3, 20, 13),
)


def odd_values(rng: random.Random) -> Any:
    """A value that few people expect."""
    numbers = [0, -1, 1, 2, 3, 2**31, 2**63, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf")]
    texts = ["", "x", "../../x", "/tmp/x", "a.b", "\0", "x" * 999, "LowRankLinear", "TiedHead"]
    others = [None, True, False, [], {}, [[]], [None], {"": {}}, {"type": []}, [1, -1]]
    return copy.deepcopy(rng.choice([*numbers, *texts, *others]))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    keys: Any = value if isinstance(value, dict) else range(len(value))
    for key in list(keys) if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutated_json(rng: random.Random, text: str) -> bytes:
    """The text with one to three entries replaced, removed, moved or added, or with odd bytes."""
    if rng.random() < 0.1:
        return mutated_bytes(rng, text.encode())
    body = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        inside = list(places(body))
        if not inside:
            break
        container, key = rng.choice(inside)
        how = rng.randrange(5)
        if how == 0 and isinstance(container, dict):
            container[rng.choice(["", "x", "type", "shared", "rank", "0"])] = odd_values(rng)
        elif how == 1:
            del container[key]
        elif how == 2:
            other, name = rng.choice(inside)
            if name in other if isinstance(other, dict) else name < len(other):
                container[key] = copy.deepcopy(other[name])
        else:
            container[key] = odd_values(rng)
    said = json.dumps(body)
    if rng.random() < 0.02:
        said = said.replace("null", "[" * DEEP + "]" * DEEP, 1)
        said = "[" * DEEP + said + "]" * DEEP if rng.random() < 0.5 else said
    return said.encode()


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with some flipped, cut, doubled or put in."""
    changed, at = bytearray(data), rng.randrange(max(len(data), 1))
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif how == 1:
        del changed[at:]
    elif how == 2:
        changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 16)))
    else:
        del changed[at : at + rng.randint(1, 64)]
    return bytes(changed)


def mutated_weights(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, or other bytes, a few of them in the tensors."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, data)
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].decode()
    if rng.random() < 0.5:
        kinds = ("F32", "F64", "F16", "BF16", "F8_E4M3", "I8", "I32", "I64", "U8", "BOOL")
        body = json.loads(header)
        entry = body[rng.choice([name for name in body if name != "__metadata__"])]
        entry["dtype"] = rng.choice(kinds)
        header = json.dumps(body)
    else:
        header = mutated_json(rng, header).decode(errors="replace")
    said = header.encode()
    return struct.pack("<Q", len(said)) + said + data[8 + size :]


class Case:
    """A saved model, its files and how to load and run it."""

    def __init__(self, folder: Path, files: dict[str, Callable[..., bytes]], load: Any) -> None:
        self.folder, self.files, self.load = folder, files, load
        self.kept = {name: (folder / name).read_bytes() for name in files}

    def restore(self) -> None:
        for name, data in self.kept.items():
            (self.folder / name).write_bytes(data)


def of_json(rng: random.Random, data: bytes) -> bytes:
    return mutated_json(rng, data.decode())


def net() -> nn.Module:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"embed": nn.Embedding(20, 12), "head": nn.Linear(12, 20)}
    parts["head"].weight = parts["embed"].weight
    parts |= {f"layer{i}": nn.Linear(12, 12) for i in range(len(FORMS))}

    def call(self: Any, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(len(FORMS)):
            x = getattr(self, f"layer{i}")(x)
        return self.head(x)

    return Custom(call, **parts)


def cases(root: Path) -> list[Case]:
    """A module of every stored form, a transformers model, and a plan."""
    ids = torch.arange(200).view(10, 20) % 20
    model: Any = lowrank.compress(net(), rank=4, target_modules=["embed"], data=None)[0]
    for i, form in enumerate(FORMS):
        setattr(model, f"layer{i}", form())
    lowrank.save(model, root / "net")
    small, _ = lowrank.compress(make("llama"), 0.6, data=None, storage="pivoted")
    lowrank.save(small, root / "llama")
    (root / "plan").mkdir()
    plan = lowrank.plan(make("llama"), 0.6, data=None)
    plan.save(root / "plan" / "plan.json")

    def load_net() -> None:
        lowrank.load(root / "net", net)(ids)

    def load_llama() -> None:
        lowrank.from_pretrained(root / "llama")(input_ids=tokens(1, 4))

    def load_plan() -> None:
        lowrank.apply(make("llama"), Plan.load(root / "plan" / "plan.json"), data=None)

    weights = {WEIGHTS: mutated_weights}
    return [
        Case(root / "net", {INDEX: of_json, **weights}, load_net),
        Case(root / "net", {INDEX: of_json, **weights}, load_net),
        Case(root / "llama", {CONFIG: of_json, **weights}, load_llama),
        Case(root / "plan", {"plan.json": of_json}, load_plan),
    ]


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def fuzz(seed: int, count: int) -> tuple[dict[str, int], list[str]]:
    """Returns how often files were refused and accepted, and what went wrong."""
    rng, told, faults = random.Random(seed), {"refused": 0, "accepted": 0}, []
    before = Path.cwd()
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    (root / "empty").mkdir()
    try:
        every = cases(root)
        os.chdir(root / "empty")
        files = listing(root)
        for number in range(count):
            case = rng.choice(every)
            name = rng.choice(list(case.files))
            damaged = case.files[name](rng, case.kept[name])
            (case.folder / name).write_bytes(damaged)
            try:
                with limited(SECONDS):
                    case.load()
                told["accepted"] += 1
            except LowrankError:
                told["refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = f"{number}: {case.folder.name}/{name}"
                faults.append(f"{where}: {type(error).__name__}: {error!s:.200}")
            case.restore()
            if listing(root) != files:
                faults.append(f"{number}: {case.folder.name}/{name}: wrote {listing(root)}")
                files = listing(root)
    finally:
        os.chdir(before)
        shutil.rmtree(root)
    return told, faults


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30_000)
    given = parser.parse_args()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told, faults = fuzz(given.seed, given.count)
    print("\n".join(faults))
    print(f"{given.count} mutations, seed {given.seed}: {told}, {len(faults)} faults, ", end="")
    print(f"{time.perf_counter() - started:.0f} s")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
