"""A trained MLP whose neurons stand in equal groups, the experts, of which each token runs a few.

An MLP is a sum over its neurons, y = Σ_j d_j · act(g_j·x) · (u_j·x), so that one order for the rows
of gate and up and the columns of down cuts it into experts that add up to it exactly (FactorLLM,
arXiv 2408.11855). Nothing is stored less: what is saved are products, those of experts not chosen.
The authors' code computes every expert and masks; here the experts that no token chose are never
multiplied, and each reads its own tokens alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LowrankError, unknown
from ..types import Cost
from .children import is_plain
from .form import Form, check_traceable
from .lowrank_linear import own

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "gelu-sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu-squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
# Where experts cost more than they save, all are computed and masked (benchmarks/factorllm.py).
SMALL = 1 << 14  # numbers in one layer of an expert
LARGE = 1 << 18  # the same, from which on skipping pays for any number of tokens
FEW = 32  # tokens of an expert, unless there is but one token
ROUTER = "router"
PARTS = ("gate", "up", "down")


class RoutedMLP(Form):
    """y = Σ over the chosen experts e of down_e · (act(gate_e · x) ⊙ up_e · x), or without a gate
    down_e · act(up_e · x); the bias of down is added once.

    The layers are children of the names that they had, so that the saved tensors are those of the
    dense MLP, its neurons in another order. Expert e is the neurons [e·s, (e+1)·s), s = neurons /
    experts. `router` is linear, (experts, in); a token runs the `active` experts of the highest
    scores. Their sum is multiplied by `scale[active - 1]`, which is near one: they are the sum's
    largest parts. The authors' factor, experts / active, is that of parts of equal size, and is
    rounded to an integer in their code.

    With all experts active it is the dense MLP, computed as such.

    Attributes:
        active: experts of a token; may be changed at any time.
    """

    KIND = "mlp"
    SIZE = ("experts", "active")
    WORDS = frozenset({"activation", "layers", "biases"})

    router: nn.Linear
    scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        neurons: int,
        out_features: int,
        experts: int,
        active: int,
        *,
        activation: str = "silu",
        layers: str = "gate up down",
        biases: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            layers: names of the children, "gate up down", or "up down" of an MLP without a gate.
            biases: those of them that have a bias.

        Raises:
            LowrankError: the experts are not equal, or a name is unknown.
        """
        super().__init__()
        names = layers.split()
        _check(names, biases.split(), activation)
        if experts < 1 or neurons % experts:
            raise LowrankError(
                f"{neurons} neurons cannot be cut into {experts} equal experts: take a divisor, "
                f"{_divisors(neurons)}"
            )
        self.experts, self.activation, self._names = experts, activation, names
        self.active = active
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in names:
            sides = (neurons, out_features) if name == names[-1] else (in_features, neurons)
            self.add_module(name, nn.Linear(*sides, bias=name in biases.split(), **place))
        self.router = nn.Linear(in_features, experts, **place)
        self.scale = nn.Parameter(torch.ones(experts, **place))
        self._shell: tuple[nn.Module, ...] = ()

    @classmethod
    def empty(
        cls, *, in_features: int, neurons: int, out_features: int, experts: int, active: int,
        activation: str, layers: str, biases: str,
    ) -> Self:  # fmt: skip
        return cls(
            in_features, neurons, out_features, experts, active, activation=activation,
            layers=layers, biases=biases, device="meta",
        )  # fmt: skip

    @classmethod
    def split(
        cls,
        layers: Mapping[str, nn.Linear],
        activation: str,
        order: Tensor,
        experts: int,
        active: int | None = None,
    ) -> Self:
        """The MLP of these layers, which are not changed, its neurons in another order; its router
        scores zero until it is set, its scales are one.

        Args:
            layers: name -> layer: gate, up and down, or up and down.
            order: (neurons,) int64: the old place of each neuron.
            active: all by default.
        """
        held = list(layers.values())
        mlp = cls.empty(
            in_features=held[0].in_features, neurons=len(order), out_features=held[-1].out_features,
            experts=experts, active=experts if active is None else active, activation=activation,
            layers=" ".join(layers),
            biases=" ".join(name for name, layer in layers.items() if layer.bias is not None),
        )  # fmt: skip
        order = order.to(held[0].weight.device)
        for name, layer in layers.items():
            last = layer is held[-1]
            child = cast(nn.Linear, mlp._modules[name])
            weight = layer.weight.detach()
            child.weight = own(weight[:, order] if last else weight[order])
            if layer.bias is not None:
                child.bias = own(layer.bias.detach() if last else layer.bias.detach()[order])
        like = held[0].weight
        mlp.router.weight = nn.Parameter(like.new_zeros(experts, mlp.in_features))
        mlp.router.bias = nn.Parameter(like.new_zeros(experts))
        mlp.scale = nn.Parameter(like.new_ones(experts))
        return mlp

    @property
    def active(self) -> int:
        return self._active

    @active.setter
    def active(self, count: int) -> None:
        if not 1 <= count <= self.experts:
            raise LowrankError(f"active must be in [1, {self.experts}], got {count}")
        self._active = count

    @property
    def in_features(self) -> int:
        return self.layer("up").in_features

    @property
    def neurons(self) -> int:
        return self.layer("up").out_features

    @property
    def out_features(self) -> int:
        return self.layer("down").out_features

    @property
    def gated(self) -> bool:
        return len(self._names) == len(PARTS)

    def layer(self, part: str) -> nn.Linear:
        """The child that is "gate", "up" or "down"."""
        return cast(nn.Linear, self._modules[self._names[PARTS.index(part) - len(PARTS)]])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        check_traceable(self, x)
        if self.active == self.experts:
            y: Tensor = self.layer("down")(self.hidden(x))
            return y
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows)  # (n, experts)
        chosen = scores.topk(self.active, dim=-1).indices  # (n, active)
        mask = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        if torch.is_grad_enabled() and scores.requires_grad:
            # One in value; by its gradient the router learns.
            share = torch.sigmoid(scores)
            mask = mask * (1 + share - share.detach())
        scale = self.scale[self.active - 1]
        if self._skips(rows):
            y = self._grouped(rows, mask, chosen) * scale
            bias = self.layer("down").bias
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            y = self._masked(rows, mask * scale)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def hidden(self, x: Tensor) -> Tensor:
        """What down reads: x (..., in) -> (..., neurons)."""
        act = ACTIVATIONS[self.activation]
        inner: Tensor = self.layer("up")(x)
        return act(self.layer("gate")(x)) * inner if self.gated else act(inner)

    def parts(self, rows: Tensor) -> Tensor:
        """The outputs of all experts, without the bias: rows (n, in) -> (n, experts, out)."""
        hidden = self.hidden(rows).unflatten(-1, (self.experts, -1))
        down = self.layer("down").weight.unflatten(1, (self.experts, -1))
        return torch.einsum("nes,oes->neo", hidden, down)

    def _skips(self, rows: Tensor) -> bool:
        """Whether experts that are not chosen are left out; in a graph, whose sizes must not depend
        on data, with children that are not plain, and where it would take longer, all run and are
        masked."""
        size = self.neurons // self.experts * self.in_features
        many = len(rows) == 1 or size >= LARGE or len(rows) * self.active >= FEW * self.experts
        if size < SMALL or not many:
            return False
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        plain = all(is_plain(self._modules[name]) for name in self._names)  # type: ignore[arg-type]
        return len(rows) > 0 and plain and not traced

    def _masked(self, rows: Tensor, mask: Tensor) -> Tensor:
        wide = mask.repeat_interleave(self.neurons // self.experts, dim=1)
        y: Tensor = self.layer("down")(self.hidden(rows) * wide)
        return y

    def _grouped(self, rows: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on its own rows; the sum, without the bias of down."""
        size, y = self.neurons // self.experts, None
        if len(rows) == 1 and not mask.requires_grad:
            for start, end in _runs(sorted(chosen[0].tolist())):
                part = self._neurons(rows, slice(start * size, end * size))
                y = part if y is None else y + part
        else:
            for expert in range(self.experts):
                (places,) = mask[:, expert].nonzero(as_tuple=True)
                if len(places):
                    span = slice(expert * size, (expert + 1) * size)
                    part = self._neurons(rows.index_select(0, places), span)
                    if mask.requires_grad:
                        part = part * mask[:, expert].index_select(0, places)[:, None]
                    y = part.new_zeros(len(rows), part.shape[-1]) if y is None else y
                    y.index_add_(0, places, part)
        assert y is not None  # every row has chosen
        return y

    def _neurons(self, rows: Tensor, span: slice) -> Tensor:
        """What these neurons add to the output."""
        act, up = ACTIVATIONS[self.activation], self.layer("up")
        inner = _product(up, rows, span)
        hidden = act(_product(self.layer("gate"), rows, span)) * inner if self.gated else act(inner)
        return F.linear(hidden, self.layer("down").weight[:, span])

    def spec(self) -> dict[str, Any]:
        biases = [name for name in self._names if cast(Any, self._modules[name]).bias is not None]
        return {
            "in_features": self.in_features,
            "neurons": self.neurons,
            "out_features": self.out_features,
            "experts": self.experts,
            "active": self.active,
            "activation": self.activation,
            "layers": " ".join(self._names),
            "biases": " ".join(biases),
        }

    def cost(self) -> Cost:
        """Parameters and bytes of all that is stored; products of what a token runs."""
        widths = (1 + self.gated) * self.in_features + self.out_features
        router = self.router.weight.numel()
        params = self.neurons * widths + router + self.experts
        macs = self.neurons // self.experts * self.active * widths
        itemsize = self.layer("up").weight.dtype.itemsize
        return Cost(params, params * itemsize, macs + router * (self.active < self.experts))

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        stored = sum(layer.cost().params for layer in layers)
        active = sum(layer.cost().macs for layer in layers)
        return f"{len(layers)} MLPs store {stored:,} numbers; a token multiplies by {active:,}"

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Raises LowrankError: an MLP has three weights, or two."""
        raise LowrankError("an MLP in experts has no one dense weight: see `whole`")

    @property
    def not_linear(self) -> str:
        if self.active < self.experts:
            return (
                f"it runs {self.active} of {self.experts} experts for each token, which no dense "
                "layers do: set .active = .experts first, which is the MLP that it was made of"
            )
        return "" if self._shell else "it was built without the MLP that it replaces"

    def remember(self, dense: nn.Module) -> None:
        """Keep what a module has beside its layers, to become it again (`whole`)."""
        shell = copy.copy(dense)
        vars(shell)["_modules"] = {**dense._modules, **dict.fromkeys(self._names)}
        self._shell = (shell,)  # not a child

    def whole(self) -> nn.Module:
        """The module that it replaced, with these layers: what all experts compute.

        Raises:
            LowrankError: see `not_linear`.
        """
        if self.not_linear:
            raise LowrankError(f"this MLP cannot be made whole: {self.not_linear}")
        dense = copy.copy(self._shell[0])
        own_layers = {name: self._modules[name] for name in self._names}
        vars(dense)["_modules"] = {**dense._modules, **own_layers}
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, active={self.active}, activation={self.activation!r}"


def _product(layer: nn.Linear, rows: Tensor, span: slice) -> Tensor:
    return F.linear(rows, layer.weight[span], None if layer.bias is None else layer.bias[span])


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours among sorted numbers, as [start, end): they are one slice."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _check(names: Sequence[str], biases: Sequence[str], activation: str) -> None:
    free = {*names} - {ROUTER}
    if len(names) not in (2, 3) or len(free) != len(names) or any("." in n for n in names):
        raise LowrankError(
            f"expected distinct names of two or three layers, none of them {ROUTER!r}, "
            f"got {' '.join(names)!r:.80}"
        )
    if not {*biases} <= free:
        raise LowrankError(f"biases {' '.join(biases)!r:.80} are not among {' '.join(names)!r}")
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)


def _divisors(neurons: int) -> str:
    found = [n for n in range(2, min(neurons, 64) + 1) if neurons % n == 0]
    return ", ".join(map(str, found)) or "there is none up to 64"
