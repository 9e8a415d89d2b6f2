"""Every method on inputs that say little: few rows, dead or duplicate features, tiny weights.

One layer alone is compressed by the verb, from float32 rows, whose Gram matrix has rounding errors
of either sign where it has no energy. Errors are recomputed from the rows in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, linalg
from lowrank.methods import METHODS
from lowrank.methods.conv_forms import FORMS, Metric
from lowrank.types import Measured, Statistics
from lowrank.walk import layouts

from ..draws import normal
from ..roster import QUICK

WIDTH, CHANNELS = 48, 8
CASES = (
    "1 row", "8 rows", "24 rows", "duplicate features", "dead units", "zero features", "rank 10",
    "one row many times", "denormal weights",
)  # fmt: skip
EFFORT = {**QUICK, "auto": {}, "blast": {"sweeps": 20}}
OF = {"linear": (WIDTH,), "conv": (CHANNELS, 3, 3)}
ROWS = [
    (name, kind, case)
    for name, method in METHODS.items()
    for kind in OF
    if kind in method().kinds
    for case in (CASES if name != "auto" else CASES[1::3])  # which runs the others
]


def rows(case: str, width: int) -> Tensor:
    """Inputs (rows, width) in float32."""
    count = {"1 row": 1, "8 rows": 8, "24 rows": 24}.get(case, 200)
    x = normal(count, width, seed=1) @ normal(width, width, seed=2) / width**0.5
    if case == "duplicate features":
        x[:, width // 2 :] = x[:, : width - width // 2]
    elif case == "dead units":
        x[:, ::3] = 0
    elif case == "zero features":
        x = 0 * x
    elif case == "rank 10":
        x = normal(count, 10, seed=1) @ normal(10, width, seed=2)
    elif case == "one row many times":
        x = x[:1].expand(count, -1)
    return x.float().contiguous()


@cache
def layer(kind: str, case: str) -> tuple[nn.Module, Tensor, lowrank.Calibration]:
    """A model of one layer, its rows in float64, and what a calibration gathers of them."""
    shape = OF[kind]
    dense = nn.Linear(WIDTH, 40) if kind == "linear" else nn.Conv2d(CHANNELS, 40, 3)
    with torch.no_grad():
        weight = layouts.matrix(dense)
        weight.copy_(normal(*weight.shape, seed=3) * (1e-41 if "denormal" in case else 0.1))
    x = rows(case, weight.shape[1])
    model = nn.Sequential(dense, nn.Flatten()).eval()
    batches = list(x.view(-1, *shape).split(64))
    calibration = lowrank.calibrate(model, batches, progress=False)
    calibration = lowrank.with_fisher(model, calibration, progress=False)
    return model, x.double(), calibration


def of_rows(norm: str, x: Tensor, weight: Tensor, stats: Statistics) -> float:
    """The squared error of leaving out a weight (out, in), in a norm, from the rows."""
    if norm == "weight":
        return float(weight.square().sum())
    if norm == "row-fisher":
        return float((stats.row_fisher[:, None] * weight.square()).sum())
    outputs = x @ weight.T
    weighed = outputs
    if norm == "fisher":
        weighed = outputs @ stats.out_gram + 0.1 * stats.out_gram.diagonal().mean() * outputs
    return float((weighed * outputs).sum() / len(x))


@pytest.mark.parametrize(("name", "kind", "case"), ROWS)
def test_weights_stay_bounded_and_errors_honest(name: str, kind: str, case: str) -> None:
    model, x, calibration = layer(kind, case)
    method = METHODS[name](**EFFORT.get(name, {}))
    data = calibration if method.needs else None
    options: dict[str, Any] = {
        "method": method, "data": data, "copy": True, "policy": "uniform", "progress": False,
        "unit": "bytes" if isinstance(method, Measured) else "params",
    }  # fmt: skip
    if case == "zero features" and method.needs:
        with pytest.raises(LowrankError, match="all 1 targets read nothing but zeros"):
            lowrank.compress(model, 0.6, **options)
        return
    new, report = lowrank.compress(model, 0.6, **options)
    assert report.achieved <= 0.6
    dense = layouts.matrix(model[0]).detach().double()
    made: Any = new[0]
    near = made.dense_weight(torch.float64).detach()
    assert float(near.abs().max()) <= 10 * float(dense.abs().max())
    (measured,) = report.sites
    stats = calibration.statistics["0"]
    error, total = (of_rows(measured.norm, x, each, stats) for each in (dense - near, dense))
    assert measured.measured == pytest.approx(error, rel=1e-3, abs=1e-5 * total)
    assert measured.measured > 0 or error <= 1e-15 * total


@pytest.mark.parametrize("form", ["tucker", "spatial", "kernel-last", "tubal"])
def test_one_cholesky_gives_the_errors_of_all_ranks(form: str) -> None:
    """Each against a fit of that rank alone: no error below it, and the build no worse."""
    conv = nn.Conv2d(6, 10, 3, dtype=torch.float64)
    weight = conv.weight.detach()
    x = normal(300, 54, seed=4) @ normal(54, 54, seed=5)
    metric = Metric(x.T @ x / 300)
    total = linalg.squared_error(
        weight.flatten(1), torch.zeros_like(weight).flatten(1), metric.gram
    )
    for size, error in FORMS[form].errors(weight, metric):
        made: Any = FORMS[form].build(conv, weight, size, metric)
        got = linalg.squared_error(weight.flatten(1), made.dense_weight(), metric.gram)
        assert got <= error + 1e-9 * total
        assert got >= 0.2 * error - 1e-9 * total
