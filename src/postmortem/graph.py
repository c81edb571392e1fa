"""Running the graph of work: one build at a time, resumable, with lines a person can follow."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postmortem.case import load_case
from postmortem.errors import BookError, DataError
from postmortem.records import RecordFile, read_records, write_text

BUILD, RECORDED = Path("_build"), Path("results")
DEVICES = re.compile(r"auto|cpu|cuda|cuda:[0-9]+|mps")
DTYPES = re.compile("auto|float32|bfloat16|float16")
Settings = dict[str, str | int]


def build(settings: Settings, *, cores: int) -> str:
    """Bring the book up to date and return the line that says so.

    The case, the profile and the names of the data files are checked before anything runs.
    Raises `BookError` where a step failed; its own message stands above.
    """
    start = time.perf_counter()
    check_settings(settings)
    with one_build():
        if not (BUILD / "html" / "index.html").is_file():
            (BUILD / "book.json").unlink(missing_ok=True)  # its pages are gone
        _run_graph("book", settings, cores=cores)
    summary = json.loads((BUILD / "book.json").read_text(encoding="utf-8"))
    seconds = time.perf_counter() - start
    counts = f"{summary['pages']} pages, {summary['records']} records, {seconds:.0f} s"
    return f"book: {BUILD / 'html' / 'index.html'} ({counts})"


def replay(settings: Settings, *, cores: int) -> str:
    """Replay every cause at every severity in several worlds; return the line that sums it up."""
    check_settings(settings)
    with one_build():
        _run_graph("replay", settings, cores=cores)
    told = json.loads((BUILD / "replays.json").read_text(encoding="utf-8"))
    return f"replay: {told['line']}"


def keep(notebook: str, settings: Settings, *, cores: int) -> tuple[RecordFile, str]:
    """Run a heavy notebook again and keep its record; return it and the line that says where."""
    start = time.perf_counter()
    check_settings(settings)
    for path in str(settings["files"]).replace(":", " ").split():
        if not Path(path).is_file():
            raise DataError(path, expected="a file of rows or labels", found="no such file")
    place = RECORDED / str(settings["profile"]) / f"{notebook}.jsonl"
    with one_build():
        _run_graph("keep", settings | {"heavy": notebook}, cores=cores, again=True)
    kept = read_records(place)
    counts = f"{len(kept.records)} records, {time.perf_counter() - start:.0f} s"
    return kept, f"record: {place} ({counts})"


def check_settings(settings: Settings) -> None:
    """Refuse a wrong case, profile or file name before anything runs."""
    load_case(str(settings["case"])).profile(str(settings["profile"]))
    for name, known in (("device", DEVICES), ("dtype", DTYPES)):
        if not known.fullmatch(str(settings[name])):
            raise DataError(
                name, expected=known.pattern.replace("|", ", "), found=repr(settings[name])
            )
    for name in ("data", "labels"):
        path = str(settings[name])
        if path and not Path(path).is_file():
            raise DataError(path, expected=f"a file of {name}", found="no such file")
    if settings["labels"] and not settings["data"]:
        raise DataError("labels", expected="`data` beside them", found="labels alone")
    for role in ("suspect", "reference"):
        folder = str(settings[role])
        if folder and not Path(folder).is_dir():
            raise DataError(folder, expected=f"the {role}'s folder", found="no such folder")


@contextmanager
def one_build() -> Iterator[None]:
    """Hold the build lock; it is freed by the system however a build ends."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("book: waiting for another build here to end", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_graph(target: str, settings: Settings, *, cores: int, again: bool = False) -> None:
    write_text(BUILD / "settings.json", json.dumps(dict(settings), indent=1) + "\n")
    command = [target, "--cores", str(cores), "--quiet", "all", "--rerun-incomplete", "--nolock"]
    command += ["--forcerun", target] if again else []
    environment = os.environ | {
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # The steps say what went wrong themselves.
        "PYTHONWARNINGS": "ignore",
    }
    # The child keeps the lock's descriptor, so an orphan still counts as a running build.
    process = subprocess.run(
        [sys.executable, "-m", "snakemake", *command],
        env=environment,
        close_fds=False,
        check=False,
    )
    if process.returncode:
        raise BookError("the build", expected="every step to succeed", found="one that did not")
