"""The choices that plan and compress share, as options of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LowrankError
from ..methods import JOINT, METHODS
from ..plans.plan import Plan
from ..policies import POLICIES

CHOICES = (
    "ratio", "rank", "method", "policy", "of", "unit", "align", "storage", "effort", "target",
    "exclude", "seed",
)  # fmt: skip


def _option(*names: str, metavar: str, help: str) -> Any:
    """An option without a default of its own; where there is one, its help says it."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False)


Ratio = Annotated[
    float | None,
    _option("--ratio", metavar="SHARE", help="Share of the targeted weights kept, in (0, 1)."),
]
Rank = Annotated[
    str | None,
    _option(
        "--rank", metavar="RANK",
        help="Instead of a ratio. An integer: the rank of every layer; a decimal number in (0, 1]: "
        "the share of energy that every layer keeps.",
    ),
]  # fmt: skip
Method = Annotated[
    str | None,
    _option(
        "--method", metavar="NAME",
        help=f"{', '.join((*METHODS, *JOINT))}; if not given: whitened, or svd where there is no "
        "--data and the model writes no text.",
    ),
]  # fmt: skip
Policy = Annotated[
    str | None,
    _option(
        "--policy", metavar="NAME",
        help=f"Shares the budget among the layers: {', '.join(POLICIES)}; uniform if not given.",
    ),
]  # fmt: skip
Text = Annotated[
    str | None,
    _option(
        "--data", metavar="TEXT",
        help="Calibration text: what the layers' inputs look like. self, or not given: what a "
        "causal language model writes itself.",
    ),
]  # fmt: skip
Of = Annotated[
    str | None,
    _option("--of", metavar="WHAT", help="The ratio is a share of: targets (if not given), model."),
]
Unit = Annotated[
    str | None,
    _option("--unit", metavar="WHAT", help="Counted: params (if not given), bytes, macs."),
]
Align = Annotated[
    int | None,
    _option(
        "--align", metavar="INT",
        help="Ranks are multiples of this, 1 is any; if not given, of 8 where that costs < 1 %.",
    ),
]  # fmt: skip
Storage = Annotated[
    str | None,
    _option(
        "--storage", metavar="FORM",
        help="Of the factors: factors (if not given), or pivoted: the same matrices in fewer "
        "numbers, so that ranks are higher at equal size.",
    ),
]  # fmt: skip
Effort = Annotated[
    str | None,
    _option(
        "--effort", metavar="WORD",
        help="fast: ranks by the loss, pivoted storage, layers refitted one after the other; "
        "balanced: blocks are trained too; best: and the whole model, to the dense one's words.",
    ),
]  # fmt: skip
Target = Annotated[
    list[str] | None,
    _option(
        "--target", metavar="NAME",
        help="Layers to compress, by name or its ending; may be repeated. One alone may be a "
        "regular expression. If not given: all linear layers and convolutions but the output head.",
    ),
]  # fmt: skip
Exclude = Annotated[
    list[str] | None,
    _option("--exclude", metavar="NAME", help="Layers to leave dense, written as for --target."),
]
Seed = Annotated[int | None, _option("--seed", metavar="INT", help="Of random numbers; 0.")]


def keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `lowrank.compress`, checked before a model is loaded.

    Args:
        given: the command's own parameters, by name.

    Raises:
        LowrankError: as `lowrank.compress`.
    """
    from ..api.request import Request

    if given["ratio"] is None and given["rank"] is None:
        raise LowrankError("say how small: --ratio 0.8, or --rank 32")
    found: dict[str, Any] = {k: given[k] for k in CHOICES if given[k] not in (None, [], ())}
    if "rank" in found:
        found["rank"] = number("--rank", found["rank"])
    for name in ("target", "exclude"):
        if name in found:
            patterns = list(found.pop(name))
            found[f"{name}_modules"] = patterns[0] if len(patterns) == 1 else patterns
    Request(**found)
    return found


def saved_plan(path: Path, given: Mapping[str, Any]) -> Plan:
    """The plan in a file.

    Raises:
        LowrankError: choices are given beside it, or the text that its methods need is not.
    """
    beside = [f"--{name}" for name in CHOICES if given[name] not in (None, [], ())]
    if beside:
        raise LowrankError(f"--plan has decided already: leave out {', '.join(beside)}")
    found = Plan.load(path)
    needing = needs_data(used_by(found))
    if given["data"] is None and needing and found.settings.get("data") == "":
        raise LowrankError(f"the plan was made on a text, by {needing}: add --data TEXT")
    return found


def used_by(plan: Plan) -> list[str]:
    """The names of the methods that a plan factors layers by."""
    return sorted({entry.method for entry in plan.entries if entry.size is not None})


def needs_data(methods: Iterable[str]) -> str:
    """The first of some methods that works from data, or ""."""
    known: dict[str, Any] = {**METHODS, **JOINT}
    return next((name for name in methods if name in known and known[name]().needs), "")


def number(option: str, text: str) -> int | float:
    """Raises LowrankError where the text is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise LowrankError(f"{option} must be a number, got {text!r}")
