"""The work of each stage of a compression, counted beforehand from shapes.

Products count 2mnk FLOPs, a Cholesky factor n³/3, a QR factorisation of (m, n) with its Q
4n²(m − n/3), an eigenproblem 4n³/3 without and 9n³ with vectors (Golub and Van Loan, Matrix
Computations). Products of factored layers count as dense ones, so that it is rather too much.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from ..calibration.fisher import FISHER
from ..linalg.gram import PART
from ..measure.rates import Rates
from ..recover.streams import MOST
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


def _squared(side: int) -> float:
    """FLOPs a token of a Gram matrix: of wide rows, the blocks on and above the diagonal."""
    parts = max(side // PART, 1)
    return side * side * (1 + 1 / parts)


def _calibration(job: Job) -> Work:
    """One pass, after one batch to observe; a Gram matrix of every distinct input."""
    grams = sum(job.rows * read.tokens * _squared(read.inputs) for read in job.groups)
    return _forward(job, job.rows + min(job.batch, job.rows)) + Work(single=grams)


def _gradients(job: Job) -> Work:
    """Forwards and backwards to the inputs; Gram matrices of the gradients, rows of the Fisher."""

    def moments(layer: Layer) -> float:
        gram = _squared(layer.outputs) if "out_gram" in job.needs else 0
        rows = 2 * layer.outputs * layer.inputs if "row_fisher" in job.needs else 0
        return job.rows * layer.tokens * (gram + rows)

    passes = 2 * job.outline.flops
    if job.by_block:  # recorded and stored, and run again
        passes += _blocks(job)
    return Work(product=job.rows * passes, single=sum(map(moments, job.layers)))


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


def _refit(job: Job) -> Work:
    """The dense stream and the student's, block by block: up to every distinct input, and once
    through for the outputs; moments at every input; for every layer a Cholesky factor and new
    factors."""
    if job.recovery is None or not job.recovery.refit:
        return Work()
    trained = job.held if job.recovery.block_steps else 0
    passes = 0.0
    for name, flops in job.outline.blocks.items():
        ends = [_until(job, read) for read in job.groups if read.block == name]
        again = _unkept(job, name)
        runs = sum(ends[:-1]) * again + job.rows * flops
        student_runs = sum(ends) * again + job.rows * flops
        passes += runs + student_runs + 2 * trained * flops
    outside = sum(not read.block for read in job.groups) * job.outline.flops
    passes += 2 * job.rows * outside
    moments = sum(
        job.rows * read.tokens * (2 * read.inputs**2 + _squared(read.inputs)) for read in job.groups
    )
    solved = _over(
        _factor(job, layer) + Work(double=layer.inputs**3 / 3 + 4 * layer.outputs * layer.inputs**2)
        for layer in job.layers
    )
    return Work(product=passes, single=moments) + solved


def _unkept(job: Job, block: str) -> float:
    """The products of a block that every further run of it computes again: those outside of its
    layers, and of the layers whose outputs are too much to be kept."""
    mine = [layer for layer in job.layers if layer.block == block]
    layers = sum(2 * layer.tokens * layer.outputs * layer.inputs for layer in mine)
    outputs = job.rows * job.itemsize * sum(layer.tokens * layer.outputs for layer in mine)
    kept = min(MOST / 2 / max(outputs, 1), 1.0)
    return job.rows * (job.outline.blocks[block] - kept * layers)


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
    """Every candidate is made and judged. Those near the best are refitted on a few rows, too:
    which ones is known only then, so that this is not counted."""
    if not candidates:
        return Work()
    judging = _forward(job, (1 + candidates) * job.held)  # the dense model's predictions too
    return judging + _over(_factor(job, layer) for layer in job.layers)
