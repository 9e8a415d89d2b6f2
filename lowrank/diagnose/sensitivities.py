"""`sensitivity`: what the model's predictions lose when one layer alone is reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..api.request import Request, targets_of
from ..calibration.batches import LENGTH, Batch, Data, materialise
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.statistics import Calibration, calibrate
from ..errors import LowrankError
from ..methods import method as method_of
from ..plans.versions import versions
from ..types import Method, Site
from ..walk.sites import ALL_LINEAR, Patterns
from . import cache as disk
from .one_layer import measure, name_of
from .sensitivity_table import Sensitivity

RATIOS = (0.9, 0.7, 0.5, 0.3)


def sensitivity(
    model: nn.Module,
    data: Data | Calibration,
    *,
    ratios: Sequence[float] = RATIOS,
    method: str | Method | None = None,
    calibration: Data | Calibration | None = None,
    cache: str | Path | None = None,
    tokenizer: Any = None,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    length: int = LENGTH,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Factor one layer at a time, compare the predictions with the dense model's, put it back.

    The dense model's logits of all batches are held meanwhile. The model is bit for bit as before
    afterwards, also when anything raises.

    Args:
        data: held-out batches on which predictions are compared; as for `kl`. Of a `Calibration`
            the batches are taken, and its statistics where `calibration` is None.
        ratios: shares in (0, 1) that the one layer keeps of its own parameters.
        method: None: "whitened" with calibration, else "svd".
        calibration: what the method's statistics are taken from; best not the held-out data.
        cache: a file. What was computed is written there, and read instead of computed when
            model, data and settings are the same; a file made for others is refused.

    Raises:
        LowrankError: no data, a ratio out of range, a cache made for something else.
    """
    wanted = _ratios(ratios)
    # Its ratio is not used: it checks method and patterns as `compress` does.
    request = Request(ratio=0.5, method=method, target_modules=target_modules,
                      exclude_modules=exclude_modules, seed=seed)  # fmt: skip
    targets = [site for site in targets_of(model, request) if not site.reason]
    batches, path = _batches(data, tokenizer, length), None if cache is None else Path(cache)
    source = data if calibration is None and isinstance(data, Calibration) else calibration
    way = method_of(method or ("svd" if source is None else "whitened"), seed)
    if way.needs and source is None:
        raise LowrankError(f"{name_of(way)} needs {', '.join(way.needs)}: pass calibration=…")
    if source is not None and not isinstance(source, Calibration):
        source = _materialised(source, tokenizer, length)
    made_for: dict[str, Any] = {}
    if path is not None:
        disk.check_place(path)
        made_for = _made_for(model, batches, source, way, targets, wanted)
        stored = disk.read(path, made_for)
        if stored is not None:
            return _restored(*stored)
    seen = None if source is None or not way.needs else calibrate(model, source, progress=progress)
    if seen is not None and way.needs & FISHER:
        seen = with_fisher(model, seen, targets, seed=seed, progress=progress)
    found = measure(model, batches, targets, way, seen, wanted, progress)
    if path is not None:
        body = {"made_for": made_for, "sites": found.sites, "method": found.method,
                "positions": found.positions, "versions": versions()}  # fmt: skip
        disk.write(path, body, {name: getattr(found, name) for name in disk.TENSORS})
    return found


def _batches(data: Any, tokenizer: Any, length: int) -> list[Batch]:
    if data is None or (isinstance(data, str) and not data.strip()):
        raise LowrankError(
            "sensitivity compares predictions: pass data=…, held-out text or batches"
        )
    found = (
        data.batches if isinstance(data, Calibration) else _materialised(data, tokenizer, length)
    )
    if callable(found):
        raise LowrankError("sensitivity needs batches that are run again and again, not a callable")
    return found


def _materialised(data: Any, tokenizer: Any, length: int) -> Any:
    return materialise(data, tokenizer, length=length)


def _ratios(ratios: Any) -> tuple[float, ...]:
    given = list(ratios) if isinstance(ratios, Sequence) and not isinstance(ratios, str) else []
    sound = all(isinstance(r, Real) and 0 < float(r) < 1 for r in given)
    if not given or not sound or len(set(given)) < len(given):
        raise LowrankError(f"ratios must be different shares kept, each in (0, 1), got {ratios!r}")
    return tuple(map(float, given))


def _made_for(
    model: nn.Module,
    batches: Sequence[Batch],
    source: Any,
    way: Method,
    targets: Sequence[Site],
    ratios: tuple[float, ...],
) -> dict[str, Any]:
    """What the result depends on, under the names that a refusal prints."""
    if callable(source):
        raise LowrankError("a callable cannot be recognised again: calibrate first, or cache=None")
    if isinstance(source, Calibration):
        said = disk.calibration_print(source)
    else:
        said = "" if source is None else disk.data_print(source)
    return {
        "model": disk.model_print(model),
        "held-out data": disk.data_print(batches),
        "calibration": said,
        "method": repr(way),
        "set of layers": [site.name for site in targets],
        "ratios": list(ratios),
        "version of lowrank": versions().get("lowrank"),
    }


def _restored(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sensitivity:
    return Sensitivity(
        sites=tuple(body["sites"]),
        ratios=tuple(body["made_for"]["ratios"]),
        kl=tensors["kl"],
        rank=tensors["rank"],
        error=tensors["error"],
        method=body["method"],
        positions=body["positions"],
        computed=False,
    )
