"""Running the graph of work: one build at a time, resumable, with lines a person can follow."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from postmortem.case import load_case
from postmortem.case_site import BUILD, site_of
from postmortem.cluster import place_options
from postmortem.confirm import confirm_files
from postmortem.errors import BookError, CaseError, DataError, SuiteError
from postmortem.records import RecordFile, Replay, locked, read_records, write_text
from postmortem.suite import make_plan, prepare_chunks, write_plan
from postmortem.world import embedded_digest

RECORDED = Path("results")
DEVICES = re.compile(r"auto|cpu|cuda|cuda:[0-9]+|mps")
DTYPES = re.compile("auto|float32|bfloat16|float16")
Settings = dict[str, str | int]


def build(settings: Settings, *, cores: int, executor: str = "") -> str:
    """Bring the book up to date and return the line that says so.

    The case, the profile and the names of the data files are checked before anything runs.
    `executor` and `cores` say where, as for `place_options`; so they do for the other builds here.
    Raises `BookError` where a step failed; its own message stands above.
    """
    start = time.perf_counter()
    settings = check_settings(settings)
    case = str(settings["case"])
    site = site_of(case, load_case(case))
    with one_build():
        if not (site.html / "index.html").is_file():
            site.summary.unlink(missing_ok=True)  # its pages are gone
        _run_graph("book", settings, cores=cores, executor=executor)
    summary = json.loads(site.summary.read_text(encoding="utf-8"))
    seconds = time.perf_counter() - start
    counts = f"{summary['pages']} pages, {summary['records']} records, {seconds:.0f} s"
    return f"book: {site.html / 'index.html'} ({counts})"


def replay(settings: Settings, *, cores: int, executor: str = "") -> str:
    """Replay every cause at every severity in several worlds; return the line that sums it up."""
    settings = check_settings(settings)
    if load_case(str(settings["case"])).own:
        raise CaseError(
            settings["case"],
            expected="a case in full, whose causes are replayed",
            found="one in the short form",
            remedy="`postmortem diagnose` works on this one.",
        )
    with one_build():
        _run_graph("replay", settings, cores=cores, executor=executor)
    told = json.loads((BUILD / "replays.json").read_text(encoding="utf-8"))
    return f"replay: {told['line']}"


def keep(notebook: str, settings: Settings, *, cores: int) -> tuple[RecordFile, str]:
    """Run a heavy notebook again and keep its record; return it and the line that says where."""
    start = time.perf_counter()
    settings = check_settings(settings)
    for path in str(settings["files"]).replace(":", " ").split():
        if not Path(path).is_file():
            raise DataError(path, expected="a file of rows or labels", found="no such file")
    profile = str(settings["profile"])
    if load_case(str(settings["case"])).profile(profile).recorded is None:
        raise CaseError(
            f"{settings['case']}, key `profiles.{profile}`",
            expected="`recorded`, which says how many rows to record",
            found="none",
            remedy="Name another profile with PROFILE, or add the key.",
        )
    place = RECORDED / profile / f"{notebook}.jsonl"
    asked: Settings = {"heavy": notebook, "kept": str(place)}
    with one_build():
        _run_graph("keep", settings | asked, cores=cores, again=True)
    kept = read_records(place)
    counts = f"{len(kept.records)} records, {time.perf_counter() - start:.0f} s"
    return kept, f"record: {place} ({counts})"


def confirm_record(settings: Settings, *, sample: int, cores: int) -> str:
    """Ask a kept record's first rows again with today's code; the line that says how it went."""
    start = time.perf_counter()
    settings = check_settings(settings)
    profile = str(settings["profile"])
    place, again = RECORDED / profile / "real_model.jsonl", BUILD / "confirm" / f"{profile}.jsonl"
    read_records(place)
    asked: Settings = {"heavy": "real_model", "kept": str(again), "sample": sample}
    with one_build():
        _run_graph("keep", settings | asked, cores=cores, again=True)
    return f"confirm: {place}: {confirm_files(place, again)}, {time.perf_counter() - start:.0f} s"


def make_looks(settings: Settings, *, cores: int) -> str:
    """Plant every cause in embedded worlds anew and ship what was seen; return a line on it."""
    # These load torch, which no other command of the graph waits for.
    from postmortem.examination import describe_judgements
    from postmortem.looks import SHIPPED, write_looks

    settings = check_settings(settings)
    with one_build():
        _run_graph("looks", settings, cores=cores)
    seed = load_case(str(settings["case"])).profile(str(settings["profile"])).seed
    worlds = range(seed, seed + int(settings["worlds"]))
    files = [read_records(BUILD / "looks" / f"{world}.jsonl") for world in worlds]
    replays = [replay for file in files for replay in file.of(Replay)]
    write_looks(SHIPPED, replays, worlds=worlds)
    return f"looks: {len(replays)} replays, {describe_judgements(replays)}"


def train_base(settings: Settings, *, cores: int) -> Path:
    """Bring the embedded world's first base up to date and return its folder."""
    case, profile = load_case(str(settings["case"])), str(settings["profile"])
    lineage = BUILD / "worlds" / f"{case.name}-{embedded_digest(case, case.profile(profile).seed)}"
    with one_build():
        _run_graph(str(lineage / "target.done"), settings, cores=cores)
    return lineage / "target" / "base"


def run_suite(path: str | Path, out: str | Path, *, cores: int, executor: str = "") -> str:
    """Run a suite, resuming what an earlier run has left; return the line that sums it up.

    With an `executor`, `cores` is how many chunks run at once, and 0 leaves it to the profile.
    Raises `SuiteError` where a step failed; its own message stands above.
    """
    start, out = time.perf_counter(), Path(out)
    place = place_options(executor, cores=cores, out=out)
    plan = make_plan(path)
    with locked(out / ".lock", "suite: waiting for another run in this folder to end"):
        write_plan(plan, out)
        prepare_chunks(plan, out)
        # Jobs that start in a folder of their own are sent the graph from here.
        write_text(out / "Snakefile", Path(__file__).with_name("suite.smk").read_text("utf-8"))
        options = ["--snakefile", out / "Snakefile", "--directory", out.resolve(), "results"]
        # One chunk that fails does not stop the others.
        if _run_snakemake([*options, "--keep-going", *place]):
            raise SuiteError(out, expected="every chunk to succeed", found="one that did not")
        line = (out / "summary.txt").read_text(encoding="utf-8").strip()
    return f"{line}, {time.perf_counter() - start:.0f} s"


def check_settings(settings: Settings) -> Settings:
    """The settings with the case's first profile where none is named.

    A wrong case, profile or file name is refused before anything runs.
    """
    case = load_case(str(settings["case"]))
    name = str(settings["profile"]) or case.default_profile
    profile = case.profile(name)
    for key, known in (("device", DEVICES), ("dtype", DTYPES)):
        if not known.fullmatch(str(settings[key])):
            raise DataError(
                key, expected=known.pattern.replace("|", ", "), found=repr(settings[key])
            )
    for key in ("data", "labels"):
        path = str(settings[key]) or getattr(profile, key)
        if path and not Path(path).is_file():
            raise DataError(path, expected=f"a file of {key}", found="no such file")
    if settings["labels"] and not (settings["data"] or profile.data):
        raise DataError("labels", expected="`data` beside them", found="labels alone")
    for role in ("suspect", "reference"):
        folder = str(settings[role])
        if folder and not Path(folder).is_dir():
            raise DataError(folder, expected=f"the {role}'s folder", found="no such folder")
    return settings | {"profile": name}


@contextmanager
def one_build() -> Iterator[None]:
    """Hold the build lock; it is freed by the system however a build ends."""
    with locked(BUILD / ".lock", "book: waiting for another build here to end"):
        yield


def _run_graph(
    target: str, settings: Settings, *, cores: int, executor: str = "", again: bool = False
) -> None:
    place = place_options(executor, cores=cores)
    write_text(BUILD / "settings.json", json.dumps(dict(settings), indent=1) + "\n")
    forced = ["--forcerun", target] if again else []
    if _run_snakemake([target, *place, *forced]):
        raise BookError("the build", expected="every step to succeed", found="one that did not")


def _run_snakemake(options: Sequence[object]) -> int:
    command = [*map(str, options), "--quiet", "all", "--rerun-incomplete", "--nolock"]
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The steps say what went wrong themselves.
        "PYTHONWARNINGS": "ignore",
    }
    # The child keeps the lock's descriptor, so an orphan still counts as a running build.
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *command],
        env=environment,
        close_fds=False,
        check=False,
    ).returncode
