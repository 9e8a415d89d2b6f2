"""What low-rank training keeps in memory, and how long a step takes, beside dense training.

    python benchmarks/train.py

Four linear layers of 1024 learn a low-rank map, two convolutions of 128 channels likewise, by
AdamW in float32; all methods take their steps in turns. Bytes are counted from tensors: parameters,
buffers and gathered gradients, gradients, and the optimizer's state, wherever in a step there are
most; activations and what a decomposition needs for a moment are left out. "first step" holds
until the second step, "settled" from the first truncation (or shrinking, merging, switching) on.
Times are medians, and medians of the ratio to the dense step beside it. Learning rates are not
tuned: the loss only shows that all of them learn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

import lowrank
from lowrank.train import DLRT, SMMF, LoQT, Maestro, TuckerDLRT

WIDTH, CHANNELS, RANK = 1024, 128, 8
EVENTS = ("truncate", "shrink", "merge")
Made = tuple[nn.Module, torch.optim.Optimizer, Any]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    return nn.Sequential(layers[0], *[m for layer in layers[1:] for m in (nn.Tanh(), layer)])


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    first, second = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.Tanh(), second)


def with_(build: Callable[[], nn.Module], make: Callable[..., Any] | None = None) -> Made:
    model = build()
    optimizer = adam(model)
    return model, optimizer, make(model, optimizer) if make else None


def designed() -> Made:
    model, _ = lowrank.factorize_by_design(linear_net(), 0.25, align=1)
    return model, adam(model), None


def with_smmf() -> Made:
    model = linear_net()
    return model, SMMF(model.parameters(), lr=1e-3), None


LINEAR: dict[str, Callable[[], Made]] = {
    "dense": lambda: with_(linear_net),
    "dense, SMMF": with_smmf,
    "by design, ratio 0.25": designed,
    "DLRT, from rank 256": lambda: with_(
        linear_net, lambda m, o: DLRT(m, o, tolerance=0.2, every=10, rank=256)
    ),
    "DLRT, from rank 128": lambda: with_(
        linear_net, lambda m, o: DLRT(m, o, tolerance=0.2, every=10, rank=128)
    ),
    "Maestro": lambda: with_(linear_net, lambda m, o: Maestro(m, o, lasso=1e-3, threshold=0.2)),
    "LoQT, rank 128": lambda: with_(linear_net, lambda m, o: LoQT(m, o, rank=128, gap=20)),
}
CONV: dict[str, Callable[[], Made]] = {
    "dense": lambda: with_(conv_net),
    "TuckerDLRT, from rank 32": lambda: with_(
        conv_net, lambda m, o: TuckerDLRT(m, o, tolerance=0.2, every=10, rank=32)
    ),
}


class Run:
    """One model in training, its bytes and its times."""

    def __init__(self, name: str, made: Made) -> None:
        self.name = name
        self.model, self.optimizer, self.controller = made
        self.bytes: list[int] = []  # the most within each step
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.settled: int | None = None  # the step of the first event that makes things smaller

    def count(self) -> int:
        held: list[Any] = [*self.model.parameters(), *self.model.buffers()]
        held += [p.grad for p in self.model.parameters()]
        held += [getattr(module, "gathered", None) for module in self.model.modules()]
        held += [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))

    def step(self, x: Tensor, y: Tensor) -> None:
        begun, most = time.perf_counter(), 0.0
        self.optimizer.zero_grad()
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        spent = time.perf_counter() - begun
        for act in self._acts():
            most = max(most, self.count())
            begun = time.perf_counter()
            act()
            spent += time.perf_counter() - begun
        self.bytes.append(int(max(most, self.count())))
        self.seconds.append(spent)
        self.losses.append(loss.item())
        if self.controller and self.settled is None:
            seen = any(event["event"] in EVENTS for event in self.controller.history)
            self.settled = len(self.bytes) if seen else None

    def _acts(self) -> list[Callable[[], Any]]:
        if self.controller is None:
            return [self.optimizer.step]
        return [self.controller.before_step, self.optimizer.step, self.controller.after_step]

    def end_epoch(self) -> None:
        if isinstance(self.controller, Maestro):
            self.controller.end_epoch()

    def ranks(self) -> list[Any]:
        return [] if self.controller is None else list(self.controller.ranks.values())


def planted(shape: tuple[int, ...], seed: int) -> Callable[[Tensor], Tensor]:
    """A map of rank RANK along the second dimension of x."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[1]
    a, b = (torch.randn(RANK, width, generator=generator) / width**0.5 for _ in range(2))
    return lambda x: torch.tanh(torch.einsum("nc...,rc,rd->nd...", x, a, b) * width**0.5 / 4)


def batches(shape: tuple[int, ...], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    target, generator = planted(shape, 1), torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(*shape, generator=generator)
        yield x, target(x)


def compare(
    what: str, makers: dict[str, Callable[[], Made]], shape: tuple[int, ...], steps: int, epoch: int
) -> list[dict[str, Any]]:
    runs = [Run(name, make()) for name, make in makers.items()]
    for step, (x, y) in enumerate(batches(shape, steps), 1):
        for run in runs:
            run.step(x, y)
            if step % epoch == 0:
                run.end_epoch()
    print(f"\n{what}, batch {shape[0]}, {steps} steps; bytes in millions")
    heads = (
        "first step", "peak", "settled", "to dense", "ms", "time to dense", "first ms",
        "first loss", "loss",
    )  # fmt: skip
    print(f"{'':26}" + "".join(f"{head:>14}" for head in heads) + "  ranks")
    found = []
    for run in runs:
        one = row(run, runs[0])
        found.append({"net": what, **one})
        cells = [one["first_step_bytes"] / 1e6, one["peak_bytes"] / 1e6, one["settled_bytes"] / 1e6]
        cells += [one["settled_to_dense"], one["step_ms"], one["time_to_dense"]]
        cells += [one["first_step_ms"], one["first_loss"], one["loss"]]
        print(f"{run.name:26}" + "".join(f"{c:14.3f}" for c in cells) + f"  {run.ranks() or ''}")
    return found


def row(run: Run, dense: Run) -> dict[str, Any]:
    late = run.bytes[run.settled or 1 :]
    pairs = zip(run.seconds[1:], dense.seconds[1:], strict=True)
    return {
        "method": run.name,
        "first_step_bytes": run.bytes[0],
        "peak_bytes": max(run.bytes),
        "settled_bytes": max(late),
        "last_bytes": run.bytes[-1],
        "settled_to_dense": max(late) / max(dense.bytes),
        "step_ms": 1000 * statistics.median(run.seconds[1:]),
        "time_to_dense": statistics.median(a / b for a, b in pairs),
        "mean_time_to_dense": sum(run.seconds[1:]) / sum(dense.seconds[1:]),
        "first_step_ms": 1000 * run.seconds[0],
        "first_loss": run.losses[0],
        "loss": statistics.fmean(run.losses[-10:]),
        "ranks": run.ranks(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epoch", type=int, default=20, help="steps; Maestro shrinks after each")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    found = compare(
        f"four linear layers of {WIDTH}", LINEAR, (options.batch, WIDTH), options.steps,
        options.epoch,
    )  # fmt: skip
    found += compare(
        f"two convolutions of {CHANNELS} channels", CONV, (8, CHANNELS, 16, 16), options.steps,
        options.epoch,
    )  # fmt: skip
    keep("train", found, 0, settings=vars(options))


if __name__ == "__main__":
    main()
