"""The command line: every command is a call into the library and a line of output."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from postmortem.errors import PostmortemError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Reproducible failure analysis for LoRA adapters."""


class Format(StrEnum):
    """How a report is written."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


@app.command()
def check(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Adapter folders or hub ids.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A model folder, a config.json, a hub id or a known base.")
    ] = None,
    header_only: Annotated[bool, typer.Option(help="Do not read tensor bytes.")] = False,
    output: Annotated[
        Format, typer.Option("--format", help="How to write the report.")
    ] = Format.TEXT,
    stated_mb: Annotated[
        float | None, typer.Option(help="The size in MB at which the adapter was published.")
    ] = None,
    explain: Annotated[str | None, typer.Option(help="Explain a finding by its id.")] = None,
) -> None:
    """Check adapters against their base. Exit 0: no error found; 1: an error; 2: not checkable."""
    from postmortem import report
    from postmortem.catalogue import find_entry
    from postmortem.inspection import inspect_all

    if explain is not None:
        print(report.explain(find_entry(explain)))
        return
    stated = None if stated_mb is None else int(stated_mb * 1e6)
    done, refused = inspect_all(adapters or [], base, header_only=header_only, stated_bytes=stated)
    if output is Format.JSON and done:
        print(report.as_json(done))
    for inspection in done:
        if output is Format.MARKDOWN:
            print(report.as_markdown(inspection))
        if output is Format.TEXT:
            print(report.as_text(inspection, is_coloured=sys.stdout.isatty()))
    if refused:
        raise refused[0]
    if any(inspection.report.verdict == "broken" for inspection in done):
        raise typer.Exit(1)


@app.command()
def identify(adapter: Annotated[str, typer.Argument(help="An adapter folder or hub id.")]) -> None:
    """List the known bases that the adapter's shapes fit, and why the others do not."""
    from postmortem import report
    from postmortem.adapter import read_adapter
    from postmortem.identify import identify as identify_adapter
    from postmortem.sources import open_source

    print(report.as_identification(identify_adapter(read_adapter(open_source(adapter)))))


@app.command()
def archaeology(
    source: Annotated[Path, typer.Argument(help="An adapter_config.json, its folder, or a log.")],
) -> None:
    """Date an adapter: the PEFT releases that can have written and loaded it."""
    from postmortem import report
    from postmortem.archaeology import date_config, date_warning, find_warnings
    from postmortem.inspection import read_config_or_log

    config, log = read_config_or_log(source)
    if config is not None:
        print(report.as_dating(date_config(config)))
    for names in find_warnings(log):
        print(report.as_encounters(names, date_warning(names)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a `PostmortemError` becomes one clear message and its exit code."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except PostmortemError as error:
        print(f"postmortem: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
