"""The cycle of dynamical low-rank training, whatever the form: grow, train the core, truncate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...errors import LowrankError
from .base_controller import BaseController, Layer


class Cycle(BaseController[Layer], ABC):
    """Bases grow in the first step of a cycle, the core is trained in the others, the last of which
    ends with a truncation. What growing and truncating mean is up to the form of the weight.

    Attributes:
        every: steps of a cycle.
    """

    every: int
    _since = 0  # steps since the bases grew
    _armed = False  # whether they grow in the next step

    @abstractmethod
    def bases(self, layer: Layer) -> Iterable[tuple[str, Tensor]]:
        """The orthonormal parameters, by their names within the layer."""

    @abstractmethod
    def grow(self, name: str, layer: Layer) -> None:
        """Enlarge the bases by their gradients; the weight stays what it is."""

    @abstractmethod
    def truncate(self) -> None:
        """Cut every core. Raises LowrankError, before anything is changed, if one is not finite."""

    def arm(self, on: bool) -> None:
        """Begin a cycle, or go on in it: bases need gradients only in the step in which they grow.

        A method calls it once, when its layers are in place.
        """
        self._armed = on
        for layer in self.layers.values():
            for _, parameter in self.bases(layer):
                parameter.requires_grad_(on)
                parameter.grad = None
        self.attachment.resized()

    def gradients(self) -> dict[str, Tensor | None]:
        layers = self.layers if self._armed else {}
        return {f"{n}.{key}": p.grad for n, m in layers.items() for key, p in self.bases(m)}

    def on_gradients(self) -> None:
        if self._armed:
            for name, layer in self.layers.items():
                self.grow(name, layer)
            self._since = 0
            self.arm(False)

    def on_step(self) -> None:
        self._since += 1
        if self._since >= self.every:
            self.on_epoch()

    def on_epoch(self) -> None:
        """Truncate, so that the model is evaluated at its true ranks; the next cycle begins."""
        if not self._armed:
            self.truncate()
            self.arm(True)

    def on_finish(self) -> None:
        if not self._armed:
            self.truncate()

    def on_detach(self) -> None:
        self.on_finish()
        for layer in self.layers.values():
            layer.requires_grad_(True)

    def on_close(self) -> None:
        self._armed = False

    def progress(self) -> dict[str, Any]:
        return {"since": self._since, "armed": self._armed}

    def resume(self, state: dict[str, Any]) -> None:
        self._since = state["since"]
        self.arm(state["armed"])


def check_options(
    tolerance: float | None, ratio: float | None, every: int, least: int, most: int | None
) -> float:
    """The tolerance: 0.1 by default, and none beside a ratio.

    Raises:
        LowrankError: an option is out of range.
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise LowrankError(
            f"tolerance must be in [0, 1), got {tolerance}: at 1 and above it truncates everything"
        )
    if ratio is not None and not 0 < ratio < 1:
        raise LowrankError(f"ratio is the share kept, in (0, 1), got {ratio}")
    if every < 2:
        raise LowrankError(
            f"every must be at least 2, got {every}: one step enlarges the bases, the others train"
        )
    if least < 1 or (most is not None and most < least):
        raise LowrankError(f"need 1 <= min_rank <= max_rank, got {least} and {most}")
    return (0.1 if ratio is None else 0.0) if tolerance is None else tolerance
