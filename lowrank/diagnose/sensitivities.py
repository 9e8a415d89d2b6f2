"""`sensitivity`: KL of the model's predictions when one layer alone is compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..api.deciding import targets_among
from ..api.grouping import groups_of
from ..api.request import OnMissing, Request
from ..calibration.batches import LENGTH, Batch, Data, materialise
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.statistics import Calibration, calibrate
from ..errors import LowrankError
from ..methods.resolved import Group, Resolved
from ..plans.plan import versions
from ..types import JointMethod, Method, Site
from ..walk.parts import parts_apart
from ..walk.sites import ALL_LINEAR, Patterns, find_sites
from . import cache as disk
from .one_layer import measure_alone
from .sensitivity_table import Sensitivity

RATIOS = (0.9, 0.7, 0.5, 0.3)


@parts_apart
def sensitivity(
    model: nn.Module,
    data: Data | Calibration,
    *,
    ratios: Sequence[float] = RATIOS,
    method: str | Method | JointMethod | None = None,
    calibration: Data | Calibration | None = None,
    cache: str | Path | None = None,
    tokenizer: Any = None,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    length: int = LENGTH,
    on_missing: OnMissing = "dense",
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """KL between the dense model and the model with one layer factored, layer by layer.

    The dense model's logits on the batches are cached, up to a limit. Afterwards the model is bit
    for bit as before, even if an error is raised.

    Args:
        data: held-out batches to compare predictions on, as for `kl`. A `Calibration` gives its
            batches, and its statistics too if `calibration` is None.
        ratios: shares kept of the one layer's own parameters, in (0, 1).
        method: as for `compress`; None: "whitened" with calibration, else "svd". Layers to which a
            joint method gives one basis are compressed together and share a row.
        calibration: source of the method's statistics; preferably not the held-out data.
        cache: file to store the result in, and to read it from if model, data and settings are the
            same; a file made for others is refused.
        on_missing: "data-free" measures layers that the calibration did not reach with plain SVD;
            otherwise their rows are NaN.
        tokenizer, target_modules, exclude_modules, length, seed, progress: as for `compress` and
            `calibrate`.

    Raises:
        LowrankError: there is no data, a ratio is out of range, or the cache was made for something
            else.
    """
    wanted = _ratios(ratios)
    source = data if calibration is None and isinstance(data, Calibration) else calibration
    # It checks method and patterns as `compress` does; its ratio is not used.
    request = Request(
        ratio=0.5, method=method, target_modules=target_modules, exclude_modules=exclude_modules,
        on_missing=on_missing, seed=seed,
    )  # fmt: skip
    resolved = request.resolved(data=source is not None)
    sites = find_sites(model)
    targets = [site for site in targets_among(sites, model, request) if not site.reason]
    batches, path = _batches(data, tokenizer, length), None if cache is None else Path(cache)
    if resolved.needs and source is None:
        needs = ", ".join(sorted(resolved.needs))
        raise LowrankError(f"{resolved.name()} needs {needs}: pass calibration=…")
    if source is not None and not isinstance(source, Calibration):
        source = materialise(source, tokenizer, length=length)
    made_for: dict[str, Any] = {}
    if path is not None:
        disk.check_place(path)
        made_for = _made_for(model, batches, source, resolved, targets, wanted)
        stored = disk.read(path, made_for)
        if stored is not None:
            return _restored(*stored)
    statistics = None
    if source is not None and resolved.needs:
        statistics = calibrate(model, source, progress=progress, sites=sites)
    if statistics is not None and resolved.needs & FISHER:
        statistics = with_fisher(
            model, statistics, targets, needs=resolved.needs, seed=seed, progress=progress
        )
    taken = [site for site in targets if resolved.takes(site.kind)]
    groups: Sequence[Group] = [(site,) for site in taken]
    if resolved.joint is not None and statistics is not None:
        groups = groups_of(taken, resolved.joint, statistics)
    table = measure_alone(
        model, batches, groups, resolved, statistics, wanted,
        data_free=on_missing == "data-free", progress=progress,
    )  # fmt: skip
    if path is not None:
        body = {"made_for": made_for, "sites": table.sites, "members": table.members,
                "method": table.method, "positions": table.positions,
                "versions": versions()}  # fmt: skip
        disk.write(path, body, {name: getattr(table, name) for name in disk.TENSORS})
    return table


def _batches(data: Any, tokenizer: Any, length: int) -> list[Batch]:
    if data is None or (isinstance(data, str) and not data.strip()):
        raise LowrankError(
            "sensitivity compares predictions: pass data=…, held-out text or batches"
        )
    given = isinstance(data, Calibration)
    batches = data.batches if given else materialise(data, tokenizer, length=length)
    if callable(batches):
        raise LowrankError("sensitivity needs batches to run repeatedly, not a callable")
    return batches


def _ratios(ratios: Any) -> tuple[float, ...]:
    given = list(ratios) if isinstance(ratios, Sequence) and not isinstance(ratios, str) else []
    sound = all(isinstance(r, Real) and 0 < float(r) < 1 for r in given)
    if not given or not sound or len(set(given)) < len(given):
        raise LowrankError(
            f"ratios must be distinct fractions kept, each in (0, 1), got {ratios!r}"
        )
    return tuple(map(float, given))


def _made_for(
    model: nn.Module,
    batches: Sequence[Batch],
    source: Any,
    resolved: Resolved,
    targets: Sequence[Site],
    ratios: tuple[float, ...],
) -> dict[str, Any]:
    """What the result depends on, under the names that an error message uses."""
    if callable(source):
        raise LowrankError("a callable cannot be cached: calibrate first, or pass cache=None")
    if isinstance(source, Calibration):
        digest = disk.calibration_print(source)
    else:
        digest = "" if source is None else disk.data_print(source)
    return {
        "model": disk.model_print(model),
        "held-out data": disk.data_print(batches),
        "calibration": digest,
        "method": f"{resolved.joint or resolved.method!r}, {resolved.method!r}",
        "set of layers": [site.name for site in targets],
        "ratios": list(ratios),
        "version of lowrank": versions().get("lowrank"),
    }


def _restored(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sensitivity:
    return Sensitivity(
        sites=tuple(body["sites"]),
        members=tuple(map(tuple, body["members"])),
        ratios=tuple(body["made_for"]["ratios"]),
        kl=tensors["kl"],
        rank=tensors["rank"],
        error=tensors["error"],
        method=body["method"],
        positions=body["positions"],
        computed=False,
    )
