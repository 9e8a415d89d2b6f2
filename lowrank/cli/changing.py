"""plan, compress and merge, and recipes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..api.from_disk import room_for, working_in, write
from ..api.request import Compression, Request
from ..api.resuming import unfinished_at
from ..calibration.self_written import writes
from ..calibration.statistics import SELF, Calibration, calibrate
from ..errors import LowrankError
from ..plans.estimates import GIB
from ..plans.report import Report
from ..plans.stages import recording, stage
from ..tables import aligned
from . import inputs, launched, options, recipes
from .console import hushed, on_terminal, say, say_reasons, show
from .inputs import Force, Length, Out, Source
from .options import arguments_of


@arguments_of(Request)
def plan_command(
    path: Source,
    length: Length = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Save the plan (JSON).", show_default=False
        ),
    ] = None,
    force: Force = False,
    **chosen: Any,
) -> None:
    """Plan the compression of every layer; changes nothing.

    \b
      lowrank plan PATH --ratio 0.8
      lowrank plan PATH --ratio 0.6 --policy energy --data TEXT -o plan.json
      lowrank compress PATH --plan plan.json --data TEXT --out out
    """
    from ..api import plan

    keywords, data = options.keywords(chosen, Request), chosen["data"]
    text = inputs.read_data(data)
    if out is not None and out.exists() and not force:
        raise LowrankError(f"{out} exists: choose another name, or add --force")
    model = launched.placed(inputs.load_model(path))
    methods = [chosen["method"]] if chosen["method"] else []
    batches = _calibration(model, path, text, chosen, length, methods, chosen["seed"] or 0)
    _drop_spent_rows(keywords, batches)
    planned = plan(model, **keywords, data=batches, progress=on_terminal())
    show(planned)
    say(f"keeps {planned.kept():.4f} of the targets' {planned.unit}, "
        f"{planned.kept_of_model():.4f} of the model's")  # fmt: skip
    if planned.settings.get("data"):
        say(f"calibrated on {planned.settings['data']}")
    if out is not None:
        if launched.writes():
            planned.save(out)
        again = "" if data is None else f" --data {data}"
        again += "" if length is None else f" --length {length}"
        again += "" if chosen["rows"] is None else f" --rows {chosen['rows']}"
        say(f"wrote {out}; apply it with: lowrank compress {path} --plan {out}{again} --out out")


@arguments_of(Compression)
@recording()
def compress_command(
    path: Source,
    out: Out,
    length: Length = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE", help="Apply a plan saved by lowrank plan.", show_default=False
        ),
    ] = None,
    force: Force = False,
    from_disk: Annotated[
        bool | None,
        typer.Option(
            "--from-disk/--in-memory",
            show_default=False,
            help="Keep weights, factors and statistics in files, or in memory. Default: in files "
            "where they would take more than half of the memory.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print parameters, memory, disk, FLOPs and time to be expected, and stop there.",
        ),
    ] = False,
    **chosen: Any,
) -> None:
    """Factor the layers of a model, and save it.

    \b
      lowrank compress PATH --ratio 0.8 --effort fast --data TEXT --out out
      lowrank compress PATH --ratio 0.8 --effort fast --out out
      lowrank compress PATH --rank 32 --target q_proj --target k_proj --out out
      lowrank compress PATH --plan plan.json --out out
      lowrank compress PATH --ratio 0.8 --effort fast --out out --dry-run
    """
    from ..api.verbs import compress, into_folder

    if dry_run and saved is not None:
        raise LowrankError("--dry-run estimates from --ratio or --rank, not from a plan: drop one")
    plan = None if saved is None else options.saved_plan(saved, chosen)
    keywords = {} if plan is not None else options.keywords(chosen, Compression)
    text = inputs.read_data(chosen["data"])
    inputs.check_folder(out, force, source=path)
    if dry_run:
        _estimate(path, keywords, text, length, out)
        return
    with stage("loading"):
        model = inputs.load_model(path)
    methods = [chosen["method"]] if chosen["method"] else []
    seed = chosen["seed"] or 0
    if plan is not None:
        methods, seed = options.used_by(plan), plan.seed
    room = room_for(model)
    why = str(room)
    if from_disk is not None:
        room = replace(room, in_memory=not from_disk)
        why = f"{room.places[room.in_memory]}, as asked"
    if not room.in_memory:
        say(f"runs {why}")
        if unfinished_at(out).exists():
            say(f"goes on with the unfinished work in {unfinished_at(out)}")
    model = launched.placed(model) if room.in_memory else model
    with nullcontext() if room.in_memory else working_in(out.parent):
        batches = _calibration(model, path, text, chosen, length, methods, seed)
    if plan is not None:
        keywords = {"ratio": plan, "rows": chosen["rows"]}
    _drop_spent_rows(keywords, batches)
    keywords |= {"data": batches, "progress": on_terminal()}
    tokenizer = inputs.load_tokenizer(path)
    if room.in_memory:
        model, report = compress(model, **keywords)
        if launched.writes():
            with hushed():
                report = write(model, report, path, out, tokenizer=tokenizer)
    else:
        with hushed():
            report = into_folder(model, path, out, Compression(**keywords, tokenizer=tokenizer))
    if launched.writes():
        saved_as = None if saved is None else str(saved)
        recipe = recipes.Recipe(path, "", saved_as, length, not room.in_memory, chosen)
        recipes.write(out, recipe)
        _tell(report, path, out, has_tokenizer=tokenizer is not None)
    if room.in_memory:
        say(f"ran {why}")


def run_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="YAML file, or a folder that holds one.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Output folder, if not in the recipe.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Compress as a recipe says.

    \b
      lowrank run recipe.yaml
      lowrank run out --out again          # what made `out`, again
    """  # fmt: skip
    recipe = recipes.read(file)
    if out is None and not recipe.out:
        raise LowrankError(f"{file} says no `out`: add --out FOLDER")
    compress_command(
        recipe.model, out or Path(recipe.out),
        length=recipe.length, saved=None if recipe.plan is None else Path(recipe.plan),
        force=force, from_disk=recipe.from_disk, dry_run=False, **recipe.chosen,
    )  # fmt: skip


def recipe_command(path: Source) -> None:
    """Print the recipe of a compressed model.

    \b
      lowrank recipe out > recipe.yaml
    """
    recipes.read(Path(path))
    say((Path(path) / recipes.FILE).read_text(encoding="utf-8").rstrip())


def merge_command(
    path: Source,
    out: Out,
    force: Force = False,
) -> None:
    """Merge factored layers into dense ones, to load without lowrank.

    \b
      lowrank merge out --out dense
    """
    from ..io import export
    from ..io.declaration import is_compressed

    inputs.check_folder(out, force, source=path)
    model = inputs.load_model(path)
    if not is_compressed(model):
        raise LowrankError(f"{path} has no factored layers: it is dense already")
    with hushed():
        export(model, out, "dense", tokenizer=inputs.load_tokenizer(path))
    say(f"wrote {out}: an ordinary {type(model).__name__}, which loads without lowrank")


def cut_command(
    path: Source,
    ratio: Annotated[float, typer.Option("--ratio", metavar="R", help="Share kept, in (0, 1).")],
    out: Out,
    force: Force = False,
) -> None:
    """Cut the ranks of a compressed model to a smaller ratio; decomposes nothing.

    \b
      lowrank cut out --ratio 0.6 --out smaller
    """
    from ..api.cutting import at_rank
    from ..io import save

    inputs.check_folder(out, force, source=path)
    with hushed():
        model, report = at_rank(inputs.load_model(path), ratio)
        save(model, out, tokenizer=inputs.load_tokenizer(path))
    show(report)
    say(f"wrote {out}: keeps {report.achieved:.4f} of the targets' parameters")


COMMANDS: dict[str, Callable[..., Any]] = {
    "plan": plan_command,
    "compress": compress_command,
    "cut": cut_command,
    "merge": merge_command,
    "run": run_command,
    "recipe": recipe_command,
}


def _estimate(
    path: str, keywords: dict[str, Any], text: str | None, length: int | None, out: Path
) -> None:
    """Print what compress would take."""
    from ..api.estimating import estimated
    from ..io import skeleton

    where, rows = inputs.located(path), None
    with hushed():
        model = skeleton(where)
        cut = inputs.row_length(model, length, option="--length")
        if text is not None:
            rows = sum(len(batch) for batch in inputs.batches_of_text(text, path, cut))
            rows = min(rows, keywords.get("rows") or rows)
        expected = estimated(where, Compression(**keywords).request(), rows, cut)
    say(str(expected))
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    say(f"{shutil.disk_usage(place).free / GIB:.2f} GiB of disk are free at {place}")


def _calibration(
    model: Any,
    path: str,
    text: str | None,
    chosen: Mapping[str, Any],
    length: int | None,
    methods: Sequence[str],
    seed: int,
) -> Any:
    """The value of data= for a verb; always checks the row length.

    Raises:
        LowrankError: one of the `methods` needs a text, and there is none.
    """
    data = chosen["data"]
    rows, needing = inputs.row_length(model, length, option="--length"), options.needs_data(methods)
    if text is not None:
        inputs.check_reads_tokens(model, "--data")
        return inputs.batches_of_text(text, path, rows)
    if not writes(model) and (needing or data is not None):
        why = f"{type(model).__name__} cannot write its own calibration text"
        raise LowrankError(f"{why}{needing and f', and {needing} needs one'}: add --data TEXT")
    unused = bool(methods) and not needing
    if data is None and (length is None or unused or not writes(model)):
        return "default"
    with stage("calibration"):
        return calibrate(
            model, SELF, length=rows, rows=chosen["rows"], seed=seed, progress=on_terminal()
        )


def _drop_spent_rows(keywords: dict[str, Any], data: Any) -> None:
    """A calibration was made with --rows already."""
    if isinstance(data, Calibration):
        keywords.pop("rows", None)


def _tell(report: Report, path: str, out: Path, *, has_tokenizer: bool) -> None:
    """Print the summary and next steps."""
    for line in [*report.summary(), *aligned(report.times()), *aligned(report.worth())]:
        say(line)
    say_reasons("left dense", ((row["site"], row["reason"]) for row in report.rows()))
    say()
    say(f"wrote {out}; its README.md and report.json list every layer")
    say(f'load:      import lowrank; model = lowrank.from_pretrained("{out}")')
    say(f"evaluate:  lowrank eval {out} --text TEXT --reference {path}")
    if not has_tokenizer:
        say(f"note:      {path} has no tokenizer, so none was saved")
