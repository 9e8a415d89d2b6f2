"""What is finished of a long call, kept in a folder, so that it can go on after a kill.

`journal.jsonl` has one line a finished piece, with the digest of its file. A piece is written whole
before its line: what has no line, or another digest, was not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.digests import write_whole
from ..io.tensors import sha256
from ..linalg.mapped import settled
from ..nn import build, describe
from ..nn.form import Form

NAME = "journal.jsonl"


@dataclass
class Journal:
    """The finished pieces of one call, by name.

    Attributes:
        folder: which exists.
        pieces: digest of each piece's file.
    """

    folder: Path
    pieces: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """The journal of a folder, as far as it was written."""
        pieces = {}
        path = folder / NAME
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                pieces[str(entry["done"])] = str(entry["sha256"])
            except (ValueError, KeyError, TypeError):  # the last line may be cut
                break
        return cls(folder, pieces)

    def finished(self, name: str, path: Path) -> None:
        """Note that a piece lies whole in its file."""
        self.pieces[name] = sha256(path)
        line = json.dumps({"done": name, "file": path.name, "sha256": self.pieces[name]})
        with (self.folder / NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, name: str, path: Path) -> bool:
        """Whether a piece was finished and its file is as it was."""
        return name in self.pieces and path.is_file() and sha256(path) == self.pieces[name]

    def keep_layers(
        self,
        name: str,
        layers: Mapping[str, nn.Module],
        vectors: Mapping[str, Tensor],
        about: Mapping[str, Any],
    ) -> None:
        """Keep a finished block.

        Args:
            layers: its factored layers, by name in the model.
            vectors: its other trained tensors, by name in the model.
            about: what else is to be known of it, as JSON.
        """
        specs = {n: describe(m) if isinstance(m, Form) else None for n, m in layers.items()}
        if None in specs.values():
            return  # a method's own module, which no spec describes: this block is done again
        tensors = {f"layer {n} {key}": t for n, m in layers.items() for key, t in _state(m).items()}
        tensors |= {f"vector {n}": t.detach() for n, t in vectors.items()}
        path = self._path(name)
        body = {"layers": specs, "about": dict(about)}
        write_whole(path, {"body": json.dumps(body)}, {k: _own(t) for k, t in tensors.items()})
        self.finished(name, path)

    def layers(
        self, name: str
    ) -> tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Any]] | None:
        """What was kept of a block: layers, vectors, and what is to be known; None if nothing."""
        from safetensors.torch import load_file, safe_open

        path = self._path(name)
        if not self.has(name, path):
            return None
        with safe_open(path, framework="pt") as file:
            body = json.loads((file.metadata() or {})["body"])
        tensors = load_file(path)
        layers: dict[str, nn.Module] = {}
        for layer, spec in body["layers"].items():
            new = build(spec, layer)
            start = f"layer {layer} "
            state = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
            new.load_state_dict(state, assign=True)
            layers[layer] = settled(new)
        start = "vector "
        vectors = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        return layers, vectors, body["about"]

    def _path(self, name: str) -> Path:
        return self.folder / f"block-{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in module.state_dict().items() if isinstance(t, Tensor)}


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own, as safetensors wants it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
