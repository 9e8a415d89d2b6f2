"""Memory and disk of a compression, counted beforehand from shapes.

What counts is memory that lies in no file: weights are mapped from theirs, and from folder to
folder statistics, stored inputs, factors and candidates are in files too (linalg/mapped.py). What
is left is the work space of one layer or one block, and the hidden states between blocks.
benchmarks/stream.py measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..calibration.by_block import LOSS
from ..calibration.fisher import FISHER
from ..calibration.gradients import ENTRIES, WEIGHTS
from ..linalg.gram import PART
from ..recover.streams import MOST
from ..recover.workbench import KEPT_BYTES
from .jobs import Job, Layer

DOUBLE = 8  # bytes of a float64
SINGLE = 4
FACTORS = 3  # times the factors are held: a candidate's or the refitted ones, pivoted ones, built
TRAINED = 20  # bytes a number in training: float32 copy, gradient, two moments, best state
# Of the largest work space before, what the allocator keeps for smaller pieces; measured.
RETAINED = 0.3
RETAINED_MOST = 1 << 29


def peak_bytes(job: Job, base: int) -> tuple[int, int]:
    """Most memory that lies in no file, from folder to folder and with everything in memory.

    Args:
        base: bytes of the process before: libraries, and what else it holds.
    """
    held = earlier = from_files = in_memory = 0
    for stage in _stages(job):
        work = stage.work + min(round(RETAINED * earlier), RETAINED_MOST)
        held += stage.added
        from_files, in_memory = max(from_files, work), max(in_memory, work + held)
        earlier = max(earlier, 0 if stage.large else stage.work)
    return base + from_files, base + in_memory


def scratch_bytes(job: Job) -> int:
    """What lies in files from folder to folder, or else in memory."""
    return sum(stage.added for stage in _stages(job))


class _Stage(NamedTuple):
    """Bytes of a stage's work space, and of what it adds that later stages read; whether its
    pieces are too large for the allocator to keep."""

    work: int
    added: int
    large: bool = False


def _stages(job: Job) -> Iterator[_Stage]:
    numbers = [layer.rank * (layer.outputs + layer.inputs) for layer in job.layers]
    factors = job.itemsize * sum(numbers)
    if job.rows:
        yield _Stage(_calibration(job), DOUBLE * sum(read.inputs**2 for read in job.groups))
    if job.needs & FISHER:
        stored = job.outline.hidden * job.itemsize * job.rows * len(job.outline.blocks)
        stored += 2 * _states(job)
        yield _Stage(_head(job), stored if job.by_block else 0, large=True)
        yield _Stage(_backwards(job), DOUBLE * sum(layer.outputs**2 for layer in job.layers))
    yield _Stage(_most(_decomposition(job, layer) for layer in job.layers), factors)
    if job.recovery is not None:
        trained = sum(numbers) // _block_count(job) if job.recovery.block_steps else 0
        training = (_graph(job) if trained else 0) + TRAINED * trained
        work = max(_refit(job), training, _comparison(job)) + _predictions(job)
        added = (FACTORS - 1) * factors + _remembered(job) + _moments(job) + 4 * _states(job)
        yield _Stage(work, added)
        if job.recovery.distill_steps:
            yield _Stage(distillation_bytes(job), 0)


def distillation_bytes(job: Job) -> int:
    """Training of all factors at once: their optimizer's state, and the activations of a batch."""
    trained = sum(layer.rank * (layer.outputs + layer.inputs) for layer in job.layers)
    return TRAINED * trained + _activated(job) + 3 * SINGLE * _rows(job) * job.outline.predictions


def _remembered(job: Job) -> int:
    """Outputs of finished layers in one block, of the dense stream and a student's."""
    blocks = {layer.block for layer in job.layers}
    outputs = _most(
        sum(layer.tokens * layer.outputs for layer in job.layers if layer.block == block)
        for block in blocks
    )
    return min(2 * job.rows * job.itemsize * outputs, MOST) if job.outline.blocks else 0


def _most(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)


def _rows(job: Job) -> int:
    return min(job.batch, job.rows)


def _logits(job: Job) -> int:
    """Numbers in the predictions that are computed at once."""
    return job.outline.predictions * min(job.few, max(job.rows, 1))


def _activations(job: Job) -> int:
    """Bytes of what one block hands on inside: the widest tensor, three times."""
    widest = _most(layer.tokens * max(layer.outputs, layer.inputs) for layer in job.layers)
    return 3 * _rows(job) * widest * job.itemsize


def _calibration(job: Job) -> int:
    """Logits, or rows in float32 with what is multiplied of them at once."""
    tokens = _most(read.tokens for read in job.groups) * _rows(job)
    widest = _most(read.inputs for read in job.groups)
    gram = SINGLE * PART * widest + SINGLE * tokens * widest
    return max(_logits(job) * job.itemsize, gram) + _activations(job)


def _head(job: Job) -> int:
    """Sampling from the predictions, their loss and its gradients, in float32."""
    rows = LOSS // max(SINGLE * job.outline.predictions, 1)
    entries = job.outline.predictions * max(min(rows, _rows(job)), 1)
    loss = (3 * SINGLE + 2 * job.itemsize) * entries
    return max(loss, 3 * DOUBLE * min(entries, ENTRIES)) + _batch(job, 3)


def _backwards(job: Job) -> int:
    """The graph, and the moments of one layer's gradients."""
    rows = _rows(job)

    def moments(layer: Layer) -> int:
        whole = layer.outputs * layer.inputs
        together = min(max(WEIGHTS, whole), rows * whole)
        gram = SINGLE * PART * layer.outputs + SINGLE * rows * layer.tokens * layer.outputs
        return max(gram, (SINGLE + DOUBLE) * together if "row_fisher" in job.needs else 0)

    return _graph(job) + _most(map(moments, job.layers)) + _batch(job, 4)


def _block_count(job: Job) -> int:
    return max(len(job.outline.blocks), 1) if job.by_block else 1


def _graph(job: Job) -> int:
    """Activations of a block, or of the model, and their gradients."""
    return _activated(job) // _block_count(job)


def _activated(job: Job) -> int:
    """What the layers read and give in one batch, and its gradients."""
    numbers = sum(layer.tokens * (layer.outputs + layer.inputs) for layer in job.layers)
    return 2 * _rows(job) * job.itemsize * numbers


def _decomposition(job: Job, layer: Layer) -> int:
    """The weight and what is made of it, an eigenproblem, and the root of the outputs' metric."""
    outputs, inputs = layer.outputs, layer.inputs
    numbers = (5 if job.weighted else 3) * outputs * inputs + 3 * layer.side**2
    return DOUBLE * (numbers + (outputs**2 if job.weighted else 0))


def _solution(job: Job, layer: Layer) -> int:
    """The refit's normal equations and their Cholesky factor, the weight and what is made of it."""
    outputs, inputs = layer.outputs, layer.inputs
    numbers = inputs**2 + 5 * outputs * inputs
    return DOUBLE * (numbers + (outputs**2 if job.weighted else 0))


def _refit(job: Job) -> int:
    """Rows of both streams at one input while they are summed, or the system to solve after."""
    if job.recovery is None or not job.recovery.refit:
        return 0
    solved = _most(max(_solution(job, layer), _decomposition(job, layer)) for layer in job.layers)
    widest = _most(read.inputs for read in job.groups)
    tokens = _most(read.tokens for read in job.groups) * _rows(job)
    rows = 2 * (job.itemsize + SINGLE) * tokens * widest + SINGLE * PART * widest
    return max(solved, rows + _activations(job)) + _batch(job, 3)


def _moments(job: Job) -> int:
    """Second moments of a student's inputs, and with the dense ones."""
    return 2 * DOUBLE * _most(read.inputs for read in job.groups) ** 2


def _states(job: Job) -> int:
    """Hidden states of all rows between two blocks."""
    rows = job.rows + job.held
    return rows * job.outline.hidden * job.itemsize if job.outline.blocks else 0


def _batch(job: Job, copies: int) -> int:
    """Hidden states of a batch."""
    return copies * _rows(job) * job.outline.hidden * job.itemsize if job.outline.blocks else 0


def _predictions(job: Job) -> int:
    """Predictions that are kept to judge by."""
    return min(job.held * job.outline.predictions * job.itemsize, KEPT_BYTES)


def _comparison(job: Job) -> int:
    """A comparison of some predictions with those kept."""
    at_once = min(job.held, job.few) * job.outline.predictions
    return at_once * job.itemsize + 5 * SINGLE * min(at_once, ENTRIES)
