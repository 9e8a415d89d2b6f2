"""The arguments of plan, compress and sweep as options of the command line."""

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

# Of the values that are no text; a rank and ratios are text that is read here.
TYPES: dict[str, Any] = {
    "ratio": float,
    "align": int,
    "seed": int,
    "target_modules": list[str],
    "exclude_modules": list[str],
    "judge": Path,
    "cache": Path,
}
Command = TypeVar("Command", bound=Callable[..., Any])


def arguments_of(request: type[Options]) -> Callable[[Command], Command]:
    """Give a command an option for each argument of a request that has a flag.

    The command takes them as `**chosen`; they stand where that stands in its signature.
    """

    def decorate(command: Command) -> Command:
        every = inspect.signature(command, eval_str=True).parameters.values()
        own = [p for p in every if p.kind is not inspect.Parameter.VAR_KEYWORD]
        required = [p for p in own if p.default is inspect.Parameter.empty]
        made = [*required, *_parameters(request), *(p for p in own if p not in required)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        made = [p if p in required else p.replace(kind=keyword) for p in made]
        command.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in made}
        return command

    return decorate


def _parameters(request: type[Options]) -> list[inspect.Parameter]:
    made = []
    taken = {each.name for each in fields(request)}
    for name, about in ARGUMENTS.items():
        if name in taken and about.flag:
            text = about.typed or f"{about.text[0].upper()}{about.text[1:]}"
            option = typer.Option(about.flag, metavar=about.metavar, help=text, show_default=False)
            kind: Any = Annotated[TYPES.get(name, str) | None, option]
            keyword = inspect.Parameter.KEYWORD_ONLY
            made.append(inspect.Parameter(name, keyword, default=None, annotation=kind))
    return made


def keywords(chosen: Mapping[str, Any], request: type[Any]) -> dict[str, Any]:
    """Keywords of a verb, checked before a model is loaded; data, judge and cache are left out.

    Args:
        chosen: what a command was given, by the names of the request's fields.

    Raises:
        LowrankError: as the verb.
    """
    given = {name: value for name, value in chosen.items() if value not in (None, [], ())}
    for name in ("data", "judge"):
        given.pop(name, None)
    if request is not Sweeping and "ratio" not in given and "rank" not in given:
        raise LowrankError("say how small: --ratio 0.8, or --rank 32")
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
    """The plan in a file.

    Raises:
        LowrankError: choices are given beside it, or the text that its methods need is not.
    """
    given = [name for name, value in chosen.items() if value not in (None, [], ())]
    beside = [ARGUMENTS[name].flag for name in given if name != "data"]
    if beside:
        raise LowrankError(f"--plan has decided already: leave out {', '.join(beside)}")
    plan = Plan.load(path)
    needing = needs_data(used_by(plan))
    if chosen["data"] is None and needing and plan.settings.get("data") == "":
        raise LowrankError(f"the plan was made on a text, by {needing}: add --data TEXT")
    return plan


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
