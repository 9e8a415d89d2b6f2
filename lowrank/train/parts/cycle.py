"""The cycle of dynamical low-rank training, whatever the form: grow, train the core, truncate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...errors import LowrankError
from .attachment import Attachment, refuse_not_finite

Form = TypeVar("Form", bound=nn.Module)


class Cycle(ABC, Generic[Form]):
    """Bases grow in the first step of a cycle, the core is trained in the others, the last of which
    ends with a truncation. What growing and truncating mean is up to the form of the weight.

    Attributes:
        every: steps of a cycle.
    """

    every: int
    _at: Attachment
    _modules: dict[str, Form]
    _since = 0  # steps since the bases were enlarged
    _armed = False  # whether the next step enlarges them

    @abstractmethod
    def _bases(self, module: Form) -> Iterable[tuple[str, Tensor]]:
        """The orthonormal parameters, by their names within the module."""

    @abstractmethod
    def _augment(self, name: str, module: Form) -> None:
        """Enlarge the bases by their gradients; the weight stays what it is."""

    @abstractmethod
    def _truncate(self) -> None:
        """Cut every core. Raises LowrankError, before anything is changed, if one is not finite."""

    @abstractmethod
    def _leave(self, name: str, module: Form) -> None:
        """Put the finished layer in place of the form."""

    @abstractmethod
    def _sizes(self, module: Form) -> Sequence[int]:
        """What `_blank` needs to give the module these sizes again."""

    @abstractmethod
    def _blank(self, module: Form, sizes: Sequence[int]) -> None:
        """Give parameters and optimizer these sizes; numbers are loaded later."""

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._at.history

    def rebind(self, optimizer: Any) -> None:
        """A trainer wrapped the optimizer by itself: see `Attachment.rebind`."""
        self._at.rebind(optimizer)

    @torch.no_grad()
    def before_step(self) -> None:
        """After backward and clipping: where a cycle begins, enlarge the bases.

        Raises:
            LowrankError: a gradient is not finite; nothing was changed.
        """
        if not self._at.acting() or not self._armed:
            return
        found = {f"{n}.{k}": p.grad for n, m in self._modules.items() for k, p in self._bases(m)}
        if self._at.scaled() and not all(g is None or g.isfinite().all() for g in found.values()):
            return  # the scaler will skip this step: the cycle begins with the next one
        refuse_not_finite(found)
        for name, module in self._modules.items():
            self._augment(name, module)
        self._since = 0
        self._arm(False)

    @torch.no_grad()
    def after_step(self) -> None:
        """After `optimizer.step()`: where a cycle ends, truncate.

        Raises:
            LowrankError: `before_step` was not called, or a core is not finite.
        """
        if not self._at.stepped():
            return
        if self._armed:
            raise LowrankError(
                f"{type(self).__name__}.before_step was not called: call it after backward() and "
                "before optimizer.step(), or the optimizer moves U and V off their manifold"
            )
        self._at.step += 1
        self._since += 1
        if self._since >= self.every:
            self._truncate()
            self._arm(True)

    def end_epoch(self) -> None:
        """Truncate now, so that the model is evaluated at its true ranks; a cycle begins anew."""
        if not self._armed:
            with torch.no_grad():
                self._truncate()
            self._arm(True)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Truncate a last time; the model with plain factored layers (dense where not larger).

        The optimizer then holds the new parameters. The controller is done.
        """
        if not self._armed:
            self._truncate()
        for name, module in self._modules.items():
            self._leave(name, module)
        return self._close()

    @torch.no_grad()
    def detach(self) -> None:
        """Stop adapting: the layers stay U S Vᵀ, all three trained from now on by the optimizer."""
        if not self._armed:
            self._truncate()
        for module in self._modules.values():
            module.requires_grad_(True)
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """JSON. Load it before the model's and the optimizer's states: it sets their sizes."""
        return {
            "controller": type(self).__name__,
            "step": self._at.step,
            "since": self._since,
            "armed": self._armed,
            "sites": {name: list(self._sizes(m)) for name, m in self._modules.items()},
            "history": list(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the sizes and the place in the cycle of a checkpoint, before model and optimizer.

        Raises:
            LowrankError: it is of another controller, or of other sites.
        """
        self._at.check_state(state, self._modules)
        for name, sizes in state["sites"].items():
            self._blank(self._modules[name], sizes)
        self._at.step, self._since = state["step"], state["since"]
        self.history[:] = state["history"]
        self._arm(state["armed"])

    def _arm(self, on: bool) -> None:
        """U and V need gradients only in the step that enlarges them."""
        self._armed = on
        for module in self._modules.values():
            for _, parameter in self._bases(module):
                parameter.requires_grad_(on)
                parameter.grad = None
        self._at.resized()

    def _close(self) -> nn.Module:
        self._armed = False
        self._modules = {}
        self._at.resized()
        self._at.release()
        return self._at.root
