"""Puts the site's sources together for mkdocs.

    python -m website.assemble [build/website]

Writes docs/ (the pages of docs/, README, CONTRIBUTING and CHANGELOG, the gallery, the reference)
and mkdocs.yml, with the gallery in its navigation. Links that leave docs/ are changed to lead to
copies; links to folders, of which a site shows nothing, become plain words.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from os.path import relpath
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

import lowrank

from .figures import figures
from .names import KINDS, names
from .pages import TITLES, pages
from .pareto import PLOTS, svg

ROOT = Path(__file__).parents[1]
# Pages of the repository outside of docs/ -> their place on the site.
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/gallery/README.md": "gallery/index.md",
}
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def written() -> dict[str, str | Path]:
    """The site by path: text of a page, or a file to be copied as it is."""
    site: dict[str, str | Path] = {}
    copied: set[str] = set()
    for name, place in MOVED.items():  # that of the gallery is then replaced by its overview
        site[place] = linked((ROOT / name).read_text(encoding="utf-8"), ROOT / name, copied)
    # Its code is wide, and its sections are few.
    site["index.md"] = f"---\nhide: [toc]\n---\n\n{site['index.md']}"
    for path in sorted((ROOT / "docs").rglob("*")):
        place = path.relative_to(ROOT / "docs").as_posix()
        if path.suffix == ".md" and not place.startswith("gallery/"):
            site[place] = linked(path.read_text(encoding="utf-8"), path, copied)
        elif path.suffix in (".svg", ".css", ".js"):
            site[place] = path
    site.update(pages())
    measured = figures()
    site.update({f"gallery/{plot.file}": svg(plot, measured) for plot in PLOTS})
    site["reference.md"] = reference()
    copied |= {f"benchmarks/results/{figure.file}" for figure in measured}
    site.update({f"files/{path}": ROOT / path for path in sorted(copied)})
    return site


def linked(text: str, path: Path, copied: set[str]) -> str:
    """A page with its relative links changed to those of the site.

    Args:
        path: of the page in the repository.
        copied: files outside of docs/ that links lead to; added to.
    """
    here = PurePosixPath(_place(path))

    def changed(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        words = LINK.sub(changed, words)
        file, _, anchor = target.partition("#")
        if "://" in target or not file:
            return f"{image}[{words}]({target})"
        goal = (path.parent / file).resolve()
        if goal.is_dir():
            return words
        place = _place(goal)
        if place.startswith("files/"):
            copied.add(place.removeprefix("files/"))
        way = relpath(place, here.parent)
        return f"{image}[{words}]({way}{'#' + anchor if anchor else ''})"

    parts, end = [], 0
    for fence in FENCE.finditer(text):  # code is left alone
        parts += [LINK.sub(changed, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(changed, text[end:])])


def _place(path: Path) -> str:
    """Where a file of the repository is on the site."""
    name = path.relative_to(ROOT).as_posix()
    return MOVED.get(name) or (
        name.removeprefix("docs/") if name.startswith("docs/") else f"files/{name}"
    )


def reference() -> str:
    """The public surface, whose docstrings mkdocstrings reads from the source, without running it.

    Verbs whose arguments are put together when the library is imported are written out here.
    """
    public = {  # functions first
        name: value
        for test in (inspect.isfunction, inspect.isclass)
        for name, value in sorted(vars(lowrank).items())
        if not name.startswith("_") and test(value)
    }
    parts = ["# Reference", "Everything at the door of `lowrank`, from its docstrings."]
    for name, value in public.items():
        parts.append(
            verb(name, value) if hasattr(value, "__signature__") else f"::: lowrank.{name}"
        )
    parts += [f"::: lowrank.train.{name.name}" for name in names("controllers")]
    return "\n\n".join([*parts, ""])


def verb(name: str, call: Any) -> str:
    """A function with its signature, and the sections of its docstring as lists."""
    given = inspect.signature(call).parameters.values()
    lines = [str(each.replace(annotation=each.empty)) for each in given]
    signature = "".join(f"    {line},\n" for line in lines)
    parts = [f"## lowrank.{name}", f"```python\n{name}(\n{signature})\n```"]
    text, *sections = re.split(r"^(Args|Returns|Raises):\n", inspect.getdoc(call) or "", flags=re.M)
    parts.append(text.strip())
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        items = re.split(r"^ {4}(?=\S)", body, flags=re.M)[1:]
        said = (" ".join(item.split()) for item in items)
        bullets = (re.sub(r"^([\w, ]+): ", r"`\1`: ", item) for item in said)
        parts += [f"**{title}**", "\n".join(f"- {bullet}" for bullet in bullets)]
    return "\n\n".join(parts)


def configuration(folder: Path) -> dict[str, Any]:
    """mkdocs.yml with its paths and the gallery filled in."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    gallery: list[Any] = ["gallery/index.md"]
    for kind in KINDS:
        entries = [{name.name: f"gallery/{kind}/{name.slug}.md"} for name in names(kind)]
        gallery.append({TITLES[kind]: entries})
    config["nav"] = list(_filled(config["nav"], gallery))
    config |= {"docs_dir": "docs", "site_dir": relpath(ROOT / "build" / "site", folder)}
    for plugin in config["plugins"]:
        if isinstance(plugin, dict) and "mkdocstrings" in plugin:
            plugin["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    return config


def _filled(nav: list[Any], gallery: list[Any]) -> Iterator[Any]:
    for entry in nav:
        yield {"Gallery": gallery} if entry == {"Gallery": "gallery/index.md"} else entry


def assemble(folder: Path) -> None:
    """Write all sources, from nothing: what is gone from docs/ is gone from the site."""
    shutil.rmtree(folder, ignore_errors=True)
    for place, content in written().items():
        target = folder / "docs" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_text(content, encoding="utf-8")
    config = yaml.safe_dump(configuration(folder), allow_unicode=True, sort_keys=False)
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    assemble(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "website"))
