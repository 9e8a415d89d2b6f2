"""A controller in transformers.Trainer: `Trainer(..., callbacks=[LowRankCallback(controller)])`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..errors import LowrankError
from ..types import Controller
from .parts.distributed import world, wrapper_of

STATE = "lowrank_controller.json"
Build = Callable[[nn.Module, Any], Controller]


class LowRankCallback(TrainerCallback):
    """Calls a controller where a loop would: before and after the optimizer's step.

    Penalties and truncations act on gradients and weights in place; the Trainer stays as it is.
    Call `callback.controller.finish()` after `trainer.train()`.
    """

    def __init__(self, controller: Controller | Build) -> None:
        """
        Args:
            controller: built on the model and the optimizer that the Trainer is given
                (`optimizers=(optimizer, None)`), or a function (model, optimizer) -> controller,
                called when training begins. On several processes it must be a function.
        """
        self._build: Build | None = None
        self._controller: Controller | None = None
        if isinstance(controller, Controller):
            self._controller = controller
        elif callable(controller):
            self._build = controller
        else:
            got = type(controller).__name__
            raise LowrankError(f"expected a controller, or a function that builds one, got {got}")

    @property
    def controller(self) -> Controller:
        """The controller.

        Raises:
            LowrankError: a function builds it, and training has not begun.
        """
        if self._controller is None:
            raise LowrankError("the controller is built when training begins: call trainer.train()")
        return self._controller

    def resume(self, checkpoint: str | Path) -> None:
        """Take up the ranks of a checkpoint, before
        `trainer.train(resume_from_checkpoint=checkpoint)`.

        Raises:
            LowrankError: the folder has no controller's state, or the controller is not built yet.
        """
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise LowrankError(f"{checkpoint} has no {STATE}: it was saved without LowRankCallback")
        if self._controller is None:
            raise LowrankError(
                "to resume, build the controller first and give it to LowRankCallback: a function "
                "is called only after the Trainer has loaded its checkpoint"
            )
        self._controller.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Build the controller, or give it the optimizer that the Trainer has wrapped."""
        if self._build is not None and self._controller is None:
            self._controller = self._build(wrapper_of(model) if world() > 1 else model, optimizer)
        else:
            self.controller.rebind(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.controller.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.controller.after_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.controller.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the controller's state beside the model's and the optimizer's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            text = json.dumps(self.controller.state_dict())
            (folder / STATE).write_text(text, encoding="utf-8")
