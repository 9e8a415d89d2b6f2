"""The work of each stage of a compression, counted beforehand from shapes.

Products count 2mnk FLOPs, a Cholesky factor n³/3, a QR factorisation of (m, n) with its Q
4n²(m − n/3), an eigenproblem 4n³/3 without and 9n³ with vectors (Golub and Van Loan, Matrix
Computations). Products of factored layers count as dense ones, and every candidate as decomposed
anew, so that the count is rather too high.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from ..calibration.fisher import FISHER
from ..measure.rates import Rates
from .allocating import probed_rows
from .jobs import Job, Layer

CHECKS = 7  # passes over the held-out rows while a block trains


@dataclass(frozen=True)
class Work:
    """FLOPs of products in the model's dtype, in float32 and in float64, and n³ of eigenproblems
    without and with vectors."""

    product: float = 0.0
    single: float = 0.0
    double: float = 0.0
    values: float = 0.0
    vectors: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def often(self, times: float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(Work)))

    @property
    def flops(self) -> float:
        eigen = 4 / 3 * self.values + 9 * self.vectors
        return self.product + self.single + self.double + eigen

    def seconds(self, rates: Rates) -> float:
        return sum(getattr(self, f.name) / getattr(rates, f.name) for f in fields(Work))


def stage_works(job: Job) -> dict[str, Work | None]:
    """The work of every stage, in order, under the names that reports use; None if unknown."""
    stages: dict[str, Work | None] = {}
    if job.files:
        stages["loading"] = None
    if job.rows:
        stages["calibration"] = _calibration(job)
    if job.needs & FISHER:
        stages["gradients"] = _gradients(job)
    stages["decompositions"] = _over(_curve(job, layer) for layer in job.layers)
    stages["choosing ranks"] = None
    if job.candidates is not None:
        stages["choosing ranks"] = _choosing(job, job.candidates)
    factors = _over(_factor(job, layer) + _error(job, layer) for layer in job.layers)
    stages["factoring"] = factors
    if job.recovery is not None:
        stages["refit by block"] = _refit(job) + _training(job, job.recovery.block_steps)
        if job.batchnorms and job.recovery.batchnorm:
            stages["batch norms"] = None
        if job.recovery.distill_steps:
            stages["distillation"] = None
        seen = bool(job.candidates)  # then the dense model's predictions are known
        stages["judging"] = _forward(job, job.held).often(2 if seen else 3)
        stages["measuring errors"] = _over(_error(job, layer) for layer in job.layers)
    if job.files:
        stages["writing"] = None
    if not job.closed:
        for name in ("decompositions", "choosing ranks", "factoring", "refit by block"):
            if name in stages:
                stages[name] = None
    return stages


def _over(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def _forward(job: Job, rows: int) -> Work:
    return Work(product=rows * job.outline.flops)


def _blocks(job: Job) -> int:
    return sum(job.outline.blocks.values())


def _calibration(job: Job) -> Work:
    """One pass, after one batch to observe; a Gram matrix of every distinct input."""
    grams = sum(2 * job.rows * read.tokens * read.inputs**2 for read in job.groups)
    return _forward(job, job.rows + min(job.batch, job.rows)) + Work(single=grams)


def _gradients(job: Job) -> Work:
    """Forwards and backwards to the inputs; Gram matrices of the gradients, rows of the Fisher."""
    moments = sum(
        2 * job.rows * layer.tokens * layer.outputs * (layer.outputs + layer.inputs)
        for layer in job.layers
    )
    passes = 2 * job.outline.flops
    if job.by_block:  # recorded, run to be stored, and run again
        passes += 2 * _blocks(job)
    return Work(product=job.rows * passes, single=moments)


def _reduced(job: Job, layer: Layer) -> float:
    """FLOPs to reduce a layer to the eigenproblem of its smaller side."""
    outputs, inputs, side = layer.outputs, layer.inputs, layer.side
    flops = 2.0 * side * side * inputs
    if job.weighted:
        flops += outputs**3 / 3 + 2 * outputs * outputs * inputs
    if "gram" in job.needs:
        flops += 2 * side * inputs * inputs
        if outputs > inputs:
            flops += 4 * inputs * inputs * (outputs - inputs / 3)
    return flops


def _curve(job: Job, layer: Layer) -> Work:
    return Work(double=_reduced(job, layer), values=layer.side**3)


def _factor(job: Job, layer: Layer) -> Work:
    """The eigenvectors, the factors, and twice the elimination that finds pivots."""
    thin = 2 * layer.rank * layer.outputs * (layer.inputs + layer.side + 4 * layer.rank)
    return Work(double=_reduced(job, layer) + thin, vectors=layer.side**3)


def _error(job: Job, layer: Layer) -> Work:
    """Error of the stored factors in the metrics of inputs and outputs."""
    outputs, inputs = layer.outputs, layer.inputs
    flops = 2.0 * outputs * inputs * layer.rank
    if "gram" in job.needs:
        flops += 2 * outputs * inputs**2
    if job.weighted:
        flops += outputs**3 / 3 + 2 * outputs**2 * inputs
    return Work(double=flops)


def _refit(job: Job, students: int = 1) -> Work:
    """The dense stream and those of the students, block by block: up to every distinct input, and
    once through for the outputs; moments at every input; for every layer a Cholesky factor and new
    factors."""
    if job.recovery is None or not job.recovery.refit:
        return Work()
    rows, first = job.rows, min(job.batch, job.rows)
    passes = 0.0
    for name, flops in job.outline.blocks.items():
        ends = [_until(job, read) * flops for read in job.groups if read.block == name]
        # The first batch of each reading goes on to the end, and the last dense one always does.
        shown = first * (len(ends) * flops - sum(ends))
        dense = rows * sum(ends[:-1]) + (rows + job.held) * flops + shown
        passes += dense + students * (rows * sum(ends) + (rows + job.held) * flops + shown)
    outside = sum(not read.block for read in job.groups) * job.outline.flops
    passes += (1 + students) * rows * outside
    moments = sum(4 * rows * read.tokens * read.inputs**2 for read in job.groups)
    solved = _over(
        _factor(job, layer) + Work(double=layer.inputs**3 / 3 + 4 * layer.outputs * layer.inputs**2)
        for layer in job.layers
    )
    return Work(product=passes) + (Work(single=moments) + solved).often(students)


def _until(job: Job, read: Layer) -> float:
    """The share of its block's products that is done before a layer."""
    mine = [layer for layer in job.layers if layer.block == read.block]
    sizes = [layer.tokens * layer.outputs * layer.inputs for layer in mine]
    return sum(sizes[: mine.index(read)]) / max(sum(sizes), 1)


def _training(job: Job, steps: int) -> Work:
    """Steps of block refit: forwards and backwards of one batch, and checks on held-out rows."""
    if not steps:
        return Work()
    rows = 3 * steps * min(job.batch, job.rows) + CHECKS * job.held
    return Work(product=rows * _blocks(job))


def _choosing(job: Job, candidates: int) -> Work:
    """Candidates are refitted together on few rows, or else made; then each is judged."""
    if not candidates:
        return Work()
    judging = _forward(job, (1 + candidates) * job.held)  # the dense model's predictions too
    if job.recovery is None or not job.recovery.refit:
        return judging + _over(_factor(job, layer) for layer in job.layers).often(candidates)
    batches = math.ceil(probed_rows(max(layer.tokens for layer in job.layers)) / job.batch)
    few = replace(job, rows=min(job.rows, batches * job.batch))
    return judging + _refit(few, candidates)
