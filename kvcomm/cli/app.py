"""The entry point of the `kvcomm` command: subcommands, exit codes, and one place for errors.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted. Every error of kvcomm's own family is
one line on stderr (with `--json` one JSON object); anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kvcomm import __version__
from kvcomm.cli import anchors, bench, context, doctor, model, segment, serve, snapshot, tier
from kvcomm.cli import run as run_cli
from kvcomm.cli import top as top_cli
from kvcomm.cli import tune as tune_cli
from kvcomm.cli.output import emit_error
from kvcomm.errors import InvalidRequest, KVCommError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="kvcomm",
    help="Serve teams of LLM agents that share one model's KV cache: what one of them has read is not computed again.",
    epilog="To begin: `kvcomm doctor`, then `kvcomm run --help`. `kvcomm COMMAND --help` explains a command; --json "
    "makes any of them print JSON.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run", epilog=run_cli.EPILOG)(run_cli.run)
app.add_typer(context.app, name="context")
app.add_typer(segment.app, name="segment")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(anchors.app, name="anchors")
app.add_typer(tier.app, name="tier")
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
app.add_typer(serve.app, name="serve")
app.command("top", epilog=top_cli.EPILOG)(top_cli.top)
app.command("doctor")(doctor.doctor)
app.command("tune", epilog=tune_cli.EPILOG)(tune_cli.tune)


def main() -> None:
    """Run the command line of this process; always ends in SystemExit."""
    # Before anything imports torch: with two or more threads that spin, a second process starves this one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed, not raised."""
    as_json = "--json" in arguments
    try:
        result = app(list(arguments), prog_name="kvcomm", standalone_mode=False)
    except typer.TyperException as error:
        if message := error.format_message():  # empty where the help was printed instead
            emit_error("UsageError", message, as_json=as_json)
        return error.exit_code
    except KVCommError as error:
        emit_error(type(error).__name__, str(error), as_json=as_json)
        return EXIT_USAGE if isinstance(error, InvalidRequest) else EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcomm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Agents that share one model's KV cache."""
