"""The pages of the gallery, as Markdown by path below docs/: one a name, and an overview."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import texts
from .engines import TOOLS, VLLM, support
from .figures import EQUAL_BYTES, EQUAL_PARAMETERS, KL, READERS, TOP1, Figure, figures
from .names import KINDS, Name, names
from .pareto import PLOTS
from .texts import ROOT, Text

TITLES = {
    "methods": "Methods",
    "policies": "Policies",
    "efforts": "Efforts",
    "forms": "Stored forms",
    "controllers": "Controllers",
}
SHOWN = (VLLM, TOOLS["ONNX"], TOOLS["int8"], TOOLS["LoRA, merge"])  # for each method
# Columns of the overview: what they are called, the figures that they show, and at which ratios.
MEASURED = (
    ("KL, stories260K, .8 / .6 / .4", "stories260K", EQUAL_PARAMETERS, KL, (0.8, 0.6, 0.4)),
    ("KL, embedded model, .8 / .6 / .4", "embedded model", EQUAL_PARAMETERS, KL, (0.8, 0.6, 0.4)),
    ("KL at equal bytes, embedded, .8 / .5 / .3", "embedded model", EQUAL_BYTES, KL,
     (0.8, 0.5, 0.3)),
    ("top-1 ResNet-20, .7 / .5 / .3", "ResNet-20", EQUAL_PARAMETERS, TOP1, (0.7, 0.5, 0.3)),
)  # fmt: skip
OVERVIEW = """---
hide: [toc]
---

# Gallery

One page a name: its idea, formula and paper, when to use it and when not, what was measured beside
what the paper claims, and what serves the result. Everything measured comes from
`benchmarks/results`, everything about tools from `benchmarks/results/matrix.json`; a name without
figures has none there yet. All models are small and all runs are on a CPU
([what they are](../results.md)).
"""


def pages() -> dict[str, str]:
    """Markdown by path below docs/."""
    measured, engines = figures(), support()
    found = {"gallery/index.md": overview(measured, engines)}
    for name in names():
        found[f"gallery/{name.kind}/{name.slug}.md"] = page(
            name, texts.read(name), own(name, measured), engines
        )
    return found


def own(name: Name, measured: Iterable[Figure]) -> list[Figure]:
    return [figure for figure in measured if (figure.kind, figure.name) == (name.kind, name.name)]


def page(
    name: Name, text: Text, measured: Sequence[Figure], engines: dict[str, dict[str, str]]
) -> str:
    """The page of one name."""
    parts = [
        f"# {name.name}",
        text.idea,
        f'<div class="facts" markdown>\n\n{table(("", ""), facts(name, text))}\n\n</div>',
    ]
    parts += [f"## {section}\n\n{said}" for section, said in text.sections.items()]
    parts.append("## Measured")
    if "Claim" in text.fields:
        parts.append(f"*The paper*: {text.fields['Claim']}")
    parts.append(
        rows_of(measured) if measured else "There are no figures of it in benchmarks/results yet."
    )
    forms = [name.name] if name.kind == "forms" else text.forms
    if forms:
        parts += ["## Runs in", tools(forms, engines, up="../")]
    if name.docstring:
        parts += ["## In the source", f"`{name.source}` begins:", f"```text\n{name.docstring}\n```"]
    return "\n\n".join(parts) + "\n"


def facts(name: Name, text: Text) -> list[tuple[str, str]]:
    rows = [("Formula", text.fields["Formula"]), ("Paper", text.fields["Paper"])]
    if name.kind == "methods":
        rows += [("Needs", name.needs), ("Layers", name.layers)]
        rows.append(("Stored as", ", ".join(link(form, "forms", up="../") for form in text.forms)))
    if name.kind == "forms":
        assert name.cls is not None
        storage = name.cls.STORAGE  # type: ignore[attr-defined]
        rows.append(("Layers", name.layers))
        rows.append(("Name in plans", f"`{storage}`" if storage else "none of its own"))
        rows.append(("Size", ", ".join(name.cls.SIZE)))  # type: ignore[attr-defined]
    return rows


def rows_of(measured: Sequence[Figure]) -> str:
    """All figures of a name, a row for those of one file, model and setting."""
    groups: dict[tuple[str, ...], list[Figure]] = {}
    for one in measured:
        key = (one.model, one.setting, one.measure, one.file)
        groups.setdefault(key, []).append(one)
    rows = []
    for (model, setting, measure, file), ones in groups.items():
        script = READERS[file][1] if file in READERS else writer(file)
        values = ", ".join(f"{one.keep:.2g}: **{number(one.value, measure)}**" for one in ones)
        source = f"[{file}](../../files/benchmarks/results/{file}), by `{script}`"
        rows.append((model, setting, measure, values, longest(ones), source))
    return table(
        ("model", "share of what", "measure", "share: value", "seconds, at most", "from"), rows
    )


def writer(file: str) -> str:
    """The script that wrote figures as they stand: it has the name of its file or folder."""
    script = f"{file.partition('/')[0].removesuffix('.json')}.py"
    folder = "benchmarks" if (ROOT / "benchmarks" / script).is_file() else "recipes"
    return f"{folder}/{script}"


def number(value: float, measure: str) -> str:
    return f"{value:.1f}" if measure == TOP1 else f"{value:.3g}"


def tools(forms: Sequence[str], engines: dict[str, dict[str, str]], *, up: str) -> str:
    """A row a form; a form that no check tried says so."""
    columns = (*TOOLS.values(), VLLM)
    rows = []
    for form in forms:
        cells = engines.get(form, {})
        rows.append(
            (link(form, "forms", up=up), *(cells.get(tool, "not tried") for tool in columns))
        )
    return table(("form", *columns), rows)


def link(name: str, kind: str, *, up: str) -> str:
    return f"[{name}]({up}{kind}/{name.replace(':', '-')}.md)"


def overview(measured: Sequence[Figure], engines: dict[str, dict[str, str]]) -> str:
    """Tables of all names, and size against loss."""
    parts = [OVERVIEW]
    for plot in PLOTS:
        parts.append(f"![{plot.alt}]({plot.file})\n\n*{plot.title}.* {plot.caption}")
    for kind in KINDS:
        rows = summary(kind, measured, engines)
        parts += [f"## {TITLES[kind]}", f'<div class="overview" markdown>\n\n{rows}\n\n</div>']
    return "\n\n".join(parts) + "\n"


def summary(kind: str, measured: Sequence[Figure], engines: dict[str, dict[str, str]]) -> str:
    """One table for all names of a kind; columns that would be empty are left out."""
    if kind == "forms":
        return tools([name.name for name in names("forms")], engines, up="")
    rows = []
    for name in names(kind):
        text = texts.read(name)
        row = [link(name.name, kind, up=""), text.idea]
        if kind == "methods":
            row += [name.needs, name.layers]
            row += [best(text.forms, tool, engines) for tool in SHOWN]
        if kind != "controllers":
            row += [cell(own(name, measured), *column[1:]) for column in MEASURED]
            row.append(longest(own(name, measured)))
        rows.append(tuple(row))
    head = ["", "idea"]
    if kind == "methods":
        head += ["needs", "layers", *SHOWN]
    if kind != "controllers":
        head += [column[0] for column in MEASURED] + ["seconds, at most"]
    return table(*without_empty(head, rows))


def best(forms: Sequence[str], tool: str, engines: dict[str, dict[str, str]]) -> str:
    """Whether a tool takes any form of a method."""
    said = [engines.get(form, {}).get(tool, "not tried") for form in forms]
    return next((each for each in said if each == "yes"), said[0])


def cell(
    measured: Sequence[Figure], model: str, setting: str, measure: str, keeps: Sequence[float]
) -> str:
    """The values at some ratios, " / " between them; policies are shown with `whitened`."""
    settings = (setting, f"{setting}, with whitened")
    values = []
    for keep in keeps:
        fitting = [
            one
            for one in measured
            if (one.model, one.measure, one.keep) == (model, measure, keep)
            and one.setting in settings
        ]
        values.append(number(fitting[0].value, measure) if fitting else "–")
    return "\u00a0/\u00a0".join(values) if set(values) != {"–"} else ""


def longest(measured: Sequence[Figure]) -> str:
    seconds = [one.seconds for one in measured if one.seconds is not None]
    return f"{max(seconds):.3g}" if seconds else ""


def without_empty(
    head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    used = [index for index in range(len(head)) if any(row[index] for row in rows)]
    return [head[index] for index in used], [[row[index] for index in used] for row in rows]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A bar inside of a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
