"""The command `lowrank`. Every error becomes one line on stderr here, and nowhere else."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import LowrankError
from . import changing, looking, reporting
from .console import complain, logged, one_line
from .launched import check_shared, joined

OVERVIEW = """Low-rank compression of neural networks and language models.

PATH is a folder with a transformers model, compressed or not, or a model name on the hub. TEXT is
a UTF-8 text file.

\b
  lowrank inspect PATH                        list layers and their effective ranks
  lowrank plan PATH --ratio 0.8               preview the compression; changes nothing
  lowrank sweep PATH --data TEXT              size against loss for several ratios
  lowrank report plan.json -o plan.html       draw a plan as an HTML page
  lowrank compress PATH --ratio 0.8 --effort fast --data TEXT --out out
  lowrank run recipe.yaml                     the same from a file; `out` holds one, too
  lowrank eval out --text TEXT --reference PATH
  lowrank verify out                          check the files of a saved model
  lowrank cut out --ratio 0.4 --out smaller   cut its ranks to a smaller ratio
  lowrank merge out --out dense               convert back to dense layers

Run lowrank COMMAND --help for details, or lowrank demo to try it on a small built-in model.
"""


ANYWHERE = ("--debug", "--verbose")  # flags of every command, at any position


class _Group(TyperGroup):
    """Turns exceptions into one line and an exit code, for the command line and for tests."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Exit with 0; 2 for errors the user can fix; 1 for all others; 130 if interrupted."""
        given = list(sys.argv[1:] if args is None else args)
        debug, verbose = (flag in given for flag in ANYWHERE)
        given = [word for word in given if word not in ANYWHERE]
        extra["standalone_mode"] = False
        try:
            with joined(), logged(verbose):
                code = super().main(given, *rest, **extra)
        except Exception as error:
            if debug:
                traceback.print_exc()
            sys.exit(_report(error))
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    """Print the error as one line; returns the exit code."""
    if isinstance(error, typer.Abort):
        return 130
    usage = getattr(error, "format_message", None)  # click's usage errors
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "lowrank")
        complain(f"{one_line(usage()).rstrip('.')} (see {command} --help)")
    elif isinstance(error, BrokenPipeError):
        return 1  # the reader of our output closed the pipe
    elif isinstance(error, LowrankError):
        complain(one_line(error))
    elif isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        complain(f"{error.strerror}{where}")
    elif isinstance(error, OSError):
        complain(one_line(error))
    else:
        what = one_line(error) or "no message"
        complain(f"{type(error).__name__}: {what} (--debug shows the traceback)")
        return 1
    return 2


app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    help=OVERVIEW,
    context_settings={"max_content_width": 100, "help_option_names": ["--help", "-h"]},
)
for _name, _command in {**changing.COMMANDS, **looking.COMMANDS, **reporting.COMMANDS}.items():
    app.command(_name)(_command)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say when each stage ends; allowed anywhere.")
    ] = False,
) -> None:
    if version:
        from .. import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        check_shared(context.invoked_subcommand)


def main() -> None:
    """Entry point of the command `lowrank`."""
    app()
