"""Recovery after the choice of ranks: sequential refit, block refit, batch norms, distillation.

It runs on a twin of the model. The model itself stays dense and unchanged until everything has
succeeded, and serves as teacher meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..calibration.processes import mine, world
from ..methods.resolved import PLAIN, Resolved
from ..plans.entry import Entry
from ..plans.progress import Steps
from ..plans.stages import stage
from ..types import Site
from .job import Job, Open, Recovered
from .recovery import Recovery
from .sequential import SequentialPass
from .workbench import Workbench

ROOT = "the model is a single layer: there is nothing to refit"
Work = Sequence[tuple[Site, Entry, nn.Module]]


def recover_layers(
    bench: Workbench,
    work: Work,
    recovery: Recovery,
    resolved: Resolved,
    *,
    seed: int = 0,
    spent: float = 0.0,
    left: int = 0,
    progress: bool = True,
) -> Recovered:
    """Refit and train the new layers in a twin of the bench's model, which is not changed.

    Args:
        work: sites, their entries, and the layers factored from the dense model's statistics.
        resolved: the method, which refits layers.
        spent: seconds that the call has taken up to now.
        left: numbers of the targets that stay dense.
    """
    if any(site.name == "" for site, _, _ in work):
        return Recovered({s.name: m for s, _, m in work}, notes=(ROOT,))
    job = Job(bench, recovery, resolved, work, None, seed, spent, left, journal=bench.journal)
    if recovery.nested is not None:
        job.nesting(job.plain())  # what cannot be cut is an error now, and not after the refit
    with stage("refit by block"):
        _refit([job], progress)
    return job.finish()


def refitted_twins(
    bench: Workbench,
    works: Sequence[Open],
    recovery: Recovery,
    resolved: Resolved,
    *,
    most: int | None = None,
) -> list[nn.Module]:
    """Twins of the bench's model, one for each candidate, after closed-form recovery: the layers
    are refitted in one pass, which runs the dense model once, and batch norms re-estimated.

    Args:
        works: of each candidate: sites, their entries, and the factored layers, or None for layers
            that the refit makes (`refit_makes`).
    """
    closed_form = replace(recovery, block_steps=0, distill_steps=0, minutes=None, augment=False)
    jobs = [Job(bench, closed_form, resolved, work, most, 0) for work in works]
    _refit(jobs, progress=False)
    for job in jobs:
        job.batchnorm()
    return [job.student for job in jobs]


def refit_makes(recovery: Recovery, site: Site, entry: Entry) -> bool:
    """Whether refit in closed form makes the layer anew, so that no other need be made before."""
    plain = site.kind == "linear" and len(site.modules) == 1 and entry.storage in PLAIN
    return recovery.refit and plain and site.name != ""


def _refit(jobs: Sequence[Job], progress: bool) -> None:
    """Refit the layers of all jobs in one pass; the jobs share the bench and the batches."""
    first = jobs[0]
    blocks = {name for chain in first.bench.calibration.observation.chains for name in chain}
    students = [job.prepared(blocks) for job in jobs]
    numbers, fitted = first.numbers, first.fitted
    # Gradient steps need the hidden states of all rows, on every process.
    trains = any(job.recovery.block_steps for job in jobs)
    shared = world() > 1 and not trains
    if not trains:
        numbers = mine(numbers[:fitted]) if shared else numbers[:fitted]
        fitted = len(numbers)
    with Steps(len(blocks), "block", progress) as bar:
        sequential = SequentialPass(
            first.bench,
            students,
            numbers,
            fitted,
            on_block=lambda name: bar.update(bool(name)),
            shared=shared,
        )
        sequential.run()
    for job in jobs:
        job.note(sequential.notes())
        if job.recovery.refit or job.recovery.block_steps:
            job.course.passed("refit by block", job.budget.since_start())
