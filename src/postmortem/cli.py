"""The command line: every command is a call into the library and a line of output."""

import sys
from collections.abc import Sequence

import typer

from postmortem.errors import PostmortemError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Reproducible failure analysis for LoRA adapters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a `PostmortemError` becomes one clear message and its exit code."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except PostmortemError as error:
        print(f"postmortem: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
