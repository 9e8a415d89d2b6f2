"""A network as a seed and a short vector: a file of kilobytes, from which its weights are computed.

θ = θ₀ + λ · (P z): P is a random projection (`linalg.projections`) and θ₀ an initialisation, both
drawn from the seed, or θ₀ is a model that the reader has (PRANC, arXiv 2206.08464; SAID, arXiv
2012.13255). Norms, buffers and frozen parameters are stored as they are. All draws are integers
from a counter, all sums are in one order: the weights are the same bytes on every machine, whatever
the number of threads and the version of torch, which is not so for generators on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed, unknown
from ..linalg import counter, projections
from ..nn.children import is_sharded
from ..walk import layouts
from ..walk.checks import check_module
from ..walk.surgery import unwrapped
from . import tensors

KEY = "lowrank-seeded"  # of the file's metadata
VERSION = 1
STARTS = ("model", "seed")
NORMS = ("kept", "projected")
COORDINATES, SCALES, KEPT = "coordinates", "scales", "kept."


@dataclass(frozen=True, eq=False)
class Flat:
    """The parameters of a model that lie in the subspace, one after another.

    Attributes:
        parameters: by name, each tensor once.
        bounds: (size,) float64: of a uniform initialisation of each number.
    """

    parameters: Mapping[str, nn.Parameter]
    bounds: Tensor

    @property
    def counts(self) -> Tensor:
        """Numbers of each tensor, (tensors,) int64."""
        return torch.tensor([p.numel() for p in self.parameters.values()])

    def digest(self) -> str:
        """Of names and shapes."""
        text = json.dumps([(name, list(p.shape)) for name, p in self.parameters.items()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def values(self) -> Tensor:
        """(size,) float64, on the CPU."""
        flat = [p.detach().double().cpu().flatten() for p in self.parameters.values()]
        return torch.cat(flat)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set the parameters from (size,) numbers."""
        start = 0
        for parameter in self.parameters.values():
            part = values[start : start + parameter.numel()]
            parameter.copy_(part.view(parameter.shape))
            start += parameter.numel()


@dataclass(frozen=True, eq=False)
class Seeded:
    """What a network is computed from.

    Attributes:
        seed, projection: of P; `projection` is "dense", "sparse", "fastfood" or "kaiming".
        start: "seed", or "model": θ₀ is the model that it is written into.
        norms: "kept": parameters of layers without a matrix are stored; or "projected".
        coordinates: z (dimension,), float32 or float16.
        scales: λ, one of each tensor, float32; None for ones.
        kept: what is stored as it is, by name.
        layout: digest of names and shapes of the parameters in the subspace.
        origin: digest of θ₀ where `start` is "model", else "".
    """

    seed: int
    projection: str
    start: str
    norms: str
    coordinates: Tensor
    scales: Tensor | None
    kept: Mapping[str, Tensor]
    layout: str
    origin: str

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the same bytes each time."""
        from safetensors.torch import save_file

        about = {
            "version": VERSION, "draws": counter.VERSION, "seed": self.seed,
            "projection": self.projection, "start": self.start, "norms": self.norms,
            "layout": self.layout, "origin": self.origin,
        }  # fmt: skip
        stored = {COORDINATES: self.coordinates, **{KEPT + n: t for n, t in self.kept.items()}}
        if self.scales is not None:
            stored[SCALES] = self.scales
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            # One entry: the order of several is not fixed.
            save_file({n: t.cpu().contiguous() for n, t in stored.items()}, partial,
                      metadata={KEY: json.dumps(about)})  # fmt: skip
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def write_into(self, model: nn.Module) -> None:
        """Set all weights of a model of the same architecture, bit for bit as they were saved.

        Raises:
            LowrankError: it has other parameters, or other weights than those that the vector was
                trained from; it is unchanged then.
        """
        root = unwrapped(model)
        flat = flat_of(root, self.norms, self.kept)
        if flat.digest() != self.layout:
            raise LowrankError(
                f"the file is of a network with other parameters than {type(root).__name__}: pass "
                "the architecture that was trained"
            )
        origin = digest_of(flat) if self.start == "model" else ""
        if origin != self.origin:
            raise LowrankError(
                "the file holds a difference to other weights than this model's: pass the model "
                "that the training began with"
            )
        state = root.state_dict(keep_vars=True)
        wrong = [n for n, t in self.kept.items() if n not in state or state[n].shape != t.shape]
        if wrong:
            raise LowrankError(f"the model has no such tensors as the file: {listed(wrong, 3)}")
        values = self.values(flat)
        with torch.no_grad():
            for name, tensor in self.kept.items():
                state[name].copy_(tensor)
        flat.write(values)

    def values(self, flat: Flat, start: Tensor | None = None) -> Tensor:
        """θ (size,) float64.

        Args:
            start: θ₀ (size,) float64; None: from the seed, or what the parameters are now.
        """
        if start is None:
            start = flat.values() if self.start == "model" else starting_point(self.seed, flat)
        random = projection_of(self.projection, len(self.coordinates), self.seed, flat)
        moved = random.exact(self.coordinates)
        if self.scales is not None:
            moved = moved * self.scales.double().cpu().repeat_interleave(flat.counts)
        return start + moved


def load_seeded(path: str | Path, skeleton: nn.Module) -> nn.Module:
    """The model that a `Seeded` file stands for, computed in the given one.

    Args:
        skeleton: a model of the same architecture, on the CPU or elsewhere; its weights are
            overwritten. Where the file is a difference, the model that it is a difference to.

    Raises:
        LowrankError: the file is damaged, of another version, or not of this model, which is
            unchanged then.
    """
    check_module(skeleton)
    read_seeded(path).write_into(skeleton)
    return skeleton


def read_seeded(path: str | Path) -> Seeded:
    """Read a file that `Seeded.save` wrote.

    Raises:
        LowrankError: the file is damaged, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    stored = tensors.read(source, "cpu", None) if source.is_file() else None
    if stored is None:
        raise LowrankError(f"there is no file {source}")
    try:
        with safe_open(source, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
        versions = (about["version"], about["draws"])
        if versions != (VERSION, counter.VERSION):
            raise LowrankError(f"{source}: versions {versions} of format and draws, expected "
                               f"{(VERSION, counter.VERSION)}: update lowrank")  # fmt: skip
        found = Seeded(
            seed=int(about["seed"]), projection=about["projection"], start=about["start"],
            norms=about["norms"], coordinates=stored[COORDINATES], scales=stored.get(SCALES),
            kept={n.removeprefix(KEPT): t for n, t in stored.items() if n.startswith(KEPT)},
            layout=about["layout"], origin=about["origin"],
        )  # fmt: skip
        check_choices(found.projection, found.start, found.norms)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, LowrankError):
            raise
        raise LowrankError(f"{source} is not a file of a seed and a vector ({error!r})") from error
    if not bool(torch.isfinite(found.coordinates).all()):
        raise LowrankError(f"{source}: the vector holds numbers that are not finite")
    return found


def check_choices(kind: Any, start: Any, norms: Any) -> None:
    """Raises LowrankError for an unknown name."""
    for what, got, known in (
        ("projection", kind, projections.PROJECTIONS),
        ("start", start, STARTS),
        ("norms", norms, NORMS),
    ):
        if got not in known:
            raise unknown(what, str(got), known)


def flat_of(model: nn.Module, norms: str, kept: Collection[str] | None = None) -> Flat:
    """The parameters that are in the subspace: all, or those of layers that hold a matrix.

    Args:
        kept: names of those that are not; None: those that are frozen.

    Raises:
        LowrankError: there is none, or one is sharded.
    """
    parameters: dict[str, nn.Parameter] = {}
    bounds: list[Tensor] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False))
        matrices = [p for p in own.values() if p.ndim > 1]
        if not matrices and norms == "kept":
            continue
        for name, parameter in own.items():
            out = not parameter.requires_grad if kept is None else name in kept
            if id(parameter) in seen or not parameter.is_floating_point() or out:
                continue
            if is_sharded(parameter):
                raise LowrankError(f"{name} is sharded: a subspace is of whole parameters")
            seen.add(id(parameter))
            parameters[name] = parameter
            bound = _bound(
                module, parameter if parameter.ndim > 1 else (matrices or [parameter])[0]
            )
            bounds.append(torch.full((parameter.numel(),), bound, dtype=torch.float64))
    if not parameters:
        raise LowrankError("the model has no parameters for a subspace: all are frozen, or norms")
    return Flat(parameters, torch.cat(bounds))


def kept_of(model: nn.Module, flat: Flat) -> dict[str, Tensor]:
    """Whatever a file has to store beside the vector: norms, buffers, frozen parameters."""
    inside = {id(p) for p in flat.parameters.values()}
    state = model.state_dict(keep_vars=True)
    return {n: t.detach().clone() for n, t in state.items() if id(t) not in inside}


def starting_point(seed: int, flat: Flat) -> Tensor:
    """θ₀ from the seed."""
    return projections.starting_point(seed, flat.bounds)


def projection_of(kind: str, dimension: int, seed: int, flat: Flat) -> projections.Projection:
    """P for these parameters."""
    return projections.projection(kind, dimension, seed, flat.bounds)


def digest_of(flat: Flat) -> str:
    """Of the numbers of the parameters."""
    return hashlib.sha256(flat.values().numpy().tobytes()).hexdigest()[:16]


def _bound(module: nn.Module, weight: Tensor) -> float:
    """Of torch's uniform initialisation; of an embedding, whose numbers have variance 1, √3."""
    if layouts.kind(module) == "embedding":
        return math.sqrt(3)
    return 1 / math.sqrt(max(weight.numel() / max(len(weight), 1), 1)) if weight.ndim else 1.0
