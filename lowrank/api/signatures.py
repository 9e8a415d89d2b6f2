"""Verbs with flat arguments: signature and documentation are made from a request's fields."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from torch import nn

from ..walk.checks import ordinary_tensors
from .arguments import ARGUMENTS

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
Verb = Callable[[nn.Module, R], T]


def _documented(doc: str, names: Sequence[str]) -> str:
    lines = []
    for name in names:
        about = ARGUMENTS[name]
        text = f"{name}: {about.text} {about.more}".rstrip()
        lines.append(textwrap.fill(text, 92, subsequent_indent=" " * 4))
    return doc.replace("…", textwrap.indent("\n".join(lines), " " * 8).lstrip())


def flat(request: Callable[P, R]) -> Callable[[Verb[R, T]], Callable[Concatenate[nn.Module, P], T]]:
    """Let a function of (model, request) take the request's fields as flat arguments.

    Signature and argument documentation are generated from the fields; `…` in the docstring marks
    the place.
    """

    def decorate(verb: Verb[R, T]) -> Callable[Concatenate[nn.Module, P], T]:
        model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        own = list(inspect.signature(request).parameters.values())
        own.sort(key=lambda parameter: [*ARGUMENTS].index(parameter.name))
        result = inspect.signature(verb).return_annotation
        signature = inspect.Signature([model, *own], return_annotation=result)

        @functools.wraps(verb)
        def call(*args: Any, **kwargs: Any) -> T:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{verb.__name__}() {error}") from None
            with ordinary_tensors():
                return verb(given.pop("model"), cast(Any, request)(**given))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _documented(verb.__doc__ or "", [parameter.name for parameter in own])
        return cast(Any, call)

    return decorate
