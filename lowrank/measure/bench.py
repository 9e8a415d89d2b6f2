"""What a forward pass costs: time, tokens per second, MACs, parameters, bytes and peak memory.

On a noisy machine two times taken one after the other say little. With a reference the two models
are timed in alternation, and the ratio reported is the median of the ratios within the pairs.
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

BLOCK_S = 0.02  # one repeat times as many calls as fill this
MOST_CALLS = 1000  # in one repeat
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
    """What one forward pass costs, in evaluation mode without gradients.

    Attributes:
        latency_ms: median over the repeats of the time of one forward pass.
        iqr_ms: interquartile range of the same.
        tokens_per_s: output positions per second at the median; see `positions`.
        positions: vectors in the output: tokens of a language model, rows of a classifier.
        macs: multiply-accumulates in matrix products and convolutions; attention counts as its two
            full products, whatever kernel computes it.
        params: numbers in all parameters, each stored tensor once.
        bytes: of the tensors that a checkpoint holds, buffers included, each stored tensor once.
        peak_bytes: `bytes`, and the most that the tensors made during one forward pass hold at one
            time. On CUDA as the allocator counts it; elsewhere every tensor that an operator
            returns is counted while its memory is alive, but not what kernels use inside.
        device, threads: where the model is, and threads of the CPU.
        repeats: how many times were taken.
        reference: the same of the other model, timed in alternation.
        time_ratio: median over the pairs of time / the reference's time; below 1 is faster.
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
        """One row a quantity, as text; with a reference its number and the ratio stand beside."""
        other = self.reference
        return [
            {
                "of one forward": label,
                "model": format(getattr(self, name), spec),
                "reference": "" if other is None else format(getattr(other, name), spec),
                "ratio": self._ratio(name),
            }
            for label, name, spec in _QUANTITIES
        ]

    def head(self) -> str:
        """Under which conditions it was measured."""
        paired = "" if self.reference is None else ", in pairs: the ratio is the median of theirs"
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
        model: its modes are as before afterwards.
        example: one batch: a tensor, or a dict of keywords ("labels" are left out).
        reference: such as the dense model: both are timed alternately, and compared pair by pair.
        repeats: of the timing; each one lasts at least about 20 ms.

    Raises:
        LowrankError: the example is no such thing, or `repeats` is no positive integer.
    """
    if not isinstance(example, Tensor | Mapping):
        raise LowrankError(
            f"example must be a tensor or a dict of keywords, got {type(example).__name__}"
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
    """Seconds a call, per model and repeat; the models take turns."""
    from torch.utils.benchmark import Timer  # loads setuptools: not when lowrank is imported

    timers, calls = [], []
    for model, batch in zip(models, batches, strict=True):
        names = {"forward": forward, "model": model, "batch": batch}
        # Its own default is a single thread.
        timer = Timer("forward(model, batch)", globals=names, num_threads=torch.get_num_threads())
        once = max(timer.timeit(1).median, 1e-9)  # warms up by itself
        timers.append(timer)
        calls.append(min(max(math.ceil(BLOCK_S / once), 1), MOST_CALLS))
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(repeats):
        for kept, timer, number in zip(times, timers, calls, strict=True):
            kept.append(timer.timeit(number).median)
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
    # The fused attention of the CPU is unknown to the counter: its plain form is two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = first_tensor(forward(model, batch))
    positions = 1 if output is None else math.prod(output.shape[:-1])
    return positions, int(counter.get_total_flops()) // 2


def _stored(model: nn.Module) -> tuple[int, int]:
    """Numbers in the parameters, and bytes of all that a checkpoint holds; each tensor once."""
    state = [t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)]
    params = {(p.device, p.data_ptr(), p.shape): p.numel() for p in model.parameters()}
    every = {(t.device, t.data_ptr(), t.shape): t.numel() * t.dtype.itemsize for t in state}
    return sum(params.values()), sum(every.values())


def _peak(model: nn.Module, batch: Batch) -> int:
    """The most bytes that tensors made during one forward pass hold at one time."""
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
    """Counts the memory of every tensor that an operator returns, from its making to its end."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._now = 0
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            self._note(tensor.untyped_storage())
        return output

    def _note(self, storage: torch.UntypedStorage) -> None:
        where, size = storage.data_ptr(), storage.nbytes()
        if size > 0 and where not in self._known:
            self._known.add(where)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._free, where, size).atexit = False

    def _free(self, where: int, size: int) -> None:
        self._known.discard(where)
        self._now -= size


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _placed(example: Tensor | Mapping[str, Any], device: torch.device) -> Batch:
    """The batch on the model's device, so that no copy is timed."""
    (batch,) = cast(list[Batch], materialise(example))
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
