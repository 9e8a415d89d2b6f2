"""Every name of the library that has a page in the gallery, from the registries themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lowrank
from lowrank.methods import JOINT, METHODS
from lowrank.nn import FACTORED
from lowrank.policies import POLICIES

KINDS = ("methods", "policies", "efforts", "forms", "controllers")
REGISTRIES = {
    "methods": "METHODS or JOINT in lowrank/methods/__init__.py",
    "policies": "POLICIES in lowrank/policies/__init__.py",
    "efforts": "EFFORTS in lowrank/recover/recovery.py",
    "forms": "FACTORED in lowrank/nn/__init__.py",
    "controllers": "the door of lowrank/train/__init__.py",
}
NEEDS = {
    "gram": "data",
    "freq": "data",
    "out_gram": "gradients",
    "row_fisher": "gradients",
}


@dataclass(frozen=True)
class Name:
    """One name, and the class that it stands for; None for an effort, which has none."""

    kind: str
    name: str
    cls: type | None

    @property
    def slug(self) -> str:
        """Name of its files: `lowrank-2:4` has a character that some file systems refuse."""
        return self.name.replace(":", "-")

    @property
    def source(self) -> str:
        """The file of the repository that defines it."""
        if self.cls is None:
            return "lowrank/recover/recovery.py"
        return self.cls.__module__.replace(".", "/") + ".py"

    @property
    def docstring(self) -> str:
        """What its file says on top: idea, formula, paper, and where it differs from it."""
        if self.cls is None:
            return ""
        return inspect.getdoc(inspect.getmodule(self.cls)) or ""

    @property
    def layers(self) -> str:
        """Kinds of layers that a method takes, or that a form stands for."""
        kinds = [self.cls.KIND] if self.kind == "forms" else sorted(self._of("kinds"))  # type: ignore[union-attr]
        return ", ".join(kinds)

    @property
    def needs(self) -> str:
        """Of a method: "nothing", "data", or "gradients", for which it needs data too."""
        said = {NEEDS.get(statistic, "data") for statistic in self._of("needs")}
        return "gradients" if "gradients" in said else "data" if said else "nothing"

    def _of(self, trait: str) -> Any:
        return getattr(self.cls(), trait, ()) if self.cls is not None else ()


def registered() -> dict[str, Mapping[str, type | None]]:
    """The registries by kind; controllers are what has a controller's two steps and its end."""
    controllers = {
        name: cls
        for name, cls in sorted(vars(lowrank.train).items())
        if inspect.isclass(cls)
        and all(hasattr(cls, step) for step in ("before_step", "after_step", "finish"))
    }
    return {
        "methods": {**METHODS, **JOINT},
        "policies": dict(POLICIES),
        "efforts": dict.fromkeys(lowrank.EFFORTS),
        "forms": dict(FACTORED),
        "controllers": controllers,
    }


def names(kind: str | None = None) -> Iterator[Name]:
    """All names, or those of one kind."""
    for each, registry in registered().items():
        if kind in (None, each):
            yield from (Name(each, name, cls) for name, cls in registry.items())
