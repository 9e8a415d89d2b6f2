"""The library's core types: sites, statistics, options, curves, budgets, and the protocols."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, overload, runtime_checkable

import torch
from torch import Tensor, nn

Size = tuple[int, ...]
Unit = Literal["params", "bytes", "macs"]
UNITS: tuple[Unit, ...] = ("params", "bytes", "macs")
Storage = Literal["factors", "pivoted"]  # of low-rank factors; methods name the other forms


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one form of a weight.

    Attributes:
        params: floating-point numbers stored, biases excluded.
        bytes: of the tensors as saved, index tensors included.
        macs: multiply-accumulates per token (linear) or per output position (convolution).
    """

    params: int
    bytes: int
    macs: int

    def of(self, unit: Unit) -> int:
        return int(getattr(self, unit))

    def often(self, times: int) -> Cost:
        """The same storage, with `times` times the MACs."""
        return Cost(self.params, self.bytes, self.macs * times)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.bytes + other.bytes, self.macs + other.macs)


@dataclass(frozen=True)
class Site:
    """One weight that may be factored, with every name that shares it.

    Attributes:
        name: the first fully qualified name in the model's own order ("" for the root itself).
        names: all names under which the weight is reached; tied weights are one site.
        kind: "linear", "conv" or "embedding"; an embedding tied to the output head is one site
            of kind "embedding", with the embedding as its first module.
        module: the live module; methods read its weight through `lowrank.walk.layouts`.
        modules: every distinct module that holds this weight; `module` is the first.
        shape: (out, in) of the weight matrix; (vocabulary, width) of an embedding; (O, I · K) of a
            convolution, which is applied to patches; K is the number of kernel taps.
        cost: cost of the dense weight.
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
        """The display name: "(root)" for the root module."""
        return self.name or "(root)"


@dataclass(eq=False)
class Statistics:
    """Statistics of one distinct input, shared by the sites that read it.

    Attributes:
        count: tokens seen; 0 without data.
        gram: E[x xᵀ] per token, (in, in) float64; None without data.
        mean: E[x] per token, (in,) float64.
        freq: lookup counts of an embedding's ids, (V,) float64; `gram` is then that of the input
            of a tied head, if there is one.
        out_gram: E[g gᵀ] per token of the model, (out, out) float64, g the gradient at the layer's
            output of the cross entropy to labels drawn from the model; per site, while `gram` is
            shared. A layer that is given some tokens of all, such as an expert, counts by that
            share; for a convolution, summed over positions, per token of the linear layers or else
            per sample. So errors of all are comparable.
        row_fisher: squared weight gradient of a sequence, summed over each row and averaged over
            sequences (FWSVD), (out,) float64.
    """

    count: int = 0
    gram: Tensor | None = None
    mean: Tensor | None = None
    freq: Tensor | None = None
    out_gram: Tensor | None = None
    row_fisher: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One candidate form of a site; `size` None is the dense weight, with error 0.

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


class Options(Sequence[Option]):
    """Options of a site, kept in arrays of numbers: there is one for every rank, and as objects
    those of a deep model would take more memory than one of its blocks."""

    __slots__ = ("_costs", "_ends", "_errors", "_kind", "_kinds", "_sizes")

    def __init__(self, options: Iterable[Option]) -> None:
        kinds: dict[tuple[str, str, bool], int] = {}
        self._kind, self._errors = array("H"), array("d")
        self._costs, self._sizes, self._ends = array("q"), array("q"), array("Q", [0])
        for option in options:
            kind = (option.method, option.storage, option.dense)
            self._kind.append(kinds.setdefault(kind, len(kinds)))
            self._errors.append(option.error)
            self._costs.extend((option.cost.params, option.cost.bytes, option.cost.macs))
            self._sizes.extend(option.size or ())
            self._ends.append(len(self._sizes))
        self._kinds = tuple(kinds)

    def __len__(self) -> int:
        return len(self._kind)

    @overload
    def __getitem__(self, index: int) -> Option: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Option, ...]: ...

    def __getitem__(self, index: int | slice) -> Option | tuple[Option, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        i = range(len(self))[index]
        method, storage, dense = self._kinds[self._kind[i]]
        size = None if dense else tuple(self._sizes[self._ends[i] : self._ends[i + 1]])
        return Option(method, size, storage, Cost(*self._costs[3 * i : 3 * i + 3]), self._errors[i])

    def costs(self, unit: Unit) -> Sequence[int]:
        """The cost of each."""
        fields = tuple(Cost.__dataclass_fields__)
        return self._costs[fields.index(unit) :: len(fields)]

    @property
    def errors(self) -> Sequence[float]:
        """The error of each."""
        return self._errors

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Options | tuple | list):
            return tuple(self) == tuple(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True)
class Curve:
    """The Pareto front of options of one site, or of a group of sites that read one tensor.

    A policy gets every site in exactly one curve, alone or in its group.

    Attributes:
        sites: names of the sites that an option covers.
        options: cost rising, error falling; the last one is the dense weight. Given in any
            sequence, kept as `Options`.
        total: error of the zero matrix, in the same norm.
        spectrum: singular values (min(out, in),) float64, descending, or None.
        norm: "weight" (squared Frobenius), "output" (per token), "fisher" (input and output side),
            "row-fisher" (FWSVD) or "kl".
        exact: whether an option's error equals that of the factored layer, to 1e-6 of `total`;
            otherwise it is a bound or an interpolation, and the method says which.
        tails: error at every rank 0…min(out, in), (min + 1,) float64, or None; includes ranks that
            save nothing in this storage but may in another.
    """

    sites: tuple[str, ...]
    options: Sequence[Option]
    total: float
    spectrum: Tensor | None
    norm: str
    exact: bool
    tails: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, Options):
            object.__setattr__(self, "options", Options(self.options))

    @property
    def dense(self) -> Option:
        return self.options[-1]

    def costs(self, unit: Unit) -> Sequence[int]:
        """The cost of every option."""
        assert isinstance(self.options, Options)
        return self.options.costs(unit)

    @property
    def errors(self) -> Sequence[float]:
        """The error of every option."""
        assert isinstance(self.options, Options)
        return self.options.errors


@dataclass(frozen=True)
class Budget:
    """An upper limit on the total cost of a policy's options."""

    limit: int
    unit: Unit = "params"


Allocation = Mapping[tuple[str, ...], Option]
Probe = Callable[[Allocation], float]
Policy = Callable[[Sequence[Curve], Budget, Probe | None], Allocation]


@runtime_checkable
class Comparing(Protocol):
    """A probe that measures several allocations at once, for less than one by one."""

    def __call__(self, allocation: Allocation) -> float:
        """The held-out KL of an allocation."""

    def compare(self, allocations: Sequence[Allocation]) -> list[float]:
        """The held-out KL of each."""


@runtime_checkable
class Judging(Protocol):
    """A policy that declares whether it judges; one that does not is assumed to."""

    @property
    def judges(self) -> bool:
        """Whether it compares allocations by the probe, on rows held out of the statistics."""


class Method(Protocol):
    """A factorisation method for one site: a frozen dataclass of its settings, in one file.

    It may implement any of the optional protocols below; each has a default. Nothing depends on
    its name.
    """

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of sites it supports, such as {"linear"}."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that it reads, such as {"gram"}; empty means data-free."""

    def curve(self, site: Site, stats: Statistics) -> Curve:
        """Options of all sizes, from one decomposition."""

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        """The factored module; `module` is left unchanged, bit for bit."""


@runtime_checkable
class Named(Protocol):
    """A method whose name depends on its settings; by default, `Option.method` is the name."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class HandsOver(Protocol):
    """A method that delegates some kinds of sites to another method."""

    def for_kind(self, kind: str) -> Method:
        """The method for sites of this kind: itself, or another one with the same settings."""


@runtime_checkable
class OwnError(Protocol):
    """A method whose curves use a norm other than "weight" and "output"."""

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """The error, in that norm, of `weight` (out, in) in place of the module's."""


@runtime_checkable
class WeighsOutputs(Protocol):
    """A method with a metric on the outputs, which its refit uses too."""

    def output_metric(self, stats: Statistics) -> Tensor | None:
        """S (out, out), upper triangular, of the metric SᵀS; None if the statistics lack it."""


@runtime_checkable
class Nested(Protocol):
    """A method whose plain factors of a rank are the leading ones of any larger rank."""

    nested: bool


@runtime_checkable
class OwnForm(Protocol):
    """A method with its own form of layer, whose size is not the rank of two factors."""

    @property
    def own_form(self) -> str:
        """The storage of its layers; if several, the one that a user-given size refers to."""


@runtime_checkable
class Measured(Protocol):
    """A method whose sizes only some units measure, such as codes bytes; by default all do."""

    @property
    def units(self) -> frozenset[Unit]:
        """Of these, cost rises along its curves."""


@runtime_checkable
class SeveralForms(Protocol):
    """A method that chooses among forms, each of which is also compared on held-out rows."""

    def apart(self) -> Mapping[str, Method]:
        """One method per form, by the form's name."""

    def joined(self, site: Site, curves: Sequence[Curve]) -> Curve:
        """The Pareto front of several curves of one site."""


@runtime_checkable
class JointMethod(Protocol):
    """A factorisation method for several sites that read one tensor, otherwise like `Method`."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of sites it supports."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the shared input that it reads."""

    @property
    def alone(self) -> str:
        """The method for sites that share their input with no other."""

    def curve(self, sites: Sequence[Site], stats: Statistics) -> Curve:
        """Options of all sizes, from one decomposition; `Curve.sites` lists the members' names,
        costs and errors are totals over the members."""

    def factor(
        self, modules: Sequence[nn.Module], option: Option, stats: Statistics
    ) -> Sequence[nn.Module]:
        """The factored modules, in order; `modules` are left unchanged. The first stores what is
        shared; the others are bound to it by `bind(first)`."""


@runtime_checkable
class Factored(Protocol):
    """The protocol of every module in lowrank.nn; `nn.Form` declares the rest."""

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype`."""

    def spec(self) -> dict[str, Any]:
        """JSON from which `empty` rebuilds the module."""

    def cost(self) -> Cost:
        """Cost of the module, biases excluded."""

    @classmethod
    def empty(cls, **spec: Any) -> Self:
        """The module on the meta device: no memory, no initialisation."""


@runtime_checkable
class Controller(Protocol):
    """A rank-adaptive training method, attached to the user's own training loop.

    Built on model and optimizer after `accelerate.prepare` or DDP; acts when gradients are
    synchronised. A parameter resized by `before_step` has grad None for that step.
    """

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per event: "step", "site", "event", and measurements."""

    def before_step(self) -> None:
        """Call after backward and clipping, when gradients are available."""

    def after_step(self) -> None:
        """Call after `optimizer.step()`; a no-op if a gradient scaler skipped that step."""

    def end_epoch(self) -> None:
        """Call at the end of an epoch, before evaluation."""

    def finish(self) -> nn.Module:
        """The model with plain factored modules, ready to save."""

    def detach(self) -> None:
        """Stop; the model is left as it is and can be trained further."""

    def rebind(self, optimizer: Any) -> None:
        """Switch to `optimizer`, in which a trainer has wrapped the original one."""

    def state_dict(self) -> dict[str, Any]:
        """JSON: sizes, position in the cycle, history."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Call before loading the model's and the optimizer's states: sets their sizes."""
