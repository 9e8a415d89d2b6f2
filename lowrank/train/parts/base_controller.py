"""The life that all controllers share, from the checks to `finish`.

A method gives its options and its checks of the sites, puts what it trains into `layers`, and fills
in the hooks that it needs. It never overrides what the user's loop calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...errors import LowrankError
from ...nn import Form
from ...types import Site
from ...walk.sites import ALL_LINEAR, Patterns, find_sites
from .attachment import LINEAR, Attachment, refuse_not_finite

Layer = TypeVar("Layer", bound=nn.Module)


class BaseController(Generic[Layer]):
    """What the user's loop calls, and the hooks of a method; see `lowrank.types.Controller`.

    Attributes:
        attachment: model, optimizer, sites, the number of steps made, the history.
        layers: what is trained at every site, by name.
        TAKES: forms of layers factored before, by `compress` say, that the method goes on from;
            others are left as they are, with the reason in the history.
    """

    TAKES: ClassVar[tuple[type[Form], ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        *,
        kinds: Collection[str] = LINEAR,
        find: Callable[[nn.Module], list[Site]] = find_sites,
    ) -> None:
        """Check everything, then claim the sites; model and optimizer are not changed yet.

        A method sets its options before, because `check_sites` reads them, and replaces layers
        afterwards. Arguments are those of `Attachment`.
        """
        self.attachment = Attachment(
            model,
            optimizer,
            type(self).__name__,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            kinds=kinds,
            find=find,
            takes=self.TAKES,
        )
        self.check_sites()
        self.layers: dict[str, Layer] = {}
        for site in self.attachment.sites:
            self.attachment.claim(site.name, site.module, site.kind)
            self.layers[site.name] = site.module  # type: ignore[assignment]
        self._ready = False  # whether `before_step` was called for the step to come

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.attachment.history

    def rebind(self, optimizer: Any) -> None:
        """A trainer has wrapped the optimizer: see `Attachment.rebind`."""
        self.attachment.rebind(optimizer)

    @torch.no_grad()
    def before_step(self) -> None:
        """After backward and clipping. What is added to gradients here is not clipped.

        Raises:
            LowrankError: a gradient is not finite; nothing was changed.
        """
        if not self.attachment.acting():
            return
        gradients = self.gradients()
        finite = all(g is None or bool(g.isfinite().all()) for g in gradients.values())
        if not finite:
            self.on_overflow()
            if not self.attachment.scaled():
                refuse_not_finite(gradients)
        self._ready = True
        if finite:  # else the scaler will skip this step
            self.on_gradients()

    @torch.no_grad()
    def after_step(self) -> None:
        """After `optimizer.step()`.

        Raises:
            LowrankError: `before_step` was not called.
        """
        if not self.attachment.acting():
            return
        ready, self._ready = self._ready, False
        if self.attachment.skipped():
            self.on_skip()
            return
        if not ready:
            raise LowrankError(
                f"{self.attachment.who}.before_step was not called: call it after backward() and "
                "before optimizer.step(), because the method acts on gradients there"
            )
        self.attachment.step += 1
        self.on_step()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """At the end of an epoch, before the model is evaluated."""
        self.on_epoch()

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The model with plain layers, ready to save; the controller is done."""
        self.on_finish()
        for name, layer in self.layers.items():
            self.leave(name, layer)
        return self._close()

    @torch.no_grad()
    def detach(self) -> None:
        """Stop: the layers stay as they are, and the optimizer trains all of them freely."""
        self.on_detach()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """JSON. Load it before the model's and the optimizer's states: it sets their sizes."""
        return {
            "controller": self.attachment.who,
            "step": self.attachment.step,
            "sites": {name: self.size_of(layer) for name, layer in self.layers.items()},
            **self.progress(),
            "history": list(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up sizes and progress of a checkpoint, before model and optimizer take up theirs.

        Raises:
            LowrankError: it is of another controller, of other sites, or does not fit what is
                trained here; nothing is changed then.
        """
        self.attachment.check_state(state, self.layers)
        self.check_state(state)
        for site in list(self.attachment.sites):
            self.resize(site, state["sites"][site.name])
        self.attachment.step = state["step"]
        self.resume(state)
        self.history[:] = state["history"]
        self.attachment.resized()

    def _close(self) -> nn.Module:
        self.on_close()
        self.layers = {}
        self.attachment.resized()
        self.attachment.release()
        return self.attachment.root

    # The hooks. All run without autograd.

    def check_sites(self) -> None:
        """Raise LowrankError if the options do not go with the sites; nothing is claimed yet."""

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradients that the method reads, by the tensor's name: they have to be finite."""
        return {
            f"{name}.{key}": parameter.grad
            for name, layer in self.layers.items()
            for key, parameter in layer.named_parameters()
            if not key.endswith("bias")
        }

    def on_gradients(self) -> None:
        """After backward, with finite gradients: add penalties, grow bases."""

    def on_overflow(self) -> None:
        """Gradients are not finite: forget what was gathered from this backward pass."""

    def on_step(self) -> None:
        """After a step; `attachment.step` counts it already."""

    def on_skip(self) -> None:
        """A gradient scaler has skipped the step."""

    def on_epoch(self) -> None:
        """At the end of an epoch."""

    def on_finish(self) -> None:
        """In `finish`, before `leave` is called for every layer."""

    def leave(self, name: str, layer: Layer) -> None:
        """Put a plain module in place of a layer. Default: it is plain."""

    def on_detach(self) -> None:
        """In `detach`, while the layers are still known."""

    def on_close(self) -> None:
        """The last call, after `finish` or `detach`: take off hooks and buffers."""

    def size_of(self, layer: Layer) -> Any:
        """JSON: what `resize` needs to give a layer its size again. Default: sizes are fixed."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise LowrankError if a checkpoint does not fit; its controller and sites do."""

    def resize(self, site: Site, size: Any) -> None:
        """Give a layer the size of a checkpoint; its numbers are loaded later."""

    def progress(self) -> dict[str, Any]:
        """JSON: where the method is. Its keys join those of `state_dict`."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where the keys of `progress` say; all layers have their sizes."""
