"""What layers read while a model runs on data, with features last and without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..calibration.batches import Batch, Data, materialise, rows_in
from ..calibration.running import first_tensor, forward, quiet
from ..calibration.statistics import Calibration, followed
from ..errors import LowrankError
from ..plans.progress import steps
from ..walk import layouts
from ..walk.checks import check_model
from ..walk.sites import ALL_LINEAR, Patterns, find_sites, select_sites
from ..walk.surgery import factored

_PLAIN = nn.Identity()  # stands for a layer that reads features last


class Tap(NamedTuple):
    """A layer whose input is read.

    Attributes:
        axes: number of axes that follow the channels; 0 if features come last.
    """

    name: str
    module: nn.Module
    axes: int

    @property
    def title(self) -> str:
        return self.name or "(root)"

    def features_last(self, tensor: Tensor) -> Tensor:
        """(rows, …, features); a convolution's input without rows gets one."""
        if not self.axes:
            return tensor
        tensor = tensor if tensor.ndim > self.axes + 1 else tensor[None]
        return tensor.movedim(1, -1)


class Read(NamedTuple):
    """What one layer read in one call.

    Attributes:
        features: (rows, …, features).
        real: the positions (rows, …) that are no padding, bool; None for all.
        by_row: whether the first axis is that of the batch's rows.
        start: number of rows in the batches before this one.
    """

    features: Tensor
    real: Tensor | None
    by_row: bool
    start: int

    def positions(self) -> Tensor:
        """(positions, features), without padding."""
        if self.real is not None:
            return self.features[self.real]
        return self.features.reshape(-1, self.features.shape[-1])


def taps_of(
    model: nn.Module,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
) -> list[Tap]:
    """All linear layers and convolutions, dense or factored, or those that are named.

    Raises:
        LowrankError: a pattern matches nothing, or the model is none.
    """
    check_model(model)
    already = factored(model)
    sites = find_sites(model)
    named = exclude_modules is not None or target_modules != ALL_LINEAR
    if sites or not already:
        sites = select_sites(sites, model, target_modules, exclude_modules)
    wanted = {name for site in sites if not (named and site.reason) for name in site.names}
    taps = []
    for name, module in model.named_modules():
        if name in already and not named and already[name].KIND != "embedding":
            dims = len(already[name].spec().get("kernel_size", ()))
            taps.append(Tap(name, module, dims))
        elif name in wanted and layouts.kind(module) in ("linear", "conv"):
            weight: Any = module.weight
            taps.append(Tap(name, module, max(weight.ndim - 2, 0)))
    return taps


def batches_of(data: Data | Calibration, tokenizer: Any, length: int) -> list[Batch]:
    """The data as batches that can be run.

    Raises:
        LowrankError: there is none, or it is a callable.
    """
    if data is None or (isinstance(data, str) and not data.strip()):
        raise LowrankError("features are of data: pass data=…, a text or batches")
    if isinstance(data, Calibration):
        batches = data.batches
    else:
        batches = materialise(data, tokenizer, length=length)
    if callable(batches):
        raise LowrankError("features need batches to run the model on, not a callable")
    return batches


def read_inputs(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Sequence[Batch],
    see: Callable[[Tap, Read], None],
    *,
    progress: bool = False,
) -> None:
    """Run the model on the batches, and hand on what each layer reads, call by call."""
    padding, batches = followed(model, batches)
    start = 0
    with quiet(model), padding, ExitStack() as stack:

        def hook(tap: Tap) -> Callable[..., None]:
            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                tensor = first_tensor((args, kwargs))
                if tensor is None or not tensor.numel() or not tensor.is_floating_point():
                    return
                last = tap.features_last(tensor)
                real = padding.real(tap.name, _PLAIN if tap.axes else module, last)
                by_row = last.ndim > 1 and len(last) == rows
                see(tap, Read(last, real, by_row, start))

            return before

        for tap in taps:
            handle = tap.module.register_forward_pre_hook(hook(tap), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in steps(batches, "batch", progress):
            rows = rows_in(batch)
            padding.start(batch)
            forward(model, batch)
            start += rows
