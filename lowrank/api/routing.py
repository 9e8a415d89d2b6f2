"""`route_mlps`: a trained model's MLPs, cut into experts of which each token runs a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import io
from ..calibration.batches import Batch, Data, Forward, materialise
from ..calibration.gathering import run_all
from ..calibration.mlp_inputs import rows_of_mlps
from ..calibration.running import Unpadded, quiet
from ..calibration.statistics import Calibration
from ..errors import LowrankError, listed, unknown
from ..linalg.coactivation import coactive_groups
from ..linalg.routers import fitted_router, missed, nearest_experts
from ..nn import RoutedMLP
from ..plans.progress import steps
from ..recover.blocks import distill
from ..recover.copies import factors_in
from ..recover.training import Trained, Training
from ..tables import aligned
from ..walk.checks import check_model, ordinary_tensors
from ..walk.mlps import MLP, find_mlps
from ..walk.surgery import adopt, copied, swap, twin

Groups = Literal["coactive", "contiguous", "random"]
TOKENS = 8192  # rows of each MLP that it is split and routed by
CHUNK = 256  # rows whose outputs of all experts are held at once


@dataclass(frozen=True)
class RoutedLayer:
    """One MLP.

    Attributes:
        stored: its parameters, the router among them, biases excluded.
        active: products of a token.
        missed: squared error of the chosen experts' sum, relative to the output, on the rows that
            the router was fitted to.
        least: the same with the best choice for every row, which no router falls below.
    """

    name: str
    neurons: int
    dense: int
    stored: int
    active: int
    missed: float
    least: float

    def row(self) -> dict[str, str]:
        return {
            "MLP": self.name or "(root)",
            "neurons": str(self.neurons),
            "stored": f"{self.stored:,}",
            "active": f"{self.active:,}",
            "missed": f"{self.missed:.3f}",
            "best choice": f"{self.least:.3f}",
        }


@dataclass(frozen=True)
class Routing:
    """What `route_mlps` did. It saves products, not parameters: the two are counted apart.

    Attributes:
        skipped: by name, modules of two or three linear layers that are no MLPs, with the reason.
        trained: of the distillation; None without.
    """

    experts: int
    active: int
    layers: tuple[RoutedLayer, ...]
    skipped: Mapping[str, str]
    trained: Trained | None = None

    @property
    def dense(self) -> int:
        """Parameters of the MLPs before, which a token multiplied by all."""
        return sum(layer.dense for layer in self.layers)

    @property
    def stored(self) -> int:
        return sum(layer.stored for layer in self.layers)

    @property
    def products(self) -> int:
        """Products of a token in all the MLPs, routers included."""
        return sum(layer.active for layer in self.layers)

    def rows(self) -> list[dict[str, str]]:
        """One row per MLP, as text."""
        return [layer.row() for layer in self.layers]

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} MLPs in {self.experts} experts, {self.active} of them for a token",
            f"parameters stored {self.stored:,} (dense {self.dense:,}: none are saved); "
            f"active {self.products:,} ({self.products / self.dense:.1%})",
            *aligned(self.rows()),
        ]
        lines += [f"left as it is: {name}: {why}" for name, why in self.skipped.items()]
        if self.trained is not None:
            told = f"distilled {self.trained.steps} steps: held-out loss {self.trained.before:.4f}"
            lines.append(f"{told} -> {self.trained.after:.4f}")
        return "\n".join(lines)


@ordinary_tensors()
def route_mlps(
    model: nn.Module,
    experts: int = 8,
    active: int = 4,
    *,
    data: Data | Calibration,
    tokenizer: Any = None,
    groups: Groups = "coactive",
    distill_steps: int = 0,
    seed: int = 0,
    copy: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, Routing]:
    """Cut every MLP into experts, and run for each token those that a router chooses.

    The neurons of an MLP, gated or not, are grouped by the inputs that they are active at, on rows
    of the data; a linear router is fitted to the experts that come nearest to the dense output
    (FactorLLM, arXiv 2408.11855, which trains it, and cuts by position). With all experts active
    (`module.active = module.experts`) the model computes what it did, up to rounding. What is saved
    are products: parameters and bytes stay, and each router adds its own.

    MLPs are found by what they compute: `lowrank.walk.mlps`.

    Args:
        model: changed in place and returned; if it is itself an MLP, a new module is returned.
        experts: of equal size, so a divisor of the numbers of neurons.
        active: experts that a token runs.
        data: as for `compress`: texts, batches, a callable or a calibration.
        groups: "coactive", or for comparison "contiguous" (as the neurons stand) or "random".
        distill_steps: steps of distillation by the dense model, which train the routers and the
            experts; the sum of all experts is then no longer the dense MLP.
        seed: of the starts of the grouping, of the rows that are drawn and of the distillation.
        copy: work on a deep copy.

    Returns:
        The model and what was done.

    Raises:
        LowrankError: there is no MLP, one cannot be cut into as many experts, or the data is
            invalid; the model is then unchanged.
    """
    check_model(model)
    if groups not in get_args(Groups):
        raise unknown("groups", str(groups), get_args(Groups))
    if not 1 <= active <= experts:
        raise LowrankError(f"active must be in [1, {experts}] (experts), got {active}")
    batches = data.batches if isinstance(data, Calibration) else materialise(data, tokenizer)
    if distill_steps and callable(batches):
        raise LowrankError("distillation runs the model on batches: pass them as data=…")
    target = copied(model) if copy else model
    found, skipped = _found(target, batches)
    _check_sizes(found, experts)
    inputs = rows_of_mlps(target, found, batches, most=TOKENS, seed=seed, progress=progress)
    new: dict[int, nn.Module] = {}
    layers = []
    for mlp in steps(found, "MLP", progress):
        routed, layer = _routed(mlp, inputs.pop(mlp.name), experts, active, groups, seed)
        new[id(mlp.module)] = adopt(routed, mlp.module)
        layers.append(layer)
    teacher = twin(target) if distill_steps else None
    root = swap(target, new)
    trained = None
    if teacher is not None:
        assert not callable(batches)
        options = Training(distill_steps, seed=seed)
        trained = distill(teacher, root, batches, factors_in(root), options)
    io.attach(root)
    return root, Routing(experts, active, tuple(layers), skipped, trained)


def _found(model: nn.Module, batches: list[Batch] | Forward) -> tuple[list[MLP], Mapping[str, str]]:
    first = batches if callable(batches) else batches[:1]

    def run() -> None:
        with quiet(model):
            run_all(model, first, Unpadded(), progress=False)

    found, skipped = find_mlps(model, run)
    if not found:
        reasons = listed((f"{name}: {why}" for name, why in skipped.items()), 3)
        raise LowrankError(
            "there is no MLP to route: no module of two or three nn.Linear layers computes "
            f"down(act(gate(x)) · up(x)) or down(act(up(x))){f'; {reasons}' if reasons else ''}"
        )
    return found, skipped


def _check_sizes(found: list[MLP], experts: int) -> None:
    odd = [f"{mlp.name or '(root)'} ({mlp.neurons})" for mlp in found if mlp.neurons % experts]
    if odd:
        raise LowrankError(
            f"experts={experts} does not divide the neurons of {listed(odd, 3)}: take a divisor"
        )


@torch.no_grad()
def _routed(
    mlp: MLP, x: Tensor, experts: int, active: int, groups: str, seed: int
) -> tuple[RoutedMLP, RoutedLayer]:
    """The MLP in experts, with a router fitted to rows x (n, in)."""
    layers = mlp.linears()
    if not len(x):
        raise LowrankError(f"{mlp.name or '(root)'} read no row of the data that is no padding")
    whole = torch.arange(mlp.neurons)
    plain = RoutedMLP.split(layers, mlp.activation, whole, 1)
    labels = GROUPS[groups](plain, x, experts, active, seed)
    order = labels.argsort(stable=True).cpu()
    routed = RoutedMLP.split(layers, mlp.activation, order, experts, active)
    grams = _grams(routed, x)
    weight, bias = fitted_router(x.float(), grams, active)
    routed.router.weight.copy_(weight)
    routed.router.bias.copy_(bias)
    ranked = routed.router(x).argsort(dim=1, descending=True)
    routed.scale.copy_(_scales(grams, ranked))
    cost = routed.cost()
    total = grams.sum((1, 2)).mean().clamp(min=torch.finfo(grams.dtype).tiny)
    ways = _first(ranked, active), nearest_experts(grams, active)
    lost, least = (float(missed(grams, on).mean() / total) for on in ways)
    size = sum(layer.weight.numel() for layer in layers.values())
    return routed, RoutedLayer(mlp.name, mlp.neurons, size, cost.params, cost.macs, lost, least)


def _first(ranked: Tensor, count: int) -> Tensor:
    """True at the first experts of each row: (n, experts)."""
    none = torch.zeros_like(ranked, dtype=torch.bool)
    return none.scatter(1, ranked[:, :count], True)


def _scales(grams: Tensor, ranked: Tensor) -> Tensor:
    """By how many experts run, the factor of their sum that is nearest to the sum of all."""
    found = []
    for count in range(1, grams.shape[1] + 1):
        on = _first(ranked, count).to(grams)
        with_all = torch.einsum("ni,nij->", on, grams)
        own = torch.einsum("ni,nij,nj->", on, grams, on)
        found.append(float(with_all / own) if float(own) > 0 else 1.0)
    return torch.tensor(found)


def _grams(routed: RoutedMLP, x: Tensor) -> Tensor:
    """Inner products of the experts' outputs: (n, experts, experts), float32."""
    found = []
    for rows in x.split(CHUNK):
        parts = routed.parts(rows).float()
        found.append(parts @ parts.mT)
    return torch.cat(found)


def _coactive(plain: RoutedMLP, x: Tensor, experts: int, active: int, seed: int) -> Tensor:
    length = plain.layer("down").weight.float().square().sum(0)
    energy = torch.cat([plain.hidden(rows).float().square() for rows in x.split(CHUNK)]) * length
    return coactive_groups(energy, experts, active, inputs=x, seed=seed)


def _contiguous(plain: RoutedMLP, _x: Tensor, experts: int, _active: int, _seed: int) -> Tensor:
    return torch.arange(plain.neurons) // (plain.neurons // experts)


def _random(plain: RoutedMLP, _x: Tensor, experts: int, _active: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(plain.neurons, generator=draw) % experts


Grouping = Callable[[RoutedMLP, Tensor, int, int, int], Tensor]
GROUPS: dict[str, Grouping] = {"coactive": _coactive, "contiguous": _contiguous, "random": _random}
