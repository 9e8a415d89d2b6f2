"""A plan or a report as one self-contained HTML page: figures and a sortable table.

The page loads nothing from elsewhere, which its content security policy forbids; all names are
escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from ..errors import LowrankError
from ..plans.entry import Entry, relative
from ..plans.plan import Plan
from ..plans.report import Measured, Report
from ..tables import Rows
from .figures import Layer, broken, errors, rank_map, sizes

COLUMNS = (
    "#",
    "layer",
    "shape",
    "method",
    "rank",
    "kept",
    "bytes",
    "planned",
    "measured",
    "reason",
)
WORDS = ("layer", "method", "reason")
Tables = Mapping[str, Rows]  # by heading

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<dl>{facts}</dl>
{notes}{figures}
<h2 id="title">Layers</h2>
<p class="hint">Click a column name to sort by it, click again to reverse the order. Errors are
relative: the square root of the share of energy lost.</p>
<p class="find" hidden><label for="find">Show layers with</label>
<input id="find" type="search" autocomplete="off" spellcheck="false" aria-controls="layers">
<output for="find" id="count"></output></p>
<div class="wide tall" id="tall" role="region" tabindex="0" aria-labelledby="title">
<table id="layers">
<caption class="unseen">Every layer: what becomes of it, and the error; columns sort</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<p class="unseen" role="status" id="sorted"></p>
{tables}</main>
<script>
{script}</script>
</body>
</html>
"""


def write(made: Plan | Report, path: str | Path, tables: Tables | None = None) -> None:
    """Write the page to a file.

    Args:
        tables: more of them by heading, such as {"Features": features.rows()}.

    Raises:
        LowrankError: `made` is not a Plan or Report, or its numbers are too large to draw.
    """
    # A name may hold what UTF-8 cannot encode: it becomes a character reference.
    Path(path).write_text(html(made, tables), encoding="utf-8", errors="xmlcharrefreplace")


def html(made: Plan | Report, tables: Tables | None = None) -> str:
    """The page as an HTML string; raises as `write`."""
    if not isinstance(made, Plan | Report):
        raise LowrankError(f"a page shows a Plan or a Report, got {type(made).__name__}")
    try:
        return _page(made, tables or {})
    except (OverflowError, ValueError) as error:
        raise LowrankError(f"the numbers of the plan cannot be drawn: {error}") from error


def read(path: str | Path) -> Plan | Report:
    """Read a plan or report that the command line wrote; a folder stands for its report.json.

    Raises:
        LowrankError: the file is neither; the message says why.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise LowrankError(f"there is no plan or report at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LowrankError(f"{path} is not UTF-8 text (byte {error.start})") from error
    # The format stands near the start, and a plan holds no report.
    return Report.from_json(text) if '"lowrank-report"' in text[:200] else Plan.from_json(text)


def _page(made: Plan | Report, tables: Tables) -> str:
    plan = made if isinstance(made, Plan) else made.plan
    measured = {} if isinstance(made, Plan) else {site.name: site for site in made.sites}
    layers = [_layer(entry, measured.get(entry.name)) for entry in plan.entries]
    title = f"Low-rank {'plan' if isinstance(made, Plan) else 'report'}: {plan.asked_text()}"
    notes = "" if isinstance(made, Plan) else "".join(f"<p>{escape(n)}</p>\n" for n in made.notes)
    folder = files("lowrank.page")
    columns = [c for c in COLUMNS if c != "measured" or not isinstance(made, Plan)]
    return _FRAME.format(
        title=escape(title),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        facts=_facts(_planned(made) if isinstance(made, Plan) else _achieved(made)),
        notes=notes + ("" if isinstance(made, Plan) else _table("Recovery", made.worth())),
        figures="\n".join(figure for figure in (rank_map(layers), errors(layers), sizes(layers))),
        head="".join(_heading(column) for column in columns),
        body="\n".join(_row(number, each, columns) for number, each in enumerate(layers, 1)),
        tables="".join(_table(heading, rows) for heading, rows in tables.items()),
    )


def _table(heading: str, rows: Rows) -> str:
    """Rows of text below a heading; empty without any. Columns without text are left out."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)] if rows else []
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(row[c])}</td>' for c in columns)}</tr>" for row in rows
    )
    return (
        f'<h2>{escape(heading)}</h2>\n<div class="wide" role="region" tabindex="0" '
        f'aria-label="{escape(heading)}"><table>\n'
        f'<caption class="unseen">{escape(heading)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _layer(entry: Entry, site: Measured | None) -> Layer:
    if site is not None and site.reason:
        entry = entry.left_dense(site.reason)
    return Layer(
        name=entry.title,
        shape=entry.shape,
        method=entry.method,
        size=entry.size,
        kept=entry.cost.params / max(entry.dense.params, 1),
        bytes_before=entry.dense.bytes,
        bytes_after=entry.cost.bytes,
        planned=_known(relative(entry.error, entry.total)),
        measured=None if site is None else _known(relative(site.measured, site.total)),
        reason=entry.reason,
    )


def _known(text: str) -> float | None:
    return float(text) if text else None


def _planned(plan: Plan) -> list[tuple[str, str]]:
    saved = [(e.dense.params - e.cost.params, e.dense.bytes - e.cost.bytes) for e in plan.entries]
    params, stored = (sum(column) for column in zip(*saved, strict=True)) if saved else (0, 0)
    return [
        *_shares(plan, plan.kept(), plan.kept_of_model()),
        ("parameters", f"{plan.model.params:,} → {plan.model.params - params:,}"),
        ("bytes", f"{plan.model.bytes:,} → {plan.model.bytes - stored:,}"),
        *_settings(plan, sum(e.size is not None for e in plan.entries)),
    ]


def _achieved(report: Report) -> list[tuple[str, str]]:
    factored = sum(not site.reason for site in report.sites)
    return [
        *_shares(report.plan, report.achieved, report.achieved_of_model),
        ("parameters", f"{report.params_before:,} → {report.params_after:,}"),
        ("bytes", f"{report.bytes_before:,} → {report.bytes_after:,}"),
        *_settings(report.plan, factored),
        ("time", f"{report.seconds:.1f} s"),
    ]


def _shares(plan: Plan, targets: float, model: float) -> list[tuple[str, str]]:
    asked, unit = plan.asked.get("ratio"), plan.unit
    return [
        ("asked", "ranks" if asked is None else f"{asked:g} of {plan.asked.get('of')}"),
        (f"kept of the targets' {unit}", f"{targets:.4f}"),
        (f"kept of the model's {unit}", f"{model:.4f}"),
    ]


def _settings(plan: Plan, factored: int) -> list[tuple[str, str]]:
    known = [("method", plan.method), ("policy", plan.settings.get("policy"))]
    tokens = plan.settings.get("tokens")
    known.append(("calibration tokens", f"{tokens:,}" if isinstance(tokens, int) else tokens))
    versions = plan.settings.get("versions")
    if isinstance(versions, dict):
        known.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    named = [(key, str(value)) for key, value in known if value is not None]
    return [("layers factored", f"{factored} of {len(plan.entries)}"), *named]


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    pairs = (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    return "".join(f"<div>{pair}</div>" for pair in pairs)


def _heading(column: str) -> str:
    kind = "text" if column in WORDS else "number"
    told = ' aria-label="number, in the model\'s order"' if column == "#" else ""
    return f'<th scope="col" class="{kind}"><button type="button"{told}>{column}</button></th>'


def _row(number: int, layer: Layer, columns: Sequence[str]) -> str:
    size: Sequence[int] = layer.size or ()
    texts: dict[str, tuple[str, float | None]] = {
        "#": (str(number), number),
        "layer": (layer.name, None),
        "shape": (f"{layer.shape[0]}×{layer.shape[1]}", layer.shape[0] * layer.shape[1]),
        "method": (layer.method, None),
        "rank": (", ".join(map(str, size)), size[0] if size else None),
        "kept": (f"{layer.kept:.3f}", layer.kept),
        "bytes": (f"{layer.bytes_after:,}", layer.bytes_after),
        "planned": ("" if layer.planned is None else f"{layer.planned:.4f}", layer.planned),
        "measured": ("" if layer.measured is None else f"{layer.measured:.4f}", layer.measured),
        "reason": (layer.reason, None),
    }
    cells = []
    for column in columns:
        text, value = texts[column]
        kind = "text" if column in WORDS else "number"
        sort = "" if value is None else f' data-value="{value:.12g}"'
        if column == "layer":
            cells.append(f'<th scope="row" class="{kind}">{broken(text)}</th>')
        else:
            cells.append(f'<td class="{kind}"{sort}>{escape(text)}</td>')
    return f"<tr>{''.join(cells)}</tr>"
