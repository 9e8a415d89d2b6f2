"""The base of modules that take the place of one of torch's whose weights are not in layers.

nn.MultiheadAttention, recurrent nets, grouped and transposed convolutions multiply by parameters
that they hold themselves. A subclass of `Unfused` computes the same from plain layers, each a view
of its part of a parameter, so that methods, policies and files need to know linear layers and
convolutions only. A module turns into one in place, and back while all of its layers are dense:
whoever refers to it, hooks it or shares it need not be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .children import is_bare
from .form import Form

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Parameters = dict[str, nn.Parameter]


class Cut(NamedTuple):
    """How a fused parameter is cut: into rows, each the weight or the bias of a layer."""

    tensor: str  # "weight" or "bias"
    layers: tuple[str, ...]
    sizes: tuple[int, ...] = ()  # how many rows each has; all as many, if they are not given

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(list(self.sizes)) if self.sizes else rows.chunk(len(self.layers))


class Unfused(nn.Module):
    """A module in place of one of class `WHOLE`, of torch, that holds its weights as layers.

    The parameters that it no longer holds are computed where code reads them, for a look: what is
    written to them is lost.
    """

    WHOLE: ClassVar[type[nn.Module]]

    @classmethod
    def obstacle(cls, module: nn.Module) -> str:
        """Why a module of class `WHOLE` cannot become one of this; "" if it can."""
        return ""

    @classmethod
    def cuts(cls, module: nn.Module) -> Mapping[str, Cut]:
        """How the parameters of a module, of either class, are cut; it may lack some of them."""
        raise NotImplementedError

    @classmethod
    def empty(cls, module: nn.Module, weight: Tensor, bias: bool) -> nn.Module:
        """The layer that multiplies by this weight, on the meta device."""
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")

    @classmethod
    def rows(cls, module: nn.Module, fused: Tensor) -> Tensor:
        """A fused weight or bias, by rows of outputs; its own inverse."""
        return fused

    @classmethod
    def opened(cls, module: nn.Module, rows: Tensor) -> Tensor:
        """The weight of a layer, a view of some rows of a fused weight."""
        return rows

    @classmethod
    def closed(cls, module: nn.Module, weight: Tensor) -> Tensor:
        """The rows of a fused weight that a layer's weight stands for; inverse of `opened`."""
        return weight

    @staticmethod
    def entered(module: Any) -> None:
        """What else a module forgets once it is of this class."""

    @staticmethod
    def left(module: Any) -> None:
        """What else it takes up again once it is of class `WHOLE`."""

    def spec(self) -> dict[str, Any]:
        """JSON by which a stored module is known to be of the same architecture."""
        raise NotImplementedError

    def layers(self) -> dict[str, nn.Module]:
        """The layers that it computes from, by name; those that it has anyway included."""
        names = dict.fromkeys(name for cut in self.cuts(self).values() for name in cut.layers)
        return {name: cast(nn.Module, self._modules[name]) for name in names}

    def reset_parameters(self) -> None:
        """Nothing: its layers are initialised as layers are, by whoever initialises modules."""

    _reset_parameters = reset_parameters  # torch's name in attention

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if found is not None or name not in self._parameters:
            return found
        cut = self.cuts(self).get(name)
        return None if cut is None else self._computed(cut)

    def _computed(self, cut: Cut) -> Tensor | None:
        """A fused parameter; None if the layers have no such."""
        layers = [cast(Any, self._modules[key]) for key in cut.layers]
        if cut.tensor == "bias":
            own = [layer.bias for layer in layers]
            return None if any(bias is None for bias in own) else torch.cat(own)
        weights = [x.dense_weight() if isinstance(x, Form) else x.weight for x in layers]
        rows = [self.closed(self, weight.reshape(len(weight), -1)) for weight in weights]
        return self.rows(self, torch.cat(rows))

    @property
    def is_dense(self) -> bool:
        """Whether every layer is a plain dense one."""
        return all(
            isinstance(layer, PLAIN) and is_bare(layer) and type(layer.weight) is nn.Parameter
            for layer in self.layers().values()
        )


def unfuse(module: nn.Module, kind: type[Unfused]) -> Parameters:
    """Turn a module into one of its `kind`, in place; returns the parameters that it held."""
    before: Parameters = {}
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, cut in kind.cuts(module).items():
        parameter = module._parameters[name]
        if parameter is None:
            continue
        before[name] = parameter
        whole = kind.rows(module, parameter.detach())
        for key, rows in zip(cut.layers, cut.parts(whole), strict=True):
            view = kind.opened(module, rows) if cut.tensor == "weight" else rows
            part = nn.Parameter(view, requires_grad=parameter.requires_grad)
            parts.setdefault(key, {})[cut.tensor] = part
    layers = {}
    for key, tensors in parts.items():
        layers[key] = kind.empty(module, tensors["weight"], "bias" in tensors)
        layers[key].train(module.training)._parameters.update(tensors)
    module._parameters.update(dict.fromkeys(before))
    module._modules.update(layers)
    module.__class__ = kind
    kind.entered(module)
    return before


def fuse(module: Unfused, before: Mapping[str, nn.Parameter]) -> None:
    """Turn a module whose layers are dense into what it was, in place.

    Args:
        before: its parameters, as `unfuse` returned them; none where it comes from elsewhere.
    """
    kind, wanted = type(module), module.WHOLE
    cuts = kind.cuts(module)
    whole = {name: _joined(module, cut, before.get(name)) for name, cut in cuts.items()}
    for key in {key for cut in cuts.values() for key in cut.layers}:
        del module._modules[key]
    module._parameters.update(whole)
    module.__class__ = wanted  # type: ignore[assignment]
    kind.left(module)


def _joined(module: Unfused, cut: Cut, before: nn.Parameter | None) -> nn.Parameter | None:
    """A fused parameter, `before` if the layers are views of it; None if they have no such."""
    layers = module.layers()
    held: list[nn.Parameter | None] = [getattr(layers[key], cut.tensor) for key in cut.layers]
    own = [parameter for parameter in held if parameter is not None]
    if len(own) < len(held):
        return None
    rows = [p.detach() for p in own]
    if cut.tensor == "weight":
        rows = [module.closed(module, weight) for weight in rows]
    if before is not None and _same(rows, cut.parts(module.rows(module, before.detach()))):
        return before
    whole = module.rows(module, torch.cat(rows)).contiguous()
    return nn.Parameter(whole, requires_grad=any(p.requires_grad for p in own))


def _same(rows: Sequence[Tensor], parts: Sequence[Tensor]) -> bool:
    return all(
        (part.data_ptr(), part.dtype, part.shape) == (row.data_ptr(), row.dtype, row.shape)
        for part, row in zip(parts, rows, strict=True)
    )
