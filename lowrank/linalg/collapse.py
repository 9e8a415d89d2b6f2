"""Neural collapse: how near features are to one point a class, and those to a simplex.

NC1 and NC2 of Papyan, Han and Donoho (arXiv 2008.08186). With class means μ_c, their mean μ and K
classes: NC1 = tr(Σ_W Σ_B⁺) / K, of the covariances within and between the classes; NC2 asks the
centred means to be of one length and at one angle, whose cosine in a simplex is −1/(K − 1). Their μ
is the mean of all features, which is the same where the classes are of one size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import LowrankError

FLOOR = 1e-9  # of the largest singular value of the centred means: below it lies rounding


class Collapse(NamedTuple):
    """Three measures, each 0 at collapse.

    Attributes:
        within: NC1, tr(Σ_W Σ_B⁺) / K.
        norms: NC2, standard deviation of ‖μ_c − μ‖ over its mean.
        angles: NC2, mean of |cos(μ_c − μ, μ_d − μ) + 1/(K − 1)| over pairs of classes.
    """

    within: float
    norms: float
    angles: float


def neural_collapse(features: Tensor, labels: Tensor) -> Collapse:
    """NC1 and NC2 of some features.

    Args:
        features: (rows, width), floating.
        labels: (rows,) integers; classes without rows do not count.

    Returns:
        The three measures; NaN where all class means are equal.

    Raises:
        LowrankError: there are fewer than two classes, or not one label for each row.
    """
    if labels.shape != features.shape[:1]:
        raise LowrankError(f"expected one label for each of {len(features)} rows, got "
                           f"{tuple(labels.shape)}")  # fmt: skip
    rows = features.detach().double()
    names, found = np.unique(labels.cpu().numpy(), return_inverse=True)
    classes, place = len(names), torch.from_numpy(found).to(rows.device)
    if classes < 2:
        raise LowrankError(f"neural collapse needs at least two classes, got {classes}")
    counts = place.bincount(minlength=classes).double()
    means = rows.new_zeros(classes, rows.shape[1]).index_add_(0, place, rows) / counts[:, None]
    centred = means - means.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = values > FLOOR * values[0]
    if not bool(kept.any()):
        return Collapse(*[float("nan")] * 3)
    along = (rows - means[place]) @ directions[kept].T / values[kept]
    lengths = centred.norm(dim=1)
    unit = centred / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)[:, None]
    cosines = (unit @ unit.T)[~torch.eye(classes, dtype=torch.bool, device=rows.device)]
    return Collapse(
        # Σ_B = Σ μμᵀ / K, so that the K of its inverse and that of NC1 cancel.
        float(along.square().sum()) / len(rows),
        float(lengths.std(correction=0) / lengths.mean()),
        float((cosines + 1 / (classes - 1)).abs().mean()),
    )
