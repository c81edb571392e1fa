"""The command line: `check` at once, as commit hooks call it, all other commands by `commands`."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from postmortem.checker import checks as report
from postmortem.checker.errors import PostmortemError, find_entry
from postmortem.checker.serving import Serving

FORMATS = ("text", "json", "markdown", "sarif", "junit")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a `PostmortemError` becomes one clear message and its exit code.

    So does a library that is missing because its extra was not installed.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if given[:1] == ["check"]:
            raise SystemExit(_check(describe_check().parse_intermixed_args(given[1:])))
        # What describes the other commands takes longer to load than a check takes.
        from postmortem.commands import app

        app(args=given)
    except PostmortemError as error:
        print(f"postmortem: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except ModuleNotFoundError as error:
        extra = _find_extra(error.name or "")
        if not extra:
            raise
        wanted = f"pip install 'lora-postmortem[{extra}]'"
        print(
            f"postmortem: this command needs {error.name}, which the extra `{extra}` brings. "
            f"Install it: {wanted}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def describe_check() -> ArgumentParser:
    """The arguments of `postmortem check`."""
    parser = ArgumentParser(
        "postmortem check",
        description="Check adapters against their base.",
        epilog="Exit 0: no error found; 1: an error; 2: not checkable.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER", help="Adapter folders or hub ids.")
    add("--base", help="A model folder, a config.json, a hub id or a known base.")
    add("--header-only", action="store_true", help="Do not read tensor bytes.")
    add("--format", choices=FORMATS, default="text", help="How to write the report.")
    add("--stated-mb", type=float, help="The size in MB at which the adapter was published.")
    add("--strict", action="store_true", help="Exit 2 where shapes were compared with no base.")
    add("--explain", metavar="ID", help="Explain a finding by its id.")
    add("--fix", metavar="OUT", help="Write a new folder with what is mechanical mended.")
    _add_serving(parser)
    return parser


def _add_serving(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("serving", "what a runtime does with the adapter")
    add = group.add_argument
    help_ = "vllm, sglang, llama.cpp, tgi, ollama, tensorrt-llm, mlx-lm or all; may be repeated."
    add("--for", action="append", default=[], dest="runtimes", metavar="RUNTIME", help=help_)
    add("--max-lora-rank", type=int, metavar="N", help="vLLM's highest rank; 16 by default.")
    help_ = "A module that vLLM is told to adapt; may be repeated."
    add("--lora-target-modules", action="append", default=[], metavar="NAME", help=help_)
    help_ = "Devices that share a layer; TGI pads ranks by them."
    add("--tensor-parallel", type=int, default=1, metavar="N", help=help_)
    add("--tower-lora", action="store_true", help="vLLM's enable_tower_connector_lora is set.")


def _check(options: Namespace) -> int:
    if options.explain is not None:
        print(report.explain(find_entry(options.explain)))
        return 0
    serving = Serving(
        tuple(options.runtimes),
        max_lora_rank=options.max_lora_rank,
        target_modules=tuple(options.lora_target_modules),
        tensor_parallel=options.tensor_parallel,
        tower_lora=options.tower_lora,
    )
    fixed = None
    if options.fix is not None:
        # What mends an adapter needs torch, and a check does not.
        from postmortem.models.repair import repair, request

        fixed = request(options.adapters, options.fix, form=options.format, base=options.base)
    inspections = report.inspect_all(
        options.adapters,
        options.base,
        header_only=options.header_only,
        stated_bytes=None if options.stated_mb is None else int(options.stated_mb * 1e6),
        serving=serving,
    )
    written = report.write(inspections, options.format, is_coloured=sys.stdout.isatty())
    if written:
        print(written)
    for error in (i.error for i in inspections if i.error is not None):
        raise error
    if fixed is not None:
        repaired = repair(fixed, serving=serving)
        print(f"\n{repaired.text}")
        inspections = [repaired.inspection or inspections[0]]
    if any(inspection.report.verdict == "broken" for inspection in inspections):
        return 1
    is_open = options.strict and not all(i.report.is_compared for i in inspections)
    return 2 if is_open else 0


def _find_extra(module: str) -> str:
    """The extra of this package that brings a module; nothing where none does."""
    import re
    from importlib.metadata import requires

    package = module.partition(".")[0]
    for line in requires("lora-postmortem") or ():
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        extra = re.search(r"""extra == ['"](\w+)""", marker)
        if extra and name.lower() == package.lower():
            return extra[1]
    return ""
