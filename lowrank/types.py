"""The words of the library: sites, statistics, options, curves, budgets, and the contracts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

Size = tuple[int, ...]
Unit = Literal["params", "bytes", "macs"]
UNITS: tuple[Unit, ...] = ("params", "bytes", "macs")
Storage = Literal["factors", "pivoted"]  # of low-rank factors; other forms are named by methods


@dataclass(frozen=True, slots=True)
class Cost:
    """What one form of a weight costs.

    Attributes:
        params: floating-point numbers stored, biases excluded.
        bytes: of those tensors as saved, index tensors included.
        macs: multiply-accumulates per token (linear) or per output position (convolution).
    """

    params: int
    bytes: int
    macs: int

    def of(self, unit: Unit) -> int:
        return int(getattr(self, unit))

    def often(self, times: int) -> Cost:
        """The same stored numbers, multiplied by so many times."""
        return Cost(self.params, self.bytes, self.macs * times)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.bytes + other.bytes, self.macs + other.macs)


@dataclass(frozen=True)
class Site:
    """One weight that may be factored, with every name that shares it.

    Attributes:
        name: the first fully qualified name in the model's own order ("" for the root itself).
        names: all names under which the weight is reached; tied weights are one site.
        kind: "linear", "conv" or "embedding" (experts follow); an embedding whose weight
            is the output head's too is one site of kind "embedding", its first module.
        module: the live module; methods read its weight through `lowrank.walk.layouts`.
        modules: every distinct module that holds this weight; `module` is the first.
        shape: (out, in) of the weight as a matrix; (vocabulary, width) of an embedding; (O, I · K)
            of a convolution, K numbers under its kernel, which reads patches.
        cost: what the dense weight costs.
        reason: why the site stays dense ("" if it may be factored).
    """

    name: str
    names: tuple[str, ...]
    kind: str
    modules: tuple[nn.Module, ...]
    shape: tuple[int, int]
    cost: Cost
    reason: str = ""

    @property
    def module(self) -> nn.Module:
        return self.modules[0]

    @property
    def title(self) -> str:
        """The name for people: the root has none of its own."""
        return self.name or "(root)"


@dataclass(eq=False)
class Statistics:
    """What was seen of one distinct input, shared by the sites that read it.

    Attributes:
        count: tokens seen; 0 means that the model was never run.
        gram: E[x xᵀ] per token, (in, in) float64, or None for data-free work.
        mean: E[x] per token, (in,) float64.
        freq: of an embedding: how often each id was looked up, (V,) float64. Its `gram` is that of
            the head's input where a head holds the same weight.
        out_gram: E[g gᵀ] per token, (out, out) float64, g the gradient at the layer's output of the
            cross entropy to labels drawn from the model; the site's own, while `gram` is shared. Of
            a convolution summed over its positions, per token of the linear layers or per sample:
            that makes it comparable with theirs.
        row_fisher: (out,) float64: the weight's squared gradient of a sequence, summed over each
            row, the mean over sequences (FWSVD).
    """

    count: int = 0
    gram: Tensor | None = None
    mean: Tensor | None = None
    freq: Tensor | None = None
    out_gram: Tensor | None = None
    row_fisher: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One thing a site could become; `size` None is the dense weight, with error 0.

    `error` is squared and absolute, in the norm that its curve names.
    """

    method: str
    size: Size | None
    storage: str
    cost: Cost
    error: float

    @property
    def dense(self) -> bool:
        return self.size is None


@dataclass(frozen=True)
class Curve:
    """The Pareto set of options of one site, or of a group of sites that read one tensor.

    A policy is given every site in exactly one curve, alone or in its group.

    Attributes:
        sites: names of the sites that an option covers.
        options: cost rising, error falling; the last one is the dense weight.
        total: error of the zero matrix, in the same norm.
        spectrum: singular values (min(out, in),) float64, descending, or None.
        norm: "weight" (squared Frobenius), "output" (per token), "fisher" (input and output side),
            "row-fisher" (FWSVD) or "kl".
        exact: the error of an option is what the factored layer will show, to 1e-6 of `total`;
            otherwise it is a bound or an interpolation, and the method says which.
        tails: error of every rank 0…min(out, in), (min + 1,) float64, where the method knows them:
            also of ranks that this storage does not make smaller, and another may.
    """

    sites: tuple[str, ...]
    options: tuple[Option, ...]
    total: float
    spectrum: Tensor | None
    norm: str
    exact: bool
    tails: Tensor | None = None

    @property
    def dense(self) -> Option:
        return self.options[-1]


@dataclass(frozen=True)
class Budget:
    """At most `limit` units for the curves that a policy is given."""

    limit: int
    unit: Unit = "params"


Allocation = Mapping[tuple[str, ...], Option]
Probe = Callable[[Allocation], float]
Policy = Callable[[Sequence[Curve], Budget, Probe | None], Allocation]


@runtime_checkable
class Judging(Protocol):
    """A policy that says whether it judges: a callable that does not say so counts as one that
    does."""

    @property
    def judges(self) -> bool:
        """Whether it compares allocations by the probe, on rows that no statistic may see."""


class Method(Protocol):
    """A way to factor one site: a frozen dataclass of options, in one file.

    A method may say more of itself, by any of the protocols that follow; what a method does not
    say has a plain answer. Nothing depends on how it is called.
    """

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of sites it takes, such as {"linear"}."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that it reads, such as {"gram"}; empty means data-free."""

    def curve(self, site: Site, stats: Statistics) -> Curve:
        """All sizes from one decomposition."""

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        """The factored module; the input module is untouched, bit for bit."""


@runtime_checkable
class Named(Protocol):
    """A method whose name depends on its options; else plans call it what its options do."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class HandsOver(Protocol):
    """A method that leaves sites of some kinds to another one, which fits them better."""

    def for_kind(self, kind: str) -> Method:
        """What factors sites of this kind: itself, or another method with the same options."""


@runtime_checkable
class OwnError(Protocol):
    """A method whose curves have a norm of their own, beside "weight" and "output"."""

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """The error of any weight (out, in) in place of the module's, in that norm."""


@runtime_checkable
class WeighsOutputs(Protocol):
    """A method that weighs outputs, as the refit of what it made then does too."""

    def output_metric(self, stats: Statistics) -> Tensor | None:
        """S (out, out), upper triangular: the metric of the outputs is SᵀS; None where the
        statistics do not tell."""


@runtime_checkable
class OwnForm(Protocol):
    """A method that stores layers in a form of its own, sized by several numbers, not by a rank."""

    @property
    def own_form(self) -> str:
        """The storage of its layers; of several, the one that a size given by hand is of."""


@runtime_checkable
class SeveralForms(Protocol):
    """A method that chooses among forms, which held-out rows then compare one by one."""

    def apart(self) -> Mapping[str, Method]:
        """One method for each form, by the form's name."""

    def joined(self, site: Site, curves: Sequence[Curve]) -> Curve:
        """What none of the options of several curves of a site beats."""


@runtime_checkable
class JointMethod(Protocol):
    """A way to factor several sites that read one tensor: a frozen dataclass of options."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of sites it takes."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that it reads, of the input that all members share."""

    @property
    def alone(self) -> str:
        """The method of sites that share their input with no other."""

    def curve(self, sites: Sequence[Site], stats: Statistics) -> Curve:
        """All sizes from one decomposition; `Curve.sites` are the members' names, one after the
        other, costs and errors those of all members together."""

    def factor(
        self, modules: Sequence[nn.Module], option: Option, stats: Statistics
    ) -> Sequence[nn.Module]:
        """The factored modules in the same order; the input modules are untouched. What they share
        is stored in the first; the others have `bind(first)`."""


@runtime_checkable
class Factored(Protocol):
    """Every module in lowrank.nn; what else a form says of itself is declared by `nn.Form`."""

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (out, in) that the module stands for, multiplied in `dtype`."""

    def spec(self) -> dict[str, Any]:
        """JSON that rebuilds the module empty."""

    def cost(self) -> Cost:
        """What is stored, biases excluded."""

    @classmethod
    def empty(cls, **spec: Any) -> Self:
        """The module on the meta device: no memory, no initialisation."""


@runtime_checkable
class Controller(Protocol):
    """A rank-adaptive training method attached to a user's own loop, which it never owns.

    Built on model and optimizer after `accelerate.prepare` or DDP; acts where gradients are
    synchronised. A parameter that `before_step` resizes has grad None for that step.
    """

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per event: "step", "site", "event", and what was measured."""

    def before_step(self) -> None:
        """After backward and clipping: gradients are there."""

    def after_step(self) -> None:
        """After `optimizer.step()`; does nothing where a gradient scaler skipped that step."""

    def end_epoch(self) -> None:
        """At the end of an epoch, before the model is evaluated."""

    def finish(self) -> nn.Module:
        """The model with plain factored modules, ready to save."""

    def detach(self) -> None:
        """Stop; the model stays as it is and trains on."""

    def rebind(self, optimizer: Any) -> None:
        """A trainer has wrapped the optimizer that the controller was built on."""

    def state_dict(self) -> dict[str, Any]:
        """JSON: sizes, the place in the cycle, the history."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the model's and the optimizer's states are loaded: sets their sizes."""
