"""The arguments of plan, compress and sweep as command-line options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..api.arguments import ARGUMENTS
from ..api.request import Compression, Options, Sweeping
from ..errors import LowrankError
from ..methods import JOINT, METHODS
from ..plans.plan import Plan

# Types of values other than text; rank and ratios are parsed here.
TYPES: dict[str, Any] = {
    "ratio": float,
    "align": int,
    "seed": int,
    "rows": int,
    "minutes": float,
    "target_modules": list[str],
    "exclude_modules": list[str],
    "judge": Path,
    "cache": Path,
}
Command = TypeVar("Command", bound=Callable[..., Any])


def arguments_of(request: type[Options]) -> Callable[[Command], Command]:
    """Add an option to a command for each argument of a request that has a flag.

    The command receives them as `**chosen`.
    """

    def decorate(command: Command) -> Command:
        every = inspect.signature(command, eval_str=True).parameters.values()
        own = [p for p in every if p.kind is not inspect.Parameter.VAR_KEYWORD]
        required = [p for p in own if p.default is inspect.Parameter.empty]
        parameters = [*required, *_parameters(request), *(p for p in own if p not in required)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p if p in required else p.replace(kind=keyword) for p in parameters]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameters(request: type[Options]) -> list[inspect.Parameter]:
    parameters = []
    names = {field.name for field in fields(request)}
    for name, about in ARGUMENTS.items():
        if name in names and about.flag:
            text = about.typed or f"{about.text[0].upper()}{about.text[1:]}"
            option = typer.Option(about.flag, metavar=about.metavar, help=text, show_default=False)
            kind: Any = Annotated[TYPES.get(name, str) | None, option]
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=None, annotation=kind))
    return parameters


def keywords(chosen: Mapping[str, Any], request: type[Any]) -> dict[str, Any]:
    """Keyword arguments of a verb except data and judge, checked before a model is loaded.

    Args:
        chosen: a command's options, by the names of the request's fields.

    Raises:
        LowrankError: as the verb.
    """
    given = {name: value for name, value in chosen.items() if value not in (None, [], ())}
    for name in ("data", "judge"):
        given.pop(name, None)
    if request is not Sweeping and "ratio" not in given and "rank" not in given:
        raise LowrankError("no target size: give --ratio 0.8 or --rank 32")
    if "rank" in given:
        given["rank"] = number("--rank", given["rank"])
    if "ratios" in given:
        given["ratios"] = [number("--ratios", part) for part in given["ratios"].split(",")]
    for name in ("target_modules", "exclude_modules"):
        if name in given and len(given[name]) == 1:
            given[name] = given[name][0]
    asked = request(**given)
    if isinstance(asked, Compression):
        asked.request()
    if isinstance(asked, Sweeping):
        for ratio in asked.ratios:
            asked.request(ratio)
    return given


def saved_plan(path: Path, chosen: Mapping[str, Any]) -> Plan:
    """Load the plan of --plan.

    Raises:
        LowrankError: other options conflict with it, or its methods need a text that is missing.
    """
    given = [name for name, value in chosen.items() if value not in (None, [], ())]
    conflicting = [ARGUMENTS[name].flag for name in given if name not in ("data", "rows")]
    if conflicting:
        raise LowrankError(f"--plan already fixes this: drop {', '.join(conflicting)}")
    plan = Plan.load(path)
    needing = needs_data(used_by(plan))
    if chosen["data"] is None and needing and plan.settings.get("data") == "":
        raise LowrankError(f"the plan was made from a text, with {needing}: add --data TEXT")
    return plan


def used_by(plan: Plan) -> list[str]:
    """Names of the methods that a plan factors layers with."""
    return sorted({entry.method for entry in plan.entries if entry.size is not None})


def needs_data(methods: Iterable[str]) -> str:
    """Name of the first method that needs data; "" if none does."""
    known: dict[str, Any] = {**METHODS, **JOINT}
    return next((name for name in methods if name in known and known[name]().needs), "")


def number(option: str, text: str) -> int | float:
    """Parse a number; raises LowrankError if the text is not one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise LowrankError(f"{option} must be a number, got {text!r}")
