"""Layers that are given some tokens of all, such as experts: those that saw few borrow from others.

The Gram matrix of few tokens is singular, and factors fitted to it fit nothing else. So it is
shrunk towards the mean of its siblings, as if that had been seen in a number of tokens that grows
with its width (a conjugate prior of that strength; Ledoit and Wolf, 2004, shrink towards the
identity).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..types import Statistics
from .observation import inside

STRENGTH = 0.25  # tokens that the siblings' mean counts for, per feature


def routed(counts: Mapping[str, int], chains: Iterable[Sequence[str]]) -> list[list[str]]:
    """Siblings of which some were given more tokens than others, in groups: layers whose names
    differ in one number, inside of a block.

    Args:
        counts: of tokens, by layer.
        chains: names of the blocks of each chain.
    """
    siblings: dict[tuple[str, ...], list[str]] = {}
    for block in (block for blocks in chains for block in blocks):
        for name in counts:
            if inside(name, block) and name != block:
                parts = name[len(block) :].split(".")
                for place in (i for i, part in enumerate(parts) if part.isdigit()):
                    key = (block, *parts[:place], "", *parts[place + 1 :])
                    siblings.setdefault(key, []).append(name)
    return [names for names in siblings.values() if len({counts[n] for n in names}) > 1]


def weight_of(count: int, features: int) -> float:
    """The share of the siblings' mean in a matrix (features, features) of so many tokens."""
    return STRENGTH * features / (count + STRENGTH * features)


def shrink(
    statistics: Mapping[str, Statistics], groups: Iterable[Sequence[str]], what: str
) -> None:
    """Shrink the matrices of siblings towards their mean, in place; those that saw nothing stay.

    Args:
        what: "gram" or "out_gram".
    """
    for names in groups:
        seen: dict[int, tuple[Tensor, int]] = {}
        for stats in (statistics[name] for name in names):
            matrix: Tensor | None = getattr(stats, what)
            if matrix is not None and stats.count:
                seen[id(matrix)] = matrix, stats.count
        if len({matrix.shape for matrix, _ in seen.values()}) != 1:
            continue
        total = math.fsum(count for _, count in seen.values())
        first, _ = next(iter(seen.values()))
        mean = first.new_zeros(first.shape)
        for matrix, count in seen.values():
            mean += matrix * (count / total)
        for matrix, count in seen.values():
            matrix.lerp_(mean, weight_of(count, len(matrix)))
