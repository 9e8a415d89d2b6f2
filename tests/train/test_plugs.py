"""One controller, many loops: the same ranks, the same losses."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from lowrank import LowrankError
from lowrank.train import (
    DLRT,
    DSL,
    GBLR,
    NM,
    STF,
    CondLR,
    LoQT,
    LowRankCallback,
    Maestro,
    TuckerDLRT,
)
from tests.train.loops import data, net_for, run

STEPS, SIZE = 24, 8
Build = Callable[[Any, Any], Any]
CONTROLLERS: dict[str, Build] = {
    "DLRT": lambda m, o: DLRT(m, o, tolerance=0.3, every=4),
    "CondLR": lambda m, o: CondLR(m, o, tau=2.0, every=4),
    "Maestro": lambda m, o: Maestro(m, o, lasso=1e-2, threshold=0.1),
    "LoQT": lambda m, o: LoQT(m, o, rank=3, gap=6),
    "STF": lambda m, o: STF(m, o, ratio=0.7, freeze=18),
    "NM": lambda m, o: NM(m, o, decay=12, dense=4),
    "DSL": lambda m, o: DSL(m, o, ratio=0.6, steps=20, every=4),
    "GBLR": lambda m, o: GBLR(m, o, ratio=0.5, steps=16, start=0.9, rate=0.02),
    "TuckerDLRT": lambda m, o: TuckerDLRT(m, o, ratio=0.6, min_rank=1, every=4),
}
EVERY = pytest.mark.parametrize("name", CONTROLLERS)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, y = data()
        return {"x": x[index], "labels": y[index]}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def plain(name: str) -> tuple[list[float], Any]:
    """Three epochs of eight batches."""
    model = net_for(name)
    optimizer = sgd(model)
    controller = CONTROLLERS[name](model, optimizer)

    def each(step: int) -> None:
        if step % 8 == 7:
            controller.end_epoch()

    return run(model, optimizer, controller, STEPS, each=each), controller


class Losses:
    def __init__(self, model: nn.Module) -> None:
        self.seen: list[float] = []
        model.register_forward_hook(self.look)

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, dict):
            self.seen.append(output["loss"].item())


def trainer(model: nn.Module, folder: Path, callback: Any, optimizer: Any, **options: Any) -> Any:
    import transformers

    class InOrder(transformers.Trainer):  # the plain loop's batches
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

    settings: dict[str, Any] = {
        "per_device_train_batch_size": SIZE, "num_train_epochs": 3, "max_grad_norm": 0,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    made = InOrder(
        model, arguments, train_dataset=Rows(), callbacks=[callback], optimizers=(optimizer, None)
    )
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    return made


@EVERY
@pytest.mark.parametrize("late", [False, True])
def test_trainer_trains_the_same_model(name: str, late: bool, tmp_path: Path) -> None:
    model = net_for(name)
    optimizer = sgd(model)
    build = CONTROLLERS[name]
    callback = LowRankCallback(build if late else build(model, optimizer))
    losses = Losses(model)
    trainer(model, tmp_path, callback, optimizer).train()
    want, controller = plain(name)
    assert losses.seen == pytest.approx(want, abs=1e-6)
    assert callback.controller.ranks == controller.ranks
    finished = callback.controller.finish()
    assert finished is model


@EVERY
def test_trainer_resumes_at_a_checkpoint(name: str, tmp_path: Path) -> None:
    build = CONTROLLERS[name]
    want, _ = plain(name)
    model = net_for(name)
    optimizer = sgd(model)
    callback = LowRankCallback(build(model, optimizer))
    saving = {"save_strategy": "steps", "save_steps": 10}
    trainer(model, tmp_path, callback, optimizer, **saving).train()
    model = net_for(name, seed=3)
    optimizer = sgd(model)
    callback = LowRankCallback(build(model, optimizer))
    callback.resume(tmp_path / "checkpoint-10")
    losses = Losses(model)
    again = trainer(model, tmp_path, callback, optimizer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert losses.seen == pytest.approx(want[10:], abs=1e-6)


def test_a_controller_that_is_still_to_be_built_is_asked_for_too_early() -> None:
    callback = LowRankCallback(CONTROLLERS["DLRT"])
    with pytest.raises(LowrankError, match=r"built when training begins: call trainer\.train"):
        _ = callback.controller


@EVERY
@pytest.mark.parametrize("parts", [1, 2])
def test_accelerate_trains_the_same_model(name: str, parts: int) -> None:
    """Also with every batch in two halves: the controller acts when gradients are synchronised."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    raw = net_for(name)
    model, optimizer = accelerator.prepare(raw, sgd(raw))
    controller = CONTROLLERS[name](model, optimizer)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    x, y = data()
    losses, step = [], 0
    for _ in range(3):
        for at in range(0, 64, SIZE):
            whole = 0.0
            for start in range(at, at + SIZE, SIZE // parts):
                rows = slice(start, start + SIZE // parts)
                with accelerator.accumulate(model):
                    loss = model(x[rows], y[rows])["loss"]
                    accelerator.backward(loss)
                    controller.before_step()
                    optimizer.step()
                    controller.after_step()
                    schedule.step()
                    optimizer.zero_grad()
                whole += loss.item() / parts
            losses.append(whole)
            step += 1
        controller.end_epoch()
    want, same = plain(name)
    assert losses == pytest.approx(want, abs=1e-6)
    assert controller.ranks == same.ranks
    assert controller.history[-1]["step"] == same.history[-1]["step"]


@EVERY
def test_autocast_leaves_the_factors_in_fp32(name: str) -> None:
    model = net_for(name)
    optimizer = sgd(model)
    controller = CONTROLLERS[name](model, optimizer)
    x, y = data()
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x, y)["loss"]
            optimizer.zero_grad()
            loss.backward()
            controller.before_step()  # inside on purpose
            optimizer.step()
            controller.after_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    worst = max(line.get("orthonormality", 0) for line in controller.history)
    assert worst < 1e-6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Scaled:
    """As accelerate's optimizer under fp16: steps with infinite gradients are skipped."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.scaler, self.step_was_skipped = optimizer, object(), False

    def step(self) -> None:
        held = [p.grad for g in self.optimizer.param_groups for p in g["params"]]
        finite = all(bool(g.isfinite().all()) for g in held if g is not None)
        self.step_was_skipped = not finite
        if finite:
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


@EVERY
def test_a_skipped_step_is_no_step(name: str) -> None:
    losses = []
    for bad in (None, 0, 3):
        model = net_for(name)
        optimizer = Scaled(sgd(model))
        controller = CONTROLLERS[name](model, optimizer)
        got = []
        for step in range(6):
            got += run(model, optimizer, controller, step + 1, start=step)
            if step == bad:  # the next batch overflows: as if it had not been there
                optimizer.zero_grad()
                (model(*data())["loss"] * float("inf")).backward()
                controller.before_step()
                optimizer.step()
                controller.after_step()
        losses.append(got)
        assert controller.attachment.step == 6
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("name", ["DLRT", "CondLR", "TuckerDLRT"])
def test_ranks_change_under_compile_only_at_events(name: str) -> None:
    """A graph is compiled anew in the step after a change of rank, and in no other one."""
    build: dict[str, Build] = {
        "DLRT": lambda m, o: DLRT(m, o, tolerance=0.3, every=6),
        "CondLR": lambda m, o: CondLR(m, o, tau=2.0, tolerance=0.4, every=6),
        "TuckerDLRT": lambda m, o: TuckerDLRT(m, o, ratio=0.6, min_rank=1, every=6),
    }
    counted = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    model = net_for(name)
    optimizer = sgd(model)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    controller = build[name](compiled, optimizer)
    seen: list[tuple[int, list[int]]] = []
    losses = run(
        compiled, optimizer, controller, 24,
        each=lambda _: seen.append((len(counted), list(controller.ranks.values()))),
    )  # fmt: skip
    torch._dynamo.reset()
    model = net_for(name)
    optimizer = sgd(model)
    assert losses == pytest.approx(run(model, optimizer, build[name](model, optimizer), 24), 1e-5)
    # What a step changes after its forward pass is compiled in the next one.
    compiled_at = {i for i in range(1, 24) if seen[i][0] != seen[i - 1][0]}
    changed = {i + 1 for i in range(1, 24) if seen[i][1] != seen[i - 1][1]} | {1}
    grown = {n["step"] + 1 for n in controller.history if n["event"] == "augment"}
    cut = {n["step"] for n in controller.history if n["event"] in ("truncate", "bound")}
    assert changed - {1} <= grown | cut <= {0, 1, 6, 7, 12, 13, 18, 19, 24}
    assert compiled_at <= grown | cut
    assert compiled_at - {1}  # sizes that were there before are not compiled again


# Both end by os._exit: all is said by then, and torch's own threads now and then abort a process
# while the interpreter shuts down ("terminate called without an active exception").
TWO = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from lowrank.train import DLRT, DSL, GBLR, NM, STF, CondLR, LoQT, Maestro, TuckerDLRT
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import data, net_for

def main(name):
    rank = dist.get_rank()
    model = DistributedDataParallel(net_for(name, seed=rank))  # DDP takes rank 0's numbers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    build = {"DLRT": lambda: DLRT(model, optimizer, tolerance=0.3, every=4),
             "CondLR": lambda: CondLR(model, optimizer, tau=2.0, tolerance=0.1, every=4),
             "Maestro": lambda: Maestro(model, optimizer, lasso=1e-2, threshold=0.1),
             "LoQT": lambda: LoQT(model, optimizer, rank=3, gap=6),
             "STF": lambda: STF(model, optimizer, ratio=0.7, freeze=18),
             "NM": lambda: NM(model, optimizer, decay=12, dense=4),
             "DSL": lambda: DSL(model, optimizer, ratio=0.6, steps=20, every=4),
             "GBLR": lambda: GBLR(model, optimizer, ratio=0.5, steps=16, start=0.9, rate=0.02),
             "TuckerDLRT": lambda: TuckerDLRT(model, optimizer, ratio=0.6, min_rank=1, every=4)}
    controller = build[name]()
    x, y = data()
    losses, ranks = [], []
    for step in range(24):
        at = step * 8 % 64 + 4 * rank  # half a batch each
        optimizer.zero_grad()
        loss = model(x[at : at + 4], y[at : at + 4])["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        controller.before_step()
        optimizer.step()
        controller.after_step()
        check_same_parameters(optimizer, model.module)
        whole = loss.detach() / 2
        dist.all_reduce(whole)
        losses.append(whole.item())
        if step % 8 == 7:
            controller.end_epoch()
        ranks.append(list(controller.ranks.values()))
    finished = controller.finish()
    numbers = torch.cat([p.detach().flatten() for p in finished.parameters()])
    both = [torch.zeros_like(numbers) for _ in range(2)]
    dist.all_gather(both, numbers)
    assert torch.equal(*both), "the processes ended with different weights"
    out = model(x, y)["loss"]
    out.backward()  # the finished model trains on in DDP
    if rank == 0:
        print(name, losses, ranks[-1], sep=";", flush=True)

dist.init_process_group("gloo")
for name in sys.argv[1:]:
    main(name)
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


TRAINER = """
import os, sys, tempfile, torch
from pathlib import Path
import torch.distributed as dist
from lowrank.train import LowRankCallback
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import net_for
from tests.train.test_plugs import CONTROLLERS, sgd, trainer

for name in sys.argv[1:]:
    torch.manual_seed(0)
    model = net_for(name)
    optimizer = sgd(model)
    callback = LowRankCallback(CONTROLLERS[name])
    with tempfile.TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
        trainer(model, Path(folder), callback, optimizer, **options).train()
    check_same_parameters(optimizer, model)
    ranks = list(callback.controller.ranks.values())
    finished = callback.controller.finish()
    numbers = torch.cat([p.detach().flatten() for p in finished.parameters()])
    both = [torch.zeros_like(numbers) for _ in range(2)]
    dist.all_gather(both, numbers)
    assert torch.equal(*both), f"{name}: the processes ended with different weights"
    if dist.get_rank() == 0:
        print(name, ranks, sep=";", flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)
"""


def two(source: str, names: Iterable[str], port: int, folder: Path) -> dict[str, list[Any]]:
    """Run a script for all names in two processes on gloo; what rank 0 printed of each."""
    script = folder / "two.py"
    script.write_text(source)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *names],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][1] + said[1][1]
    lines = [line.split(";") for line in said[0][0].splitlines() if ";" in line]
    return {name: [ast.literal_eval(part) for part in parts] for name, *parts in lines}


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    """DDP on gloo: identical weights and ranks, and what one process with whole batches does."""
    results = two(TWO, CONTROLLERS, 29511, tmp_path)
    assert results.keys() == CONTROLLERS.keys()
    for name, (losses, ranks) in results.items():
        model = net_for(name)
        optimizer = sgd(model)
        if name == "CondLR":
            controller: Any = CondLR(model, optimizer, tau=2.0, tolerance=0.1, every=4)
        else:
            controller = CONTROLLERS[name](model, optimizer)

        def each(step: int, controller: Any = controller) -> None:
            if step % 8 == 7:
                controller.end_epoch()

        want = run(model, optimizer, controller, STEPS, each=each)
        assert losses == pytest.approx(want, abs=1e-5), name
        assert ranks == list(controller.ranks.values()), name


@pytest.mark.slow
def test_trainer_on_two_processes(tmp_path: Path) -> None:
    """The controller is built when training begins, on the DDP module that the Trainer made."""
    names = ["DLRT", "CondLR", "TuckerDLRT"]
    results = two(TRAINER, names, 29513, tmp_path)
    assert list(results) == names
    for name, (ranks,) in results.items():
        _, controller = plain(name)
        assert ranks == list(controller.ranks.values()), name
