"""Fine-tuning of the low-rank components only (WeLore, VITA-Group).

Following WeLore, the factored layers (LRC) are trained, while layers left dense (N-LRC), the
embeddings and the head are frozen. The authors train in pure bfloat16, where updates below half a
unit in the last place are lost; `MasterWeights` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import LowrankError
from ..nn import is_factored


def lrc_parameters(model: nn.Module, *, norms: bool = False) -> list[nn.Parameter]:
    """Freeze everything but the factors, and return the parameters to train.

    Args:
        model: `requires_grad` is set to True for the parameters returned, to False for all others.
        norms: also train normalisation layers, as the authors' code does: every one-dimensional
            parameter of a module whose class name contains "norm".

    Returns:
        The parameters of all factored layers, biases included, each once, in the model's order.

    Raises:
        LowrankError: the model has no factored layer; it is then unchanged.
    """
    modules = list(model.modules())
    factors = [p for module in modules if is_factored(module) for p in module.parameters()]
    if not factors:
        raise LowrankError(
            f"{type(model).__name__} has no factored layer to train: compress it first"
        )
    scales = [
        parameter
        for module in modules
        if norms and "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 1
    ]
    trained = {id(parameter) for parameter in (*factors, *scales) if parameter.is_floating_point()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return [parameter for parameter in model.parameters() if id(parameter) in trained]


class MasterWeights(Optimizer):
    """An optimizer that updates float32 master copies of 16-bit parameters and rounds them back.

        optimizer = MasterWeights(lrc_parameters(model), torch.optim.AdamW, lr=1e-4)

    In bfloat16 an update below 1/512 of a weight rounds to zero; in its master copy it
    accumulates. Parameters of 32 bits or more are updated directly, without a copy.
    `param_groups` holds the model's parameters, so that gradient clipping, scalers and schedulers
    work as usual; `state` is the inner optimizer's and belongs to the copies.

    If a parameter was changed from outside since the last step (a loaded checkpoint), its copy is
    updated to match.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer_class: type[Optimizer],
        **options: Any,
    ) -> None:
        """As for `optimizer_class`, any torch optimizer; takes parameters or parameter groups."""
        given: list[Any] = list(parameters)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        groups = [{**group, "params": _listed(group["params"])} for group in groups]
        self._masters: dict[Tensor, Tensor] = {}
        self._inner: Optimizer | None = None  # until it is set, groups are added to self only
        super().__init__([{**group, "params": [*group["params"]]} for group in groups], {})
        copies = [{**group, "params": self._copies(group["params"])} for group in groups]
        self._inner = optimizer_class(copies, **options)
        self.defaults = self._inner.defaults
        self.state = self._inner.state
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            mine.update(_options(inner))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any optimizer: for instance to unfreeze further layers."""
        group = {**param_group, "params": _listed(param_group["params"])}
        super().add_param_group(group)
        if self._inner is not None:
            self._inner.add_param_group({**group, "params": self._copies(group["params"])})
            self.param_groups[-1].update(_options(self._inner.param_groups[-1]))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Cast gradients to float32, update the copies, round them back into the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self._synchronised()
        for parameter, master in self._pairs():
            moved = parameter != master.to(parameter.dtype)
            master.copy_(torch.where(moved, parameter, master))
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        inner.step()
        for parameter, master in self._pairs():
            parameter.copy_(master)
            master.grad = None  # as large as the copy, so freed between steps
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, plus the copies under "masters" (None for a float32 one)."""
        inner = self._synchronised()
        every = chain.from_iterable(group["params"] for group in self.param_groups)
        return {**inner.state_dict(), "masters": [self._masters.get(p) for p in every]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, and set the parameters to the rounded copies.

        Raises:
            LowrankError: the state is for other parameters, or from a plain optimizer.
        """
        inner = self._synchronised()
        every = list(chain.from_iterable(group["params"] for group in self.param_groups))
        wanted = [tuple(p.shape) if p in self._masters else None for p in every]
        stored = state_dict.get("masters")
        shapes = stored and [None if copy is None else tuple(copy.shape) for copy in stored]
        if stored is None or shapes != wanted:
            raise LowrankError(
                f"the state holds float32 copies of shapes {shapes}, expected {wanted}: "
                "it was saved for other parameters, or by another optimizer"
            )
        inner.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.state = inner.state
        for mine, theirs in zip(self.param_groups, inner.param_groups, strict=True):
            mine.update(_options(theirs))
        for parameter, copy in zip(every, stored, strict=True):
            if copy is not None:
                self._masters[parameter].copy_(copy)
                parameter.copy_(copy)

    def _synchronised(self) -> Optimizer:
        """The inner optimizer, with options such as the learning rate copied from this one."""
        assert self._inner is not None
        for mine, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update(_options(mine))
        return self._inner

    def _copies(self, parameters: list[Tensor]) -> list[Tensor]:
        """The tensors updated in place of the parameters."""
        for parameter in parameters:
            if parameter.dtype.itemsize < 4:
                self._masters[parameter] = parameter.detach().float().requires_grad_()
        return [self._masters.get(parameter, parameter) for parameter in parameters]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._masters.items())


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
