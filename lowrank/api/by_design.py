"""Factorisation by design: factor a model before it is trained."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from ..calibration.processes import alone
from ..errors import LowrankError, unknown
from ..plans.report import Report
from ..types import Method, Policy, Unit
from ..walk.sites import ALL_LINEAR, Patterns
from .request import Of
from .verbs import compress

Init = Literal["spectral", "random"]
_METHODS = {"spectral": "svd", "random": "random"}


def factorize_by_design(
    model: nn.Module,
    ratio: float,
    init: Init = "spectral",
    *,
    method: str | Method | None = None,
    policy: str | Policy = "uniform",
    of: Of = "targets",
    unit: Unit = "params",
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    align: int | None = None,
    seed: int = 0,
    copy: bool = False,
) -> tuple[nn.Module, Report]:
    """Factor the layers of an untrained model (Greenformer, arXiv 2109.06762, by design).

    Same as `compress` without data, and by default with policy "uniform": the spectrum of an
    untrained weight says nothing about the importance of its layer. For trained models use
    `compress`, which can look at data.

    Args:
        model: changed in place and returned; if it is itself a layer, a new one is returned.
        ratio: fraction kept, in (0, 1).
        init: "spectral": SVD of the initial weights, balanced (Khodak et al., arXiv 2105.01029);
            "random": new factors whose product has the variance of those weights. Both keep biases.
        method: in the place of `init`, one that needs no data, such as "quotient-remainder" for
            embeddings; None: as `init` says.
        policy: such as "mixed-dimensions" for several embeddings.
        of, unit, target_modules, exclude_modules, align, seed, copy: as for `compress`.

    Returns:
        The model and a Report.

    Raises:
        LowrankError: an argument or a layer is invalid; the model is then unchanged.
    """
    if init not in _METHODS:
        raise unknown("init", str(init), get_args(Init))
    if method is not None and init != "spectral":
        raise LowrankError(
            f"init={init!r} starts low-rank factors, but method={method!r:.80} was given: drop "
            "one; a method with starts of its own takes them as options"
        )
    with alone():  # before training, processes may hold different weights, which DDP replaces
        return compress(
            model, ratio, method=method or _METHODS[init], policy=policy, data=None, of=of,
            unit=unit, target_modules=target_modules, exclude_modules=exclude_modules, align=align,
            seed=seed, copy=copy, progress=False,
        )  # fmt: skip
