"""Checks a built site: links that lead nowhere, and whatever it would fetch from elsewhere.

python -m website.links build/site
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

# What a page loads by itself; a link that a reader has to click may lead anywhere.
LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}


@dataclass
class _Page(HTMLParser):
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        # "canonical" and the like are told, not loaded.
        if tag == "link" and {"stylesheet", "icon", "preload", "preconnect"} & set(
            given.get("rel", "").split()
        ):
            self.loaded.append(given.get("href", ""))
        self.loaded += [given[name] for kind, name in LOADED if kind == tag and name in given]


def problems(site: Path) -> list[str]:
    """Broken links and anchors, and files from other hosts, of every page of a built site."""
    pages = {path: _read(path) for path in sorted(site.resolve().rglob("*.html"))}
    found = [] if pages else [f"{site} has no page"]
    for path, page in pages.items():
        if path.name == "404.html":  # served from any place, so that its links begin at the root
            continue
        name = path.relative_to(site.resolve()).as_posix()
        found += [f"{name} loads {what}" for what in page.loaded if _elsewhere(what)]
        local = [link for link in page.links + page.loaded if not _elsewhere(link)]
        found += [f"{name} links {link}" for link in local if not _leads(path, link, pages)]
    return found


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _elsewhere(link: str) -> bool:
    return link.startswith(("http:", "https:", "//", "mailto:"))


def _leads(path: Path, link: str, pages: dict[Path, _Page]) -> bool:
    file, anchor = urldefrag(unquote(link))
    target = (path.parent / file).resolve() if file else path
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return False
    return not anchor or target not in pages or anchor in pages[target].anchors


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "every link leads somewhere, and nothing is loaded from elsewhere")
    sys.exit(bool(wrong))
