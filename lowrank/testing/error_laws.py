"""Laws about errors: the curve, what it promises, and the optimum that nothing can be below."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from ..nn.geometry import Geometry
from ..types import Curve, Factored, Measured, Method
from ..walk import layouts
from .cases import Case, Matrix, Planted, factored_module, factored_options, numbers, require

# By norm: a matrix whose squared Frobenius norm is the error of W − Ŵ = `difference`.
NORMS: dict[str, Callable[[Matrix, Case], Matrix]] = {
    "weight": lambda difference, case: difference,
    "output": lambda difference, case: _outputs(difference, case),
    "fisher": lambda difference, case: _loss(difference, case),
    "row-fisher": lambda difference, case: _rows(difference, case),
}


def check_planted(method: Method, case: Case, *, planted: Planted, tolerance: float) -> None:
    """It reproduces the weight that was planted for it."""
    weight, size = planted(*case.site.shape, torch.Generator().manual_seed(20))
    module = copy.deepcopy(case.module)
    with torch.no_grad():
        layouts.matrix(module).copy_(weight)
    case = replace(case, site=replace(case.site, modules=(module,)))
    curve = case.curve(method)
    same = [option for option in curve.options if option.size == size]
    if not same:
        raise AssertionError(f"{case.name}: the curve lacks the planted size {size}")
    option = min(same, key=lambda option: option.error)  # a form may have two sides
    new = factored_module(method.factor(module, option, case.stats), case.at(option))
    error, total = (
        error_of(curve, d, case) ** 0.5 for d in (_difference(case, new), _weight(case))
    )
    allowed = (tolerance + case.rounding) * total
    text = f"{case.at(option)}: the planted weight is missed by {error:.3g} of {total:.3g}"
    require(error <= allowed, f"{text} (allowed: {allowed:.3g})")


def check_curve(method: Method, case: Case) -> None:
    """Cost rises and error falls along the curve, from `total` to the dense weight's zero."""
    curve = case.curve(method)
    require(curve.sites == case.site.names, f"{case.name}: the curve is of {curve.sites}")
    last, factored = curve.options[-1], factored_options(curve, case.name)
    zero = last.dense and last.cost == case.site.cost and last.error == 0
    require(zero, f"{case.name}: the last option is not the dense weight with error 0: {last}")
    total = error_of(curve, _weight(case), case)
    same = abs(curve.total - total) <= 1e-9 * total
    require(same, f"{case.name}: total is {curve.total}, the zero matrix's error {total}")
    errors = [option.error for option in factored]
    falling = all(before > after for before, after in pairwise(errors))
    within = all(0 <= error <= curve.total * (1 + 1e-12) for error in errors)  # no NaN either
    require(falling and within, f"{case.name}: errors do not fall from {curve.total}: {errors}")
    units = method.units if isinstance(method, Measured) else ("params", "bytes")
    for unit in units:
        costs = [getattr(option.cost, unit) for option in curve.options]
        rising = all(before < after for before, after in pairwise(costs))
        require(rising and costs[0] > 0, f"{case.name}: {unit} do not rise: {costs}")
    if curve.spectrum is not None:
        values = numbers(curve.spectrum)
        right = values.shape == (min(case.site.shape),) and values[-1] >= 0
        ordered = right and bool((np.diff(values) <= 0).all())
        require(ordered, f"{case.name}: the spectrum does not fall to zero or more: {values}")


def check_exact(method: Method, case: Case) -> None:
    """Where the curve says `exact`, the stored factors show the error that it predicts."""
    curve = case.curve(method)
    for option, new in case.built(method) if curve.exact else ():
        measured = error_of(curve, _difference(case, new), case)
        allowed = (1e-6 + case.rounding) * curve.total
        text = f"{case.at(option)}: predicted {option.error:.6g}, measured {measured:.6g}"
        require(
            abs(measured - option.error) <= allowed,
            f"{text}, of {curve.total:.6g} (allowed difference: {allowed:.3g})",
        )


def check_bound(method: Method, case: Case) -> None:
    """No error, predicted or measured, is below the optimum of its rank (Eckart and Young)."""
    curve = case.curve(method)
    scaled = _norm(curve, case)(_weight(case), case)
    values = np.linalg.svd(scaled, compute_uv=False) ** 2
    for option, new in case.built(method):
        rank = option.size[0] if option.size else 0
        has = int(np.linalg.matrix_rank(numbers(new.dense_weight(torch.float64))))
        require(has <= rank, f"{case.at(option)}: the result has rank {has}")
        optimum, slack = float(values[rank:].sum()), 1e-9 * float(values.sum())
        measured = error_of(curve, _difference(case, new), case)
        for what, error in (("predicted", option.error), ("measured", measured)):
            text = f"{case.at(option)}: {what} error {error:.9g} is below the optimum {optimum:.9g}"
            require(error >= optimum - slack, text)


def _weight(case: Case) -> Matrix:
    return numbers(layouts.matrix(case.module))


def _difference(case: Case, new: Factored) -> Matrix:
    return _weight(case) - numbers(new.dense_weight(torch.float64))


def error_of(curve: Curve, difference: Matrix, case: Case) -> float:
    """Squared and absolute, in the norm of the curve."""
    return float((_norm(curve, case)(difference, case) ** 2).sum())


def _norm(curve: Curve, case: Case) -> Callable[[Matrix, Case], Matrix]:
    require(curve.norm in NORMS, f"{case.name}: no oracle for the norm {curve.norm!r} in NORMS")
    return NORMS[curve.norm]


def _outputs(difference: Matrix, case: Case) -> Matrix:
    """What the difference does to the inputs themselves, per token; no Gram matrix is formed."""
    if case.site.kind == "embedding":
        return _lookups(difference, case)
    if case.site.kind == "conv":  # by the convolution itself, which knows nothing of patches
        conv = Geometry.of(case.module).dense(torch.from_numpy(difference.copy()), None)
        with torch.no_grad():
            made = conv(case.inputs.double().cpu()).movedim(1, 0).flatten(1)
        return numbers(made) / made.shape[1] ** 0.5
    inputs = numbers(case.inputs)
    return np.asarray(difference @ inputs.T / len(inputs) ** 0.5)


def _lookups(difference: Matrix, case: Case) -> Matrix:
    """Rows by the root of their chance; columns, under a head, by a root of its metric."""
    freq, gram = case.stats.freq, case.stats.gram
    counts = np.ones(len(difference)) if freq is None else numbers(freq)
    chance = counts + counts.mean() / 2
    rows = difference * (chance / chance.sum())[:, None] ** 0.5
    if gram is None:
        return np.asarray(rows)
    metric = numbers(gram) / np.trace(numbers(gram)) * len(gram)
    return np.asarray(rows @ np.linalg.cholesky(0.75 * np.eye(len(gram)) + 0.25 * metric))


def _loss(difference: Matrix, case: Case) -> Matrix:
    """(W − Ŵ) with the roots of the inputs' and of the damped gradients' Gram on its sides."""
    gram, out_gram = (
        g if g is None else numbers(g) for g in (case.stats.gram, case.stats.out_gram)
    )
    if gram is None or out_gram is None:
        raise AssertionError(f"{case.name}: the suite has no output gradients")
    damped = out_gram + 0.1 * out_gram.diagonal().mean() * np.eye(len(out_gram))
    values, vectors = np.linalg.eigh(gram)
    right = vectors * np.sqrt(values.clip(min=0))
    return np.asarray(np.linalg.cholesky(damped).T @ difference @ right)


def _rows(difference: Matrix, case: Case) -> Matrix:
    """(W − Ŵ) with every row weighted by the root of its Fisher information."""
    if case.stats.row_fisher is None:
        raise AssertionError(f"{case.name}: the suite has no Fisher information")
    return np.asarray(np.sqrt(numbers(case.stats.row_fisher))[:, None] * difference)
