"""The components of factored layers, and how many of each to keep for a ratio of all of them.

A layer of plain factors is a sum of components, columns of `up` times rows of `down`. Where they
are in order of importance, the first of them are a smaller layer that needs no decomposition:
nested ranks. Layers that share components, by one basis or one table, are cut together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..nn import Form, Geometry
from ..nn.form import SIZES_OF_KIND
from ..policies.common import LOSSLESS
from ..walk.surgery import factored

ALIGNED = 8
PLAIN = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d)
INSTEAD = (
    "plain factors can be, which storage='factors' gives, and of convolutions rank=; with "
    "effort=lowrank.Recovery(distill_steps=600, nested=0.4) all smaller models are good ones"
)


@dataclass(frozen=True)
class Stack:
    """Layers with the same components.

    Attributes:
        layers: by name, each module once; the first one stores what they share.
        rank: number of components.
        each: numbers stored for one component.
        dense: numbers of the dense weights.
    """

    layers: Mapping[str, Form]
    rank: int
    each: int
    dense: int


@dataclass(frozen=True)
class Components:
    """All components of a model.

    Attributes:
        stacks: those that can be cut.
        stuck: factored layers that cannot, by name, with the reason.
        dense: numbers of all dense weights that a ratio counts.
        rest: numbers stored for those that cannot be cut.
    """

    stacks: Sequence[Stack]
    stuck: Mapping[str, str]
    dense: int
    rest: int

    @classmethod
    def of(cls, model: nn.Module, left: int = 0) -> Components:
        """The components of a model's factored layers.

        Args:
            left: numbers of dense layers that a ratio counts too.
        """
        groups: dict[int, dict[str, Form]] = {}
        seen: set[int] = set()
        for name, module in factored(model).items():
            if id(module) not in seen:
                seen.add(id(module))
                groups.setdefault(id(module.owner or module), {})[name] = module
        stacks: list[Stack] = []
        stuck: dict[str, str] = {}
        dense = rest = left
        for key, layers in groups.items():
            ordered = dict(sorted(layers.items(), key=lambda item: id(item[1]) != key))
            numbers, stored = (
                sum(map(count, ordered.values())) for count in (dense_numbers, _stored)
            )
            dense += numbers
            reasons = {name: why for name, layer in ordered.items() if (why := obstacle(layer))}
            if reasons:
                stuck |= {name: reasons.get(name, "it shares components") for name in ordered}
                rest += stored
            else:
                rank = int(next(iter(ordered.values())).spec()["rank"])
                stacks.append(Stack(ordered, rank, stored // rank, numbers))
        return cls(stacks, stuck, dense, rest)

    @property
    def most(self) -> list[int]:
        """The components that there are of each stack."""
        return [stack.rank for stack in self.stacks]

    @property
    def held(self) -> Fraction:
        """The ratio of what is stored now."""
        return Fraction(self._spent(self.most), max(self.dense, 1))

    def ranks(self, ratio: float) -> list[int]:
        """The components to keep of each stack, so that all that is stored is at most `ratio` of
        the dense weights: the same share of every layer's own weight, as the policy "uniform" does.

        Layers that have less than that share keep what they have, and the others get the rest.

        Raises:
            LowrankError: the ratio is more than the model holds, or less than one component of
                every layer.
        """
        limit = math.floor(Fraction(str(ratio)) * self.dense)
        self._check(ratio, limit)
        whole = sum(stack.dense for stack in self.stacks)
        # As the policy: costs strictly below limit + 1 sum to at most limit.
        share = Fraction(limit + 1 - self.rest, whole)
        chosen = self._below(share)
        over = self._spent(chosen) > limit  # for there is at least one component of each
        if over or any(r == most for r, most in zip(chosen, self.most, strict=True)):
            all_of_it = max(Fraction(s.each * s.rank + 1, s.dense) for s in self.stacks)
            low, high = (Fraction(0), share) if over else (share, max(share, all_of_it))
            while high - low > Fraction(1, whole):
                middle = (low + high) / 2
                if self._spent(self._below(middle)) > limit:
                    high = middle
                else:
                    low = middle
            chosen = self._below(low)
        return [_aligned(rank) for rank in chosen]

    def _below(self, share: Fraction) -> list[int]:
        """The most components of each stack that store less than this share of its weights."""
        return [
            min(max(math.ceil(share * stack.dense / stack.each) - 1, 1), stack.rank)
            for stack in self.stacks
        ]

    def _spent(self, ranks: Sequence[int]) -> int:
        return self.rest + sum(s.each * r for s, r in zip(self.stacks, ranks, strict=True))

    def _check(self, ratio: float, limit: int) -> None:
        if not self.stacks:
            why = {f"{reason} ({name or '(root)'})" for name, reason in self.stuck.items()}
            raise LowrankError(
                f"no layer can be cut to a smaller rank: {listed(sorted(why), 3)}: {INSTEAD}"
                if why
                else f"the model holds no factored layer, so no rank can be cut: {INSTEAD}"
            )
        if limit >= self._spent([stack.rank + 1 for stack in self.stacks]):
            raise LowrankError(
                f"the model holds {float(self.held):.4f} of the dense weights, and {ratio} was "
                "asked for: what was cut off is not stored; compress the dense model"
            )
        least = self._spent([1] * len(self.stacks))
        if limit < least:
            reachable = math.ceil(Fraction(least, self.dense) * 10_000) / 10_000
            stuck = f", {len(self.stuck)} of which cannot be cut" if self.stuck else ""
            raise LowrankError(
                f"ratio {ratio} cannot be reached by cutting ranks: one component of every layer"
                f"{stuck} is {reachable:.4f} of the dense weights"
            )


def dense_numbers(form: Form) -> int:
    """Numbers of the dense weight; none for what is tied to a table, whose weight it is."""
    spec = form.spec()
    if form.KIND == "conv":
        geometry = Geometry.from_spec({field.name: spec[field.name] for field in fields(Geometry)})
        return math.prod(geometry.weight_shape)
    if form.owner is not None and "num_embeddings" in spec:
        return 0
    return math.prod(spec[size] for size in SIZES_OF_KIND[form.KIND])


def obstacle(form: Form) -> str:
    """Why the components of a layer cannot be cut; "" if they can."""
    if not form.NESTED:
        return f"a {type(form).__name__} has no components in order"
    for name, child in form.named_children():
        weight = getattr(child, "weight", None)
        ordinary = isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter)
        if type(child) not in PLAIN or not ordinary:
            return f"its factor {name!r} is adapted or quantized: merge that first"
        if child.weight.is_meta:
            return f"its factor {name!r} is on the meta device: load it without offloading"
    return ""


def _stored(form: Form) -> int:
    return form.cost().params


def _aligned(rank: int) -> int:
    """The rank, rounded down to a multiple of eight where that costs less than 1 %."""
    rounded = rank // ALIGNED * ALIGNED
    return rounded if 0 <= rank - rounded < LOSSLESS * rank else rank
