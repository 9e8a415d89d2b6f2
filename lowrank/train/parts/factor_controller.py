"""The life of a controller over plain factors, from the checks to the last step.

Each method adds what it does to gradients, after a step, and at the end of an epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LowrankError
from ...nn import LowRankLinear
from ...types import Site
from ...walk.sites import Patterns
from .attachment import Attachment, refuse_not_finite
from .factors import blank, leave, resize


class FactorController:
    """What controllers over dense layers and LowRankLinear share; see `lowrank.types.Controller`.

    Attributes:
        history: one dict an event, with "step", "site", "event", and what was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        target_modules: Patterns,
        exclude_modules: Patterns | None,
        **found: Any,
    ) -> None:
        """All checks; nothing is changed yet."""
        self._at = Attachment(
            model,
            optimizer,
            type(self).__name__,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            **found,
        )
        self._layers: dict[str, nn.Module] = {s.name: s.module for s in self._at.sites}
        for site in self._at.sites:
            self._at.claim(site.name, site.module)
        self._ready = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return self._at.history

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer that is factored now."""
        return {name: m.rank for name, m in self._factored().items()}

    def rebind(self, optimizer: Any) -> None:
        """A trainer wrapped the optimizer by itself: see `Attachment.rebind`."""
        self._at.rebind(optimizer)

    @torch.no_grad()
    def before_step(self) -> None:
        """After backward and clipping: add the gradients of penalties, which are not clipped.

        Raises:
            LowrankError: a gradient is not finite; nothing was changed.
        """
        if not self._at.acting():
            return
        found = self._gradients()
        finite = all(g is None or bool(g.isfinite().all()) for g in found.values())
        if not finite:
            self._spoilt()
            if not self._at.scaled():
                refuse_not_finite(found)
        self._ready = True
        if finite:  # else the scaler will skip this step
            self._add()

    @torch.no_grad()
    def after_step(self) -> None:
        """After `optimizer.step()`.

        Raises:
            LowrankError: `before_step` was not called.
        """
        if not self._at.stepped():
            return
        if not self._ready:
            raise LowrankError(
                f"{self._at.who}.before_step was not called: call it after backward() and before "
                "optimizer.step(), or the step misses what the method does to gradients"
            )
        self._ready = False
        self._at.step += 1
        self._stepped()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """At the end of an epoch."""
        self._epoch()

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The model with plain factored layers (dense where not larger); the controller is done."""
        self._last()
        for name, module in self._layers.items():
            self._leave(name, module)
        return self._close()

    def detach(self) -> None:
        """Stop adapting: the layers stay as they are and are trained on by the optimizer."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """JSON. Load it before the model's and the optimizer's states: it sets their sizes."""
        return {
            "controller": self._at.who,
            "step": self._at.step,
            "sites": {name: self.ranks.get(name) for name in self._layers},
            "policy": self._policy(),
            "history": list(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the sizes and the place of a checkpoint, before model and optimizer.

        Raises:
            LowrankError: it is of another controller, of other sites, or of a later stage.
        """
        self._at.check_state(state, self._layers)
        for site in list(self._at.sites):
            self._resume(site, state["sites"][site.name])
        self._at.step = state["step"]
        self._take(state["policy"])
        self.history[:] = state["history"]
        self._at.resized()

    def _resume(self, site: Site, rank: int | None) -> None:
        module = self._layers[site.name]
        if isinstance(module, LowRankLinear):
            if rank is None:
                raise LowrankError(
                    f"{site.name} is dense in this state and factored here: build the controller "
                    "on a fresh model, as when the run began"
                )
            down, up = module.down.weight, module.up.weight
            new = down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)
            resize(self._at, module, *new)
        elif rank is not None:
            self._layers[site.name] = blank(self._at, site, rank)

    def _factored(self) -> dict[str, LowRankLinear]:
        return {n: m for n, m in self._layers.items() if isinstance(m, LowRankLinear)}

    def _gradients(self) -> dict[str, Tensor | None]:
        return {
            f"{name}.{key}": p.grad
            for name, module in self._layers.items()
            for key, p in module.named_parameters()
            if not key.endswith("bias")
        }

    def _close(self) -> nn.Module:
        self._layers = {}
        self._at.resized()
        self._at.release()
        return self._at.root

    # What a method adds.
    def _add(self) -> None:
        """To the gradients, after backward."""

    def _spoilt(self) -> None:
        """Gradients of this step are not finite: forget what was taken from them."""

    def _stepped(self) -> None:
        """After a step that was made."""

    def _epoch(self) -> None:
        """At the end of an epoch."""

    def _last(self) -> None:
        """Before the layers are left."""

    def _leave(self, name: str, module: nn.Module) -> None:
        """Put something plain in place of a layer."""
        leave(self._at, name, module)

    def _policy(self) -> dict[str, Any]:
        """JSON: the method's own place."""
        return {}

    def _take(self, policy: dict[str, Any]) -> None:
        """What `_policy` gave."""
