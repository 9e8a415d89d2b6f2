"""Model and optimizer as a controller holds them: its sites, its claims, and when it acts.

A controller never owns the loop. It is built after `accelerate.prepare` or DDP, and is called
between backward and `optimizer.step()` and once more after it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import LowrankError, listed
from ...nn import Form, remember_layout
from ...types import Site
from ...walk import surgery
from ...walk.sites import ALL_LINEAR, NOT_NAMED, Patterns, covers, find_sites, select_sites
from . import distributed, wrappers
from .compressed import with_factored
from .optimizer import holds
from .wrappers import inner_optimizer

LINEAR = frozenset({"linear"})
WIDE = (torch.float32, torch.float64)  # what can hold an orthonormal basis

# Modules that a controller trains: its name, and the kind of the site.
_CLAIMED: weakref.WeakKeyDictionary[nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


class Attachment:
    """The model, its optimizer, the sites of one controller, and the record of what happened.

    Attributes:
        model: as it was given, perhaps in DDP; `root` is the module inside.
        optimizer: as it was given, perhaps in accelerate's wrapper.
        sites: what the controller may adapt, in the model's order. Names are those within `root`.
        history: one dict per event: "step", "site", "event", and what was measured.
        step: optimizer steps since the attachment (or since the run that was resumed began).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        who: str,
        *,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
        kinds: Collection[str] = LINEAR,
        find: Callable[[nn.Module], list[Site]] = find_sites,
        takes: Collection[type[Form]] = (),
    ) -> None:
        """Check everything; nothing is changed.

        Args:
            who: the controller's name, for errors.
            kinds: kinds of sites that it adapts.
            find: lists the sites; by default those of layers that are not factored yet.
            takes: factored forms that it adapts too; layers of other forms are left, with the
                reason.

        Raises:
            LowrankError: the model is sharded, already has a controller on such a site, or has
                nothing to adapt; all reasons are listed.
        """
        self.who, self.model, self.optimizer = who, model, optimizer
        self.root = surgery.unwrapped(model)
        self.history: list[dict[str, Any]] = []
        self.step = 0
        distributed.refuse_sharded(model, optimizer, who)
        inner_optimizer(optimizer)
        self._prepared = wrappers.is_prepared(self.root)
        if distributed.world() > 1 and not wrappers.has_ddp(model):
            raise LowrankError(
                f"{who} was built before the model was wrapped for {distributed.world()} "
                "processes: call accelerate.prepare or DistributedDataParallel first"
            )
        _refuse_claimed(self.root, who, target_modules, kinds)
        found = with_factored(self.root, find(self.root), who, takes, kinds)
        every = select_sites(found, self.root, target_modules, exclude_modules, adapts=True)
        reasons = {site.title: self._reason(site, kinds) for site in every}
        self.sites = [site for site in every if not reasons[site.title]]
        if not self.sites:
            named = sorted(reasons.items(), key=lambda item: item[1] == NOT_NAMED)
            left = [f"{name} ({reason})" for name, reason in named]
            raise LowrankError(f"{who} has nothing to adapt: {listed(left, 5) or 'no known layer'}")
        for name, reason in reasons.items():
            if reason:
                self.note("left", name, reason=reason)
        self._trained: dict[str, nn.Module] = {}

    def _reason(self, site: Site, kinds: Collection[str]) -> str:
        """Why a site is left alone, or nothing."""
        weights = weights_of(site.module)
        if site.reason:
            return site.reason
        if site.kind not in kinds:
            return f"{self.who} adapts {' and '.join(sorted(kinds))}, this is {site.kind}"
        if site.name == "":
            return "the model is this one layer: put it into an nn.Sequential"
        if len(site.modules) > 1:
            return f"its weight is tied to {site.names[1]}"
        if not all(w.requires_grad for w in weights):
            return "its weight is frozen"
        if not all(holds(self.optimizer, w) for w in weights):
            return "its weight is not in the optimizer"
        if weights[0].dtype not in WIDE:
            return f"its weight is {weights[0].dtype}: keep weights in fp32 and train with autocast"
        finite = all(bool(torch.isfinite(w).all()) for w in weights)
        return "" if finite else "its weight has numbers that are not finite"

    def put(self, site: Site, new: nn.Module) -> None:
        """Replace the layer of a site and claim what is there now; the optimizer is not touched."""
        _CLAIMED.pop(site.module, None)
        surgery.put(self.root, site, new)
        if isinstance(site.module, Form):
            remember_layout(new, site.module.layout)
        self.sites = [
            dataclasses.replace(s, modules=(new,)) if s is site else s for s in self.sites
        ]
        self.claim(site.name, new, site.kind)

    def claim(self, name: str, module: nn.Module, kind: str = "linear") -> None:
        """Refuse the module to other controllers until `release`."""
        _CLAIMED[module] = (self.who, kind)
        self._trained[name] = module

    def set(self, name: str, new: nn.Module) -> None:
        """Put a module at the name of a site in place of what the controller trained there."""
        old = surgery.module_at(self.root, name)
        new.train(old.training)
        surgery.swap(self.root, {id(old): new})

    def release(self) -> None:
        """Give up all claims, so that another controller may take the sites."""
        for module in self._trained.values():
            _CLAIMED.pop(module, None)
        self._trained.clear()

    def acting(self) -> bool:
        """Whether this call belongs to an optimizer step: false between accumulated batches.

        Raises:
            LowrankError: the model was given to accelerate after the controller was built.
        """
        if wrappers.is_prepared(self.root) and not self._prepared:
            raise LowrankError(
                f"{self.who} was built before accelerate.prepare: prepare model and optimizer "
                f"first, and build {self.who} with what it returns"
            )
        return wrappers.synchronises(self.optimizer)

    def skipped(self) -> bool:
        """Whether a gradient scaler skipped the optimizer's last step."""
        return wrappers.skipped_step(self.optimizer)

    def scaled(self) -> bool:
        """Whether a gradient scaler will skip a step with gradients that are not finite."""
        return wrappers.is_scaled(self.optimizer)

    def loss_scale(self) -> float:
        """What the gradients are multiplied by now, and what is added to them has to be."""
        return wrappers.loss_scale(self.optimizer)

    def rebind(self, optimizer: Any) -> None:
        """Take the optimizer as a trainer has wrapped it.

        Raises:
            LowrankError: the optimizer is another one.
        """
        if inner_optimizer(optimizer) is not inner_optimizer(self.optimizer):
            raise LowrankError(
                f"{self.who} was built with another optimizer than the trainer's: pass it as "
                "optimizers=(optimizer, None), or give LowRankCallback a function that builds "
                "the controller from model and optimizer"
            )
        self.optimizer, self._prepared = optimizer, wrappers.is_prepared(self.root)

    def resized(self) -> None:
        """To be called after parameters were replaced: DDP then synchronises the new ones."""
        distributed.renew(self.model)

    def check_state(self, state: Mapping[str, Any], sites: Collection[str]) -> None:
        """Whether a saved state is of this controller and these sites.

        Raises:
            LowrankError: it is not; the message says what differs.
        """
        if state.get("controller") != self.who:
            got = state.get("controller")
            raise LowrankError(f"this state was saved by {got}, it cannot go on with {self.who}")
        if set(state["sites"]) != set(sites):
            differ = sorted(set(state["sites"]) ^ set(sites))
            raise LowrankError(f"this state was saved with other layers: {listed(differ, 3)}")

    def note(self, event: str, site: str, **values: Any) -> None:
        """Add a line to the history; values are numbers, strings, or lists of them."""
        self.history.append({"step": self.step, "site": site, "event": event, **values})


def weights_of(module: nn.Module) -> list[nn.Parameter]:
    """The weight of a layer, or its factors; biases are left out."""
    return [p for name, p in module.named_parameters() if not name.endswith("bias")]


def refuse_not_finite(
    tensors: Mapping[str, torch.Tensor | None], what: str = "the gradient"
) -> None:
    """To be called before anything is computed from the tensors.

    Raises:
        LowrankError: a tensor has NaN or Inf; the first such one is named.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise LowrankError(
                f"{what} at {name} has numbers that are not finite; nothing was changed: "
                "skip this batch (zero_grad, no step), or lower the learning rate"
            )


def _refuse_claimed(root: nn.Module, who: str, targets: Patterns, kinds: Collection[str]) -> None:
    for name, module in root.named_modules():
        first, kind = _CLAIMED.get(module, ("", ""))
        if first and kind in kinds and covers(targets, [name]):
            raise LowrankError(
                f"{name} already has a controller ({first}): {who} may take other layers "
                "(target_modules), or call finish() or detach() on the first one"
            )
