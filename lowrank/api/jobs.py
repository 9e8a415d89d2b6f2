"""A compression as far as its work and memory depend on it: shapes, rows and stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.batches import ROWS
from ..calibration.observation import inside
from ..calibration.outline import Outline
from ..calibration.running import few_rows
from ..methods import ASVD, FWSVD, SVD, TwoSided, Whitened
from ..methods.resolved import Resolved
from ..policies import LossAware, judges, policy_of
from ..recover.recovery import Recovery
from ..types import Site, WeighsOutputs
from ..walk.layouts import keeps_moments
from .request import Request

# Their layers take one eigenproblem each, of the smaller side; others iterate, or compare forms.
CLOSED = (SVD, Whitened, TwoSided, ASVD, FWSVD)


@dataclass(frozen=True)
class Layer:
    """A targeted layer: its weight (outputs, inputs), the rank expected of its factors, the input
    vectors that it reads a row, and its block, "" for none."""

    outputs: int
    inputs: int
    rank: int
    tokens: int
    block: str = ""

    @property
    def side(self) -> int:
        return min(self.outputs, self.inputs)


@dataclass(frozen=True)
class Job:
    """A compression, as far as its work and memory depend on it.

    Attributes:
        layers: the targets.
        groups: the inputs that these read: the first of the layers that read one tensor.
        rows, held: rows of data to fit to, and to judge on.
        batch, few: rows that are run at once, and at once through the head.
        itemsize: bytes of a number of the model.
        needs: statistics that the method reads.
        closed: whether the method decomposes each layer once, in closed form.
        weighted: whether errors are measured in a metric of the outputs too.
        candidates: allocations compared on held-out rows; None if unknown.
        batchnorms: whether there are batch norms to re-estimate.
        files: from folder to folder: loaded and written too.
    """

    outline: Outline
    layers: tuple[Layer, ...]
    groups: tuple[Layer, ...]
    rows: int
    held: int
    batch: int
    few: int
    itemsize: int
    needs: frozenset[str]
    closed: bool
    weighted: bool
    candidates: int | None
    recovery: Recovery | None
    batchnorms: bool
    files: bool

    @property
    def by_block(self) -> bool:
        """Whether gradients flow back block by block."""
        blocks = self.outline.blocks
        return len(blocks) > 1 and all(layer.block for layer in self.layers)


def job_of(
    model: nn.Module,
    targets: Sequence[Site],
    outline: Outline,
    request: Request,
    rows: int,
    length: int,
    share: float,
    files: bool,
) -> Job:
    """The job of a request.

    Args:
        targets: the sites that will be factored.
        rows, length: of the data, held-out rows included.
        share: of the targets' numbers that is kept.
        files: from folder to folder.
    """
    layers = {site.name: _layer(site, outline, request, share) for site in targets}
    groups = [next((name for name in group if name in layers), "") for group in outline.groups]
    resolved = request.resolved(data=rows > 0)
    closed = all(isinstance(resolved.for_kind(site.kind), CLOSED) for site in targets)
    held = round(rows * request.hold_out)
    recovery = request.recovery if rows else None
    return Job(
        outline=outline,
        layers=tuple(layers.values()),
        groups=tuple(layers[name] for name in groups if name),
        rows=rows - held,
        held=held,
        batch=ROWS if recovery is None else recovery.rows,
        few=few_rows(model, torch.zeros(1, length, dtype=torch.long, device="meta")),
        itemsize=targets[0].cost.bytes // max(targets[0].cost.params, 1),
        needs=resolved.needs if rows else frozenset(),
        closed=closed and resolved.joint is None,
        weighted=isinstance(resolved.method, WeighsOutputs) and rows > 0,
        candidates=_candidates(request, resolved, len(layers)),
        recovery=recovery,
        batchnorms=any(map(keeps_moments, model.modules())),
        files=files,
    )


def _layer(site: Site, outline: Outline, request: Request, share: float) -> Layer:
    """A target as it is expected to become, at the same share as all others."""
    outputs, inputs = site.shape
    both, numbers = outputs + inputs, share * outputs * inputs
    if isinstance(request.rank, int):
        rank = min(request.rank, outputs, inputs)
    elif request.storage == "pivoted" and site.kind == "linear":
        rank = int((both - (both**2 - 4 * numbers) ** 0.5) / 2)  # of rank · (m + n − rank)
    else:
        rank = int(numbers / both)
    block = next((b for b in outline.blocks if inside(site.name, b)), "")
    return Layer(outputs, inputs, max(rank, 1), outline.tokens.get(site.name, 0), block)


def _candidates(request: Request, resolved: Resolved, layers: int) -> int | None:
    """How many allocations are judged, at most; None if the policy does not tell."""
    if request.ratio is None or request.policy is None or not judges(request.policy):
        return 0
    if not isinstance(policy_of(request.policy), LossAware):
        return None
    return 3 if isinstance(resolved.method, WeighsOutputs) else 3 + layers
