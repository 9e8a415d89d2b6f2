"""Groups of layers that the laws of joint methods are tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..types import Curve, Factored, JointMethod, Option, Site, Statistics
from .cases import Case, factored_module, factored_options, linear_case, require
from .memo import Memo, snapshot

Built = tuple[Option, list[Factored]]


@dataclass(frozen=True)
class JointCase:
    """Layers that read one input, each with all that a method of one layer would be given.

    Curves and modules are made once, as for a `Case`.

    Attributes:
        members: they have the same inputs and statistics; the first one owns what is shared.
    """

    members: tuple[Case, ...]
    _memo: Memo[JointMethod, list[Factored]] = field(
        default_factory=Memo, init=False, repr=False, compare=False
    )

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(case.site for case in self.members)

    @property
    def stats(self) -> Statistics:
        return self.members[0].stats

    @property
    def inputs(self) -> Tensor:
        return self.members[0].inputs

    @property
    def rounding(self) -> float:
        return self.members[0].rounding

    def fresh(self) -> JointCase:
        """The same layers, statistics and inputs, of which nothing was made yet."""
        return replace(self)

    def curve(self, method: JointMethod) -> Curve:
        """Of these layers, made once for a method object."""
        return self._memo.curve(method, self._curve, self._look)

    def built(self, method: JointMethod, most: int | None = None) -> Iterator[Built]:
        """The method's options but for the dense one, each with its modules, made once.

        Args:
            most: as for a `Case`.
        """
        options = factored_options(self.curve(method), self.name, most)
        return self._memo.built(method, options, self.factored, self._look)

    def changed(self, method: JointMethod) -> list[str]:
        """What the method changed that it was only to read, up to now."""
        return self._memo.changed(method)

    def factored(self, method: JointMethod, option: Option) -> list[Factored]:
        new = method.factor([case.module for case in self.members], option, self.stats)
        where = f"{self.name}, size {option.size}"
        require(len(new) == len(self.members), f"{where}: {len(new)} modules for {self.sites}")
        return [factored_module(each, where) for each in new]

    def _curve(self, method: JointMethod) -> Curve:
        return method.curve(self.sites, self.stats)

    def _look(self) -> Mapping[str, Any]:
        return {
            f"{case.site.name}, {what}": value
            for case in self.members
            for what, value in snapshot(case.module, case.stats).items()
        }


def joint_case(
    name: str,
    shapes: Sequence[tuple[int, bool]],
    in_features: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tokens: int = 64,
    dead: int | None = None,
    scale: float = 1.0,
) -> JointCase:
    """Layers of random weights; `shapes` are outputs and whether there is a bias, per member."""
    members = []
    for number, (rows, bias) in enumerate(shapes):
        rng = torch.Generator().manual_seed(30 + number)
        weight = scale * torch.randn(rows, in_features, generator=rng, dtype=torch.float64)
        case = linear_case(
            name, weight, dtype=dtype, device=device, bias=bias, tokens=tokens, dead=dead
        )
        names = (f"layer{number}", f"alias{number}") if number == 1 else (f"layer{number}",)
        members.append(replace(case, site=replace(case.site, name=names[0], names=names)))
    return JointCase(tuple(members))


# What a group is called -> (dtype=, device=) -> a fresh one.
JOINT_CASES: Mapping[str, Callable[..., JointCase]] = {
    "three": partial(joint_case, "three", [(8, True), (8, True), (8, True)], 8),
    "grouped query": partial(
        joint_case, "grouped query", [(12, False), (4, False), (4, False)], 12
    ),
    "pair": partial(joint_case, "pair", [(14, True), (14, False)], 6),
    "narrow": partial(joint_case, "narrow", [(3, True), (2, True), (4, True)], 16),
    "few tokens": partial(joint_case, "few tokens", [(8, True), (6, True)], 10, tokens=5),
    "dead input": partial(joint_case, "dead input", [(8, True), (8, True)], 10, dead=3),
    "zero": partial(joint_case, "zero", [(6, True), (6, True)], 8, scale=0.0),
}
