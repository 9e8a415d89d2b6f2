"""inspect, eval, bench, methods and demo: they write nothing but, where asked, the demo's model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import LowrankError
from ..methods import JOINT, METHODS
from ..policies import POLICIES
from . import inputs, layers
from .console import on_terminal, say, say_reasons, show, table
from .inputs import Length, Source

Reference = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Another model to compare with, such as the dense one.",
        show_default=False,
    ),
]  # fmt: skip


def inspect(
    path: Source,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="Weigh the energy by the layers' inputs on this text: how the outputs change. "
            "self: on what a causal language model writes.",
        ),
    ] = None,
    length: Length = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all figures here.", show_default=False),
    ] = None,
    force: inputs.Force = False,
) -> None:
    """List every linear layer: how low its rank is, which rank would keep its energy, its time.

    \b
      lowrank inspect PATH
      lowrank inspect PATH --data TEXT --json figures.json
    """
    from ..diagnose import inspect as look

    if json is not None and json.exists() and not force:
        raise LowrankError(f"{json} exists: choose another name, or add --force")
    text = inputs.read_data(data)
    model = inputs.load_model(path)
    rows = inputs.row_length(model, length, option="--length")
    batches: Any = data  # none, or what the model writes
    if text is not None:
        inputs.check_reads_tokens(model, "--data")
        batches = inputs.text_batches(text, path, rows)
    found = look(model, batches, length=rows, progress=on_terminal())
    say(_headline(model))
    show(table(layers.shown(found)))
    for line in layers.legend(found):
        say(line)
    say_reasons("left dense", ((site.title, site.reason) for site in found.sites))
    if json is not None:
        json.write_text(found.to_json() + "\n", encoding="utf-8")
        say(f"wrote {json}")


def evaluate(
    path: Source,
    text: Annotated[
        Path, typer.Option(metavar="TEXT", help="Text to be predicted.", show_default=False)
    ],
    reference: Reference = None,
    length: Length = None,
) -> None:
    """Perplexity on a text, and KL divergence from another model.

    \b
      lowrank eval out --text TEXT
      lowrank eval out --text TEXT --reference PATH
    """
    from ..api.request import model_cost
    from ..eval import kl, perplexity

    content = inputs.read_text(text)
    names = [path] if reference is None else [path, reference]
    models = [inputs.load_model(name) for name in names]
    for model in models:
        inputs.check_reads_tokens(model, "eval", causal=True)
    rows = min(inputs.row_length(model, length, option="--length") for model in models)
    tokenizer = inputs.load_tokenizer(path, "text")
    shown, found = on_terminal(), []
    for name, model in zip(names, models, strict=True):
        cost = model_cost(model, [])
        value = perplexity(model, tokenizer, content, length=rows, progress=shown)
        sizes = {"path": name, "parameters": f"{cost.params:,}", "bytes": f"{cost.bytes:,}"}
        found.append({**sizes, "perplexity": f"{value:.3f}", "KL": ""})
    if reference is not None:
        one, other = models
        away = kl(one, other, content, tokenizer=tokenizer, length=rows, progress=shown)
        found[0]["KL"] = f"{away:.4f}"
    show(table(found))
    tokens = len(tokenizer(content, verbose=False)["input_ids"])
    say(f"{tokens:,} tokens of {text}, in rows of {rows}")
    if reference is not None:
        say("KL: nats per token by which the predictions differ from the reference's; 0 is equal")


def bench(
    path: Source,
    reference: Reference = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            show_default=False,
            help="Random tokens in the one row that is run; 512 if not given, or less for a small "
            "model.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(metavar="INT", help="Times are taken this often.", min=1)
    ] = 15,
) -> None:
    """Time, MACs, parameters and memory of one forward pass.

    \b
      lowrank bench out
      lowrank bench out --reference PATH --tokens 128
    """
    from ..bench import benchmark

    names = [path] if reference is None else [path, reference]
    models = [inputs.load_model(name) for name in names]
    for model in models:
        inputs.check_reads_tokens(model, "bench")
    count = min(inputs.row_length(m, tokens, default=512, option="--tokens") for m in models)
    words = min(model.config.get_text_config().vocab_size for model in models)
    ids = torch.randint(words, (1, count), generator=torch.Generator().manual_seed(0))
    found = benchmark(models[0], {"input_ids": ids}, *models[1:], repeats=repeats)
    say(found.head())
    show(table(found.rows()))


def methods() -> None:
    """List the methods, and the policies that share out the budget."""
    ways, policies = [], []
    every: dict[str, Any] = {**METHODS, **JOINT}
    for name, way in every.items():
        needs = "--data" if way().needs else ""
        ways.append({"method": name, "needs": needs, "what it does": _first_line(way)})
    for name, policy in POLICIES.items():
        policies.append({"policy": name, "what it does": _first_line(policy)})
    show(table(ways))
    say()
    show(table(policies))


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Keep one of the models here.", show_default=False
        ),
    ] = None,
    force: inputs.Force = False,
) -> int:
    """Compress a small model that comes with lowrank, and measure it.

    \b
      lowrank demo
    """
    from ..demo import run

    return run(None if out is None else inputs.check_folder(out, force))


COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "eval": evaluate,
    "bench": bench,
    "methods": methods,
    "demo": demo,
}


def _headline(model: Any) -> str:
    from ..api.request import model_cost

    cost = model_cost(model, [])
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    return f"{type(model).__name__}: {cost.params:,} parameters, {cost.bytes:,} bytes, {dtypes}"


def _first_line(made: Any) -> str:
    """Of the docstring of the file that a method or policy stands in."""
    return (sys.modules[made.__module__].__doc__ or "").strip().partition("\n")[0]
