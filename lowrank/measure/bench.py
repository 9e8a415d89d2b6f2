"""Cost of one forward pass: latency, tokens per second, MACs, parameters, bytes, peak memory.

On a noisy machine timings taken one after the other are hard to compare. With a reference the two
models are timed alternately, and the reported ratio is the median of the per-pair ratios.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..calibration.batches import Batch, materialise
from ..calibration.running import first_tensor, forward, quiet, tensors_in
from ..errors import LowrankError
from ..tables import aligned
from .size import stored

BLOCK_S = 0.02  # a repeat makes enough calls to last this long
MOST_CALLS = 1000  # per repeat
_QUANTITIES = (
    ("latency, ms (median)", "latency_ms", ".3f"),
    ("latency, ms (IQR)", "iqr_ms", ".3f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
    ("MACs", "macs", ",d"),
    ("parameters", "params", ",d"),
    ("bytes", "bytes", ",d"),
    ("peak bytes", "peak_bytes", ",d"),
)


@dataclass(frozen=True)
class Benchmark:
    """Cost of one forward pass in evaluation mode, without gradients.

    Attributes:
        latency_ms: time of one forward pass, median over the repeats.
        iqr_ms: interquartile range of that time.
        tokens_per_s: output positions per second at the median latency; see `positions`.
        positions: output vectors: tokens of a language model, samples of a classifier.
        macs: multiply-accumulates of matrix products and convolutions; attention counts as its two
            full products, whatever kernel computes it.
        params: elements of all parameters, each stored tensor once.
        bytes: size of a checkpoint's tensors, buffers included, each stored tensor once.
        peak_bytes: `bytes` plus the peak memory of tensors created during one forward pass. On
            CUDA as the allocator counts it; elsewhere the tensors that operators return, while
            they are alive, without the workspace inside kernels.
        device, threads: the model's device, and the number of CPU threads.
        repeats: number of timings.
        reference: the same for the reference model, timed alternately.
        time_ratio: time / reference time, median over the pairs; below 1 is faster.
    """

    latency_ms: float
    iqr_ms: float
    tokens_per_s: float
    positions: int
    macs: int
    params: int
    bytes: int
    peak_bytes: int
    device: str
    threads: int
    repeats: int
    reference: Benchmark | None = None
    time_ratio: float | None = None

    def rows(self) -> list[dict[str, str]]:
        """One row per quantity, as text; with a reference also its value and the ratio."""
        other = self.reference
        return [
            {
                "per forward pass": label,
                "model": format(getattr(self, name), spec),
                "reference": "" if other is None else format(getattr(other, name), spec),
                "ratio": self._ratio(name),
            }
            for label, name, spec in _QUANTITIES
        ]

    def head(self) -> str:
        """The conditions of the measurement, in one line."""
        paired = "" if self.reference is None else ", in alternating pairs (median ratio)"
        where = f"{self.device}, {self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.positions} positions on {where}, {self.repeats} repeats{paired}"

    def _ratio(self, name: str) -> str:
        if self.reference is None or self.time_ratio is None or name == "iqr_ms":
            return ""
        if name in ("latency_ms", "tokens_per_s"):
            ratio = self.time_ratio if name == "latency_ms" else 1 / self.time_ratio
        else:
            ratio = getattr(self, name) / max(getattr(self.reference, name), 1)
        return f"{ratio:.3f}"

    def __str__(self) -> str:
        return "\n".join([self.head(), *aligned(self.rows())])


def benchmark(
    model: nn.Module,
    example: Tensor | Mapping[str, Any],
    reference: nn.Module | None = None,
    *,
    repeats: int = 15,
) -> Benchmark:
    """Measure one forward pass on `example`.

    Args:
        model: its training flags are restored.
        example: one batch: a tensor, or a dict of keyword arguments ("labels" are left out).
        reference: such as the dense model; the two are timed alternately and compared in pairs.
        repeats: number of timings, each of at least about 20 ms.

    Raises:
        LowrankError: `example` is of another type, or `repeats` is not a positive integer.
    """
    if not isinstance(example, Tensor | Mapping):
        raise LowrankError(
            f"example must be a tensor or a dict of keyword arguments, got {type(example).__name__}"
        )
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise LowrankError(f"repeats must be a positive integer, got {repeats!r}")
    models = [model] if reference is None else [model, reference]
    with quiet(nn.ModuleList(models)):
        batches = [_placed(example, _device(each)) for each in models]
        times = _times(models, batches, repeats)
        results = [_measured(*each) for each in zip(models, batches, times, strict=True)]
    if reference is None:
        return results[0]
    ratio = statistics.median(one / other for one, other in zip(*times, strict=True))
    return replace(results[0], reference=results[1], time_ratio=ratio)


def _times(models: list[nn.Module], batches: list[Batch], repeats: int) -> list[list[float]]:
    """Seconds per call, by model and repeat; the models take turns."""
    from torch.utils.benchmark import Timer  # loads setuptools, so not on import of lowrank

    timers, calls = [], []
    for model, batch in zip(models, batches, strict=True):
        names = {"forward": forward, "model": model, "batch": batch}
        # The default of Timer is a single thread.
        timer = Timer("forward(model, batch)", globals=names, num_threads=torch.get_num_threads())
        once = max(timer.timeit(1).median, 1e-9)  # includes a warm-up
        timers.append(timer)
        calls.append(min(max(math.ceil(BLOCK_S / once), 1), MOST_CALLS))
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(repeats):
        for own, timer, number in zip(times, timers, calls, strict=True):
            own.append(timer.timeit(number).median)
    return times


def _measured(model: nn.Module, batch: Batch, times: list[float]) -> Benchmark:
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(quarters).tolist()
    (positions, macs), (params, stored) = _work(model, batch), _stored(model)
    return Benchmark(
        latency_ms=median * 1e3,
        iqr_ms=(high - low) * 1e3,
        tokens_per_s=positions / median,
        positions=positions,
        macs=macs,
        params=params,
        bytes=stored,
        peak_bytes=stored + _peak(model, batch),
        device=_device(model).type,
        threads=torch.get_num_threads(),
        repeats=len(times),
    )


def _work(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """Output positions and multiply-accumulates of one forward pass."""
    # The counter does not know the CPU's fused attention; the math kernel is two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = first_tensor(forward(model, batch))
    positions = 1 if output is None else math.prod(output.shape[:-1])
    return positions, int(counter.get_total_flops()) // 2


def _stored(model: nn.Module) -> tuple[int, int]:
    """Parameter count, and bytes of a checkpoint; each stored tensor once."""
    state = [t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)]
    params = {(p.device, _place(p), p.shape): p.numel() for p in model.parameters()}
    every = {(t.device, t.data_ptr(), t.shape): t.numel() * t.dtype.itemsize for t in stored(state)}
    return sum(params.values()), sum(every.values())


def _place(parameter: Tensor) -> int:
    """Where its memory begins; of a quantized one, that of its codes."""
    return stored([parameter])[0].data_ptr()


def _peak(model: nn.Module, batch: Batch) -> int:
    """Peak bytes of the tensors created during one forward pass."""
    device = _device(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(model, batch)
        return torch.cuda.max_memory_allocated(device) - before
    held = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    with _Alive(held) as alive:
        forward(model, batch)
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the memory of every tensor that an operator returns, while it is alive."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in stored(held)}
        self._now = 0
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in stored(tensors_in(output)):
            self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size > 0 and address not in self._known:
            self._known.add(address)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _placed(example: Tensor | Mapping[str, Any], device: torch.device) -> Batch:
    """The batch on the model's device, so that the transfer is not timed."""
    (batch,) = cast(list[Batch], materialise(example))
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
