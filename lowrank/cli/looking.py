"""inspect, eval, verify, bench, sweep, methods and demo, which change no model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..api.request import Sweeping
from ..diagnose import FeatureTable, Inspection
from ..errors import LowrankError
from ..methods import JOINT, METHODS
from ..policies import POLICIES
from . import inputs, layers, options
from .console import hushed, on_terminal, say, say_reasons, show, table_of
from .inputs import Length, Source
from .options import arguments_of

Reference = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Model to compare with, such as the dense one.",
        show_default=False,
    ),
]  # fmt: skip


def inspect_command(
    path: Source,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="Analyse the layers' outputs on this text, not only the weights. self: on text "
            "that a causal language model writes.",
        ),
    ] = None,
    length: Length = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features", help="Show what the layers read on TEXT: rank and zeros of its features."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot the spectra (PNG, SVG).", show_default=False),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save all figures (JSON).", show_default=False),
    ] = None,
    force: inputs.Force = False,
) -> None:
    """List every linear layer: effective rank, rank by energy, time.

    \b
      lowrank inspect PATH
      lowrank inspect PATH --data TEXT --json figures.json
      lowrank inspect PATH --data TEXT --plot spectra.png
      lowrank inspect PATH --data TEXT --features
    """
    from ..diagnose import inspect

    inputs.check_new(plot, json, force=force)
    if features and data in (None, "self"):
        raise LowrankError("--features shows what layers read on a text: add --data TEXT")
    text = inputs.read_data(data)
    model = inputs.load_model(path)
    rows = inputs.row_length(model, length, option="--length")
    batches: Any = data  # None, or "self"
    if text is not None:
        inputs.check_reads_tokens(model, "--data")
        batches = inputs.batches_of_text(text, path, rows)
    found: Inspection | FeatureTable
    if features:
        found = _show_features(model, batches)
    else:
        found = inspect(model, batches, length=rows, progress=on_terminal())
        say(_headline(model))
        show(table_of(layers.shown(found)))
        for line in layers.legend(found):
            say(line)
        say_reasons("left dense", ((site.title, site.reason) for site in found.sites))
    if plot is not None:
        from .. import plots

        draw: Any = plots.spectra if isinstance(found, Inspection) else plots.features
        draw(found).savefig(plot)
        say(f"wrote {plot}")
    if json is not None:
        json.write_text(found.to_json() + "\n", encoding="utf-8")
        say(f"wrote {json}")


def _show_features(model: Any, batches: Any) -> FeatureTable:
    from ..diagnose import features

    found = features(model, batches, progress=on_terminal())
    say(_headline(model))
    show(table_of([{k: v for k, v in row.items() if k != "reason"} for row in found.rows()]))
    for line in layers.FEATURES:
        say(line)
    say_reasons("not measured", ((site.title, site.reason) for site in found.sites))
    return found


def eval_command(
    path: Source,
    text: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Text to predict.", show_default=False)
    ] = None,
    reference: Reference = None,
    length: Length = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            show_default=False,
            help="Tasks of lm-eval, parted by commas (extra: lowrank[eval]).",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="INT", min=1, help="Examples of each task.", show_default=False),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(
            "--task-folder",
            metavar="FOLDER",
            show_default=False,
            help="Tasks of your own, as lm-eval's YAML files.",
        ),
    ] = None,
) -> None:
    """Measure perplexity on a text, KL from a reference model, and scores on tasks.

    \b
      lowrank eval out --text TEXT
      lowrank eval out --text TEXT --reference PATH
      lowrank eval out --tasks arc_easy,hellaswag --limit 200 --reference PATH
    """  # fmt: skip
    if text is None and tasks is None:
        raise LowrankError("nothing to measure: add --text TEXT or --tasks NAMES")
    names = [path] if reference is None else [path, reference]
    content = None if text is None else inputs.read_text(text)
    models = [inputs.load_model(name) for name in names]
    for model in models:
        inputs.check_reads_tokens(model, "eval", causal=True)
    if content is not None:
        _show_text(names, models, content, str(text), length)
    if tasks is not None:
        _show_tasks(names, models, tasks.split(","), limit, task_folder)


def _show_text(
    names: Sequence[str], models: Sequence[Any], content: str, source: str, length: int | None
) -> None:
    """Perplexity of each model, and the first one's KL from the second."""
    from ..measure.eval import kl, perplexity
    from ..measure.size import model_cost

    rows = min(inputs.row_length(model, length, option="--length") for model in models)
    tokenizer = inputs.load_tokenizer(names[0], "text")
    shown, table = on_terminal(), []
    for name, model in zip(names, models, strict=True):
        cost = model_cost(model, [])
        value = perplexity(model, tokenizer, content, length=rows, progress=shown)
        sizes = {"path": name, "parameters": f"{cost.params:,}", "bytes": f"{cost.bytes:,}"}
        table.append({**sizes, "perplexity": f"{value:.3f}", "KL": ""})
    if len(models) > 1:
        value = kl(models[0], models[1], content, tokenizer=tokenizer, length=rows, progress=shown)
        table[0]["KL"] = f"{value:.4f}"
    show(table_of(table))
    tokens = len(tokenizer(content, verbose=False)["input_ids"])
    say(f"{tokens:,} tokens of {source}, in rows of {rows}")
    if len(models) > 1:
        say("KL: divergence from the reference's predictions, in nats per token; 0 is equal")


def _show_tasks(
    names: Sequence[str],
    models: Sequence[Any],
    tasks: Sequence[str],
    limit: int | None,
    folder: Path | None,
) -> None:
    """Scores of each model, side by side."""
    from ..measure.tasks import task_scores

    tokenizer = inputs.load_tokenizer(names[0], "a task")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, model in zip(names, models, strict=True):
        with hushed():
            scores = task_scores(model, tokenizer, tasks, limit=limit, folder=folder)
        for score in scores:
            row = rows.setdefault(
                (score.task, score.metric), {"task": score.task, "metric": score.metric}
            )
            error = "" if score.error is None else f" ± {score.error:.4f}"
            row[name] = f"{score.value:.4f}{error}"
    show(table_of(list(rows.values())))
    if limit is not None:
        say(f"the first {limit} examples of each task; ±: standard error")


def bench_command(
    path: Source,
    reference: Reference = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            show_default=False,
            help="Random tokens in the one row to run; default 512, or the model's limit if lower.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="INT", help="Number of timings.", min=1)] = 15,
) -> None:
    """Measure time, MACs, parameters and memory of a forward pass.

    \b
      lowrank bench out
      lowrank bench out --reference PATH --tokens 128
    """
    from ..measure.bench import benchmark

    names = [path] if reference is None else [path, reference]
    models = [inputs.load_model(name) for name in names]
    for model in models:
        inputs.check_reads_tokens(model, "bench")
    count = min(inputs.row_length(m, tokens, default=512, option="--tokens") for m in models)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    measured = benchmark(models[0], {"input_ids": ids}, *models[1:], repeats=repeats)
    say(measured.head())
    show(table_of(measured.rows()))


def methods_command() -> None:
    """List the methods, and the policies that divide the budget."""
    rows, policies = [], []
    every: dict[str, Any] = {**METHODS, **JOINT}
    for name, maker in every.items():
        needs = "--data" if maker().needs else ""
        rows.append({"method": name, "needs": needs, "what it does": _summary(maker, every)})
    for name, policy in POLICIES.items():
        policies.append({"policy": name, "what it does": _first_line(policy)})
    show(table_of(rows))
    say()
    show(table_of(policies))


def demo_command(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Keep one of the models.", show_default=False
        ),
    ] = None,
    force: inputs.Force = False,
) -> int:
    """Compress and measure a small built-in model.

    \b
      lowrank demo
    """
    from ..demo import run_demo

    return run_demo(None if out is None else inputs.check_folder(out, force))


@arguments_of(Sweeping)
def sweep_command(
    path: Source,
    length: Length = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot size against loss (PNG, SVG).", show_default=False),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save figures and plans (JSON).", show_default=False),
    ] = None,
    force: inputs.Force = False,
    **chosen: Any,
) -> None:
    """Measure size against loss for several ratios; changes nothing.

    \b
      lowrank sweep PATH --data TEXT
      lowrank sweep PATH --ratios 0.9,0.7,0.5 --effort fast --plot front.png
      lowrank sweep PATH --ratios 0.8,0.6 --cache cache.safetensors
    """
    from ..api.sweeping import sweep

    keywords = options.keywords(chosen, Sweeping)
    inputs.check_new(plot, json, force=force)
    text, judge = inputs.read_data(chosen["data"]), chosen["judge"]
    judged = None if judge is None else inputs.read_text(judge)
    model = inputs.load_model(path)
    rows = inputs.row_length(model, length, option="--length")
    batches: Any = "default" if text is None else inputs.batches_of_text(text, path, rows)
    held_out = None if judged is None else inputs.batches_of_text(judged, path, rows)
    swept = sweep(model, data=batches, judge=held_out, progress=on_terminal(), **keywords)
    say(str(swept).partition("\n")[0])
    show(table_of(swept.rows()))
    if plot is not None:
        from ..plots import pareto

        pareto(swept.triples()).savefig(plot)
        say(f"wrote {plot}")
    if json is not None:
        json.write_text(swept.to_json() + "\n", encoding="utf-8")
        say(f"wrote {json}")


def verify_command(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of a saved model.", show_default=False)
    ],
) -> None:
    """Check a saved model's files: sizes, dtypes, ranges, finite numbers, checksum.

    \b
      lowrank verify out
    """
    from ..io import verify

    say(f"{folder}: {verify(folder)}")


COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect_command,
    "eval": eval_command,
    "verify": verify_command,
    "bench": bench_command,
    "sweep": sweep_command,
    "methods": methods_command,
    "demo": demo_command,
}


def _headline(model: Any) -> str:
    from ..measure.size import model_cost

    cost = model_cost(model, [])
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    return f"{type(model).__name__}: {cost.params:,} parameters, {cost.bytes:,} bytes, {dtypes}"


def _first_line(maker: Any) -> str:
    """First line of the docstring of the file that defines a method or policy."""
    return (sys.modules[maker.__module__].__doc__ or "").strip().partition("\n")[0]


def _summary(method: Any, every: Mapping[str, Any]) -> str:
    """First line of a method's file, or its own where the file holds several methods."""
    own = (method.__doc__ or "").strip().partition("\n")[0]
    alone = sum(other.__module__ == method.__module__ for other in every.values()) == 1
    return _first_line(method) if alone or own.startswith("Options") else own
