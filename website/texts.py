"""What a person wrote of each name: docs/gallery/KIND/NAME.md, one short file a name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .names import REGISTRIES, Name

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "docs" / "gallery"

# What a file of that kind states, one bullet each.
FIELDS = {
    "methods": ("Formula", "Paper", "Claim", "Forms"),
    "policies": ("Formula", "Paper", "Claim"),
    "efforts": ("Formula", "Paper", "Claim"),
    "forms": ("Formula", "Paper"),
    "controllers": ("Formula", "Paper", "Claim"),
}
MEANING = {
    "Formula": "what is minimised or stored, in backquotes, in the words of the docstring",
    "Paper": "authors or name, and arXiv id; or: none, and whose idea it is",
    "Claim": "its headline figure as the paper states it, and where; or: none quoted here",
    "Forms": "classes of lowrank.nn that it makes, by comma: LowRankLinear, PivotedLinear",
}
SECTIONS = ("When to use", "When not to")
UNFINISHED = re.compile(r"TODO|FIXME|<[A-Za-z ]+>")


class TextError(ValueError):
    """A page text that is missing or incomplete; says which file, and what to write."""


@dataclass(frozen=True)
class Text:
    """One page text.

    Attributes:
        idea: the first paragraph.
        fields: of each bullet, on one line.
        sections: Markdown below each heading.
    """

    idea: str
    fields: dict[str, str]
    sections: dict[str, str]

    @property
    def forms(self) -> list[str]:
        return [form.strip() for form in self.fields.get("Forms", "").split(",") if form.strip()]


def path_of(name: Name) -> Path:
    return TEXTS / name.kind / f"{name.slug}.md"


def read(name: Name) -> Text:
    """The text of a name.

    Raises:
        TextError: there is none, or something in it is missing.
    """
    path = path_of(name)
    if not path.is_file():
        raise TextError(
            f"{name.name!r} is in {REGISTRIES[name.kind]} and has no page text. Write "
            f"{path.relative_to(ROOT)}:\n\n{skeleton(name)}"
        )
    return parse(name, path.read_text(encoding="utf-8"))


def skeleton(name: Name) -> str:
    """What to write for a name, with what is meant by each part."""
    fields = [f"- {field}: <{MEANING[field]}>" for field in FIELDS[name.kind]]
    sections = [f"## {section}\n\n<one to three sentences>" for section in SECTIONS]
    return "\n\n".join(
        [f"# {name.name}", "<the idea in a sentence or two>", "\n".join(fields), *sections]
    )


def parse(name: Name, text: str) -> Text:
    """Take a text apart; see `read`."""

    def wrong(what: str) -> TextError:
        where = path_of(name).relative_to(ROOT)
        return TextError(f"{where}: {what}. It should look like this:\n\n{skeleton(name)}")

    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    title, _, body = head.partition("\n")
    if title.strip() != f"# {name.name}":
        raise wrong(f"the first line must be '# {name.name}', got {title.strip()!r}")
    idea, *bullets = re.split(r"^- ", body, flags=re.MULTILINE)
    pairs = [bullet.partition(":") for bullet in bullets]
    fields = {field.strip(): " ".join(said.split()) for field, _, said in pairs}
    sections = {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in rest}
    if not idea.strip():
        raise wrong("the idea is missing below the title")
    for given, expected in ((fields, FIELDS[name.kind]), (sections, SECTIONS)):
        if tuple(given) != expected:
            raise wrong(f"expected {', '.join(expected)}, got {', '.join(given) or 'nothing'}")
        empty = [each for each, said in given.items() if not said]
        if empty:
            raise wrong(f"nothing is said for {', '.join(empty)}")
    if UNFINISHED.search(text):
        raise wrong(f"{UNFINISHED.search(text)[0]!r} is left over")  # type: ignore[index]
    return Text(" ".join(idea.split()), fields, sections)
