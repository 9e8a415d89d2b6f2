"""Ordered dropout: which layers are cut to which width, the same for every process and restart."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch

from ...errors import unknown

Cut = Literal["one", "all"]
CUTS = ("one", "all")


class Draws:
    """A round visits every width of every layer once, in a random order.

    "one" cuts one layer a step, the others run whole; "all" cuts each layer, independently, in
    rounds of its own. The order is a function of the seed and the round's number.
    """

    def __init__(self, how: Cut, seed: int) -> None:
        """
        Raises:
            LowrankError: `how` is unknown.
        """
        if how not in CUTS:
            raise unknown("cut", str(how), CUTS)
        self.how, self.seed = how, seed
        self.round, self.place = -1, 0
        self.restart({})

    def restart(self, ranks: Mapping[str, int]) -> None:
        """A new round for layers of these ranks."""
        self._begin(ranks, self.round + 1, 0)

    def resume(self, ranks: Mapping[str, int], state: dict[str, Any]) -> None:
        """Go on where a saved run was."""
        self._begin(ranks, state["round"], state["place"])

    def state(self) -> dict[str, Any]:
        return {"round": self.round, "place": self.place}

    def widths(self) -> dict[str, int]:
        """Components used in this step, by layer; layers that are not named run whole."""
        if self.how == "one":
            if not self.names:
                return {}
            drawn = self._orders[0][self.place]
            layer = bisect.bisect_right(self._starts, drawn) - 1
            return {self.names[layer]: drawn - self._starts[layer] + 1}
        pairs = zip(self.names, self._orders, strict=True)
        return {name: order[self.place % len(order)] + 1 for name, order in pairs}

    def advance(self) -> None:
        """To the next step."""
        self.place += 1
        if self.place >= max(map(len, self._orders), default=0):
            self._begin(self._ranks, self.round + 1, 0)

    def _begin(self, ranks: Mapping[str, int], round_: int, place: int) -> None:
        self._ranks, self.names = dict(ranks), list(ranks)
        self.round, self.place = round_, place
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + round_) % 2**63)
        self._starts = [0, *itertools.accumulate(ranks.values())][:-1]
        sizes = [sum(ranks.values())] if self.how == "one" else list(ranks.values())
        self._orders = [torch.randperm(n, generator=generator).tolist() for n in sizes]
