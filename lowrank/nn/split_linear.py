"""One linear layer of several that read one tensor (qkv_proj, gate_up_proj) from a layer each.

A model cuts what it returns into queries, keys and values, or into a gate and what it lets pass.
Each part may then have a rank of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .lazy import LazyProduct
from .unfused import Cut, Parameters, Unfused, unfuse


class SplitLinear(Unfused):
    """nn.Linear, or transformers' Conv1D, from layers whose outputs stand one behind the other.

    Attributes:
        sizes: the outputs of each layer.
    """

    sizes: tuple[int, ...]

    @classmethod
    def cuts(cls, module: Any) -> Mapping[str, Cut]:
        keys = tuple(map(str, range(len(module.sizes))))
        return {name: Cut(name, keys, module.sizes) for name in ("weight", "bias")}

    @classmethod
    def rows(cls, module: Any, fused: Tensor) -> Tensor:
        stored_by_inputs = not issubclass(module.WHOLE, nn.Linear)  # Conv1D: (in, out)
        return fused.T if stored_by_inputs and fused.ndim > 1 else fused

    @staticmethod
    def left(module: Any) -> None:
        del module.WHOLE, module.sizes

    def spec(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes)}

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), computed when used, for code that reads `.weight`."""
        layers: list[Any] = list(self.layers().values())
        like = next(p for p in self.parameters() if p.is_floating_point())
        shape = (sum(self.sizes), layers[0].in_features)
        return LazyProduct.of(shape, like, lambda: torch.cat([x.weight + 0 for x in layers]))

    def forward(self, input: Tensor) -> Tensor:
        """input (…, in) -> (…, out)."""
        return torch.cat([layer(input) for layer in self.layers().values()], dim=-1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


def split_outputs(module: nn.Module, sizes: Sequence[int]) -> Parameters:
    """Hold a linear layer as several, in place; returns the parameters that it held.

    Args:
        sizes: of their outputs; together those of the layer.
    """
    about: dict[str, Any] = {"sizes": tuple(sizes), "WHOLE": type(module)}
    vars(module).update(about)
    return unfuse(module, SplitLinear)
