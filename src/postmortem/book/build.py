"""Running the graph of work: one build at a time, here or on a cluster, with lines to follow."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from postmortem.case.files import locked, write_text
from postmortem.case.layout import BUILD, REPLAYS, RESULTS, kept_names, site_of
from postmortem.case.load import case_digest, load_case, read_yaml
from postmortem.case.schema import Case
from postmortem.checker.errors import BookError, CaseError, ClusterError, DataError, SuiteError
from postmortem.experiments.records import RecordFile, digest_library, read_records

DEVICES = re.compile(r"auto|cpu|cuda|cuda:[0-9]+|mps")
DTYPES = re.compile("auto|float32|bfloat16|float16")
Settings = dict[str, str | int]

PROFILES = Path(__file__).with_name("profiles")
SHIPPED = ("slurm", "kubernetes")
# What a process of ours takes beside the weights: libraries, rows, log-probabilities.
FIXED_MB = 2000
# Files of 16 bits are 32 in memory on a CPU, and half as much again goes to keys, values and
# activations.
PER_WEIGHT = 3
# A chunk that takes longer than a scheduler likes is cut smaller by `chunk` in the suite file.
CHUNK_MINUTES = 240
NO_ACCOUNTING = "accounting_storage/none"


def build(settings: Settings, *, cores: int, executor: str = "") -> str:
    """Bring the book up to date and return the line that says so.

    The case, the profile, the names of the data files and what is shipped are checked before
    anything runs. `executor` and `cores` say where, as for `place_options`; so they do for the
    other builds here. Raises `BookError` where a step failed; its own message stands above.
    """
    start = time.perf_counter()
    settings = check_settings(settings)
    path = str(settings["case"])
    case = load_case(path)
    site = site_of(path, case)
    _check_shipped(case)
    with one_build():
        if not (site.html / "index.html").is_file():
            site.summary.unlink(missing_ok=True)  # its pages are gone
        _run_graph("book", settings, cores=cores, executor=executor)
    summary = json.loads(site.summary.read_text(encoding="utf-8"))
    seconds = time.perf_counter() - start
    counts = f"{summary['pages']} pages, {summary['records']} records, {seconds:.0f} s"
    return f"book: {site.html / 'index.html'} ({counts})"


def replay(settings: Settings, *, cores: int, executor: str = "") -> str:
    """Replay every cause at every severity in several worlds; return the line that sums it up.

    The kept replays are left as they are.
    """
    # These load scipy, which no other command of the graph waits for.
    from postmortem.diagnosis.inquiry import describe_trust, evaluate_replays
    from postmortem.diagnosis.likelihoods import list_replays

    settings = check_settings(settings)
    case = load_case(str(settings["case"]))
    profile = case.profile(str(settings["profile"]))
    if profile.replays is None:
        raise CaseError(
            f"{settings['case']}, key `profiles.{settings['profile']}`",
            expected="`replays`, the adapters that causes are injected into",
            found="none",
            remedy="Name the profile `embedded`; of a case of your own, `postmortem diagnose`.",
        )
    every = kept_names(profile, worlds=int(settings["worlds"]))
    names = [name for name in every if name.startswith(REPLAYS)]
    made = _make_kept(names, settings, cores=cores, executor=executor)
    files = [read_records(path) for path in made.values()]
    return f"replay: {describe_trust(evaluate_replays(case, list_replays(files)))}"


def record(settings: Settings, *, cores: int) -> list[str]:
    """Make what is kept of a profile anew; return a line for each record.

    Nothing in `results` is touched before all of it has run.
    """
    settings = check_settings(settings)
    for path in str(settings["files"]).replace(":", " ").split():
        if not Path(path).is_file():
            raise DataError(path, expected="a file of rows or labels", found="no such file")
    profile = load_case(str(settings["case"])).profile(str(settings["profile"]))
    names = kept_names(profile, worlds=int(settings["worlds"]))
    _require_kept(names, settings)
    made = _make_kept(names, settings, cores=cores)
    return [_keep(path, name, settings) for name, path in made.items()]


def measure_speed(settings: Settings, *, cores: int) -> tuple[RecordFile, str]:
    """Run the benchmark and keep its record; return it and the line that says where."""
    settings = check_settings(settings)
    profile = load_case(str(settings["case"])).profile(str(settings["profile"]))
    names = ["bench"] if profile.recorded else []
    _require_kept(names, settings)
    made = _make_kept(names, settings, cores=cores, again=True)
    line = _keep(made["bench"], "bench", settings)
    return read_records(made["bench"]), line


def confirm_record(settings: Settings, *, sample: int, cores: int) -> str:
    """Ask a kept record's first rows again with today's code; the line that says how it went."""
    start = time.perf_counter()
    settings = check_settings(settings) | {"sample": sample}
    place = RESULTS / str(settings["profile"]) / "real_model.jsonl"
    read_records(place)
    again = _make_kept(["real_model"], settings, cores=cores, again=True)["real_model"]
    from postmortem.experiments.records import confirm_files

    return f"confirm: {place}: {confirm_files(place, again)}, {time.perf_counter() - start:.0f} s"


def _check_shipped(case: Case) -> None:
    """Check what is shipped for a case, unless it was checked as it is."""
    state = hashlib.sha256(f"{case_digest(case)} {digest_library()}".encode())
    for path in sorted(RESULTS.rglob("*.*")):
        if path.is_file():
            state.update(f"{path} {path.stat().st_size}\n".encode())
            state.update(path.read_bytes())
    checked, digest = BUILD / f"{case.name}.checked", state.hexdigest()
    if checked.is_file() and checked.read_text(encoding="utf-8") == digest:
        return
    from postmortem.experiments.records import check_kept

    check_kept(case)
    write_text(checked, digest)


def _require_kept(names: Sequence[str], settings: Settings) -> None:
    if not names:
        raise CaseError(
            f"{settings['case']}, key `profiles.{settings['profile']}`",
            expected="`recorded` or `replays`, which say what to run",
            found="neither",
            remedy="Name another profile with PROFILE, or add the key.",
        )


def _make_kept(
    names: Sequence[str],
    settings: Settings,
    *,
    cores: int,
    executor: str = "",
    again: bool = False,
) -> dict[str, Path]:
    """Bring kept runs up to date in the build folder, or run them `again`; their files by name."""
    folder = "confirm" if settings.get("sample") else "kept"
    case = load_case(str(settings["case"]))
    place = BUILD / folder / case.name / str(settings["profile"])
    made = {name: place / f"{name}.jsonl" for name in names}
    if again:
        for path in made.values():
            path.unlink(missing_ok=True)
    asked = settings | {"kept": " ".join(names)}
    with one_build():
        _run_graph("keep", asked, cores=cores, executor=executor)
    return made


def _keep(made: Path, name: str, settings: Settings) -> str:
    """Put a record into its place below `results`; the line that says where."""
    place = RESULTS / str(settings["profile"]) / f"{name}.jsonl"
    write_text(place, made.read_text(encoding="utf-8"))
    kept = read_records(place)
    seconds = float(kept.provenance.aside["seconds"])
    return f"record: {place} ({len(kept.records)} records, {seconds:.0f} s)"


def run_suite(path: str | Path, out: str | Path, *, cores: int, executor: str = "") -> str:
    """Run a suite, resuming what an earlier run has left; return the line that sums it up.

    With an `executor`, `cores` is how many chunks run at once, and 0 leaves it to the profile.
    Raises `SuiteError` where a step failed; its own message stands above.
    """
    from postmortem.suite.suite import make_plan, unmark_unfinished, write_plan

    start, out = time.perf_counter(), Path(out)
    place = place_options(executor, cores=cores, out=out)
    plan = make_plan(path)
    with locked(out / ".lock", "suite: waiting for another run in this folder to end"):
        write_plan(plan, out)
        unmark_unfinished(plan, out)
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


def _run_graph(target: str, settings: Settings, *, cores: int, executor: str = "") -> None:
    place = place_options(executor, cores=cores)
    write_text(BUILD / "settings.json", json.dumps(dict(settings), indent=1) + "\n")
    if _run_snakemake([target, *place]):
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


def place_options(executor: str, *, cores: int, out: Path | None = None) -> list[str]:
    """Snakemake's options for where its jobs run.

    Without an `executor` these are `cores` of this machine. An executor is the name of a shipped
    profile or a folder with a profile of one's own; `cores` is then how many jobs run at once, and
    0 leaves it to the profile. `out` is the folder to which jobs bring what they write where they
    do not run in it. Raises `ClusterError` where something that is needed is missing.
    """
    if not executor:
        return ["--cores", str(cores)]
    profile = (PROFILES / executor if executor in SHIPPED else Path(executor)).resolve()
    name = read_executor(profile)
    require_plugin(name)
    options = ["--profile", str(profile), *(["--jobs", str(cores)] if cores else [])]
    if name == "slurm":
        return options + slurm_options()
    if name == "kubernetes":
        return options + kubernetes_options(out)
    return options


def read_executor(profile: Path) -> str:
    """The executor that a profile names; without one Snakemake would run everything here."""
    path = profile / "config.yaml"
    found = read_yaml(path, kind="profile", remedy="") if path.is_file() else "no such file"
    name = found.get("executor") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ClusterError(
            path,
            expected="a Snakemake profile with the name of its `executor`",
            found=repr(found)[:200],
            remedy=f"Give {' or '.join(SHIPPED)}, or the folder of such a profile.",
        )
    return name


def require_plugin(name: str) -> None:
    """Raise `ClusterError` where Snakemake's plugin for an executor is not installed."""
    if find_spec(f"snakemake_executor_plugin_{name.replace('-', '_')}") is None:
        package = f"snakemake-executor-plugin-{name}"
        remedy = "Run `make cluster`, or " if name in SHIPPED else "Run "
        raise ClusterError(
            f"executor {name!r}",
            expected=f"the package {package}",
            found="none in this environment",
            remedy=f"{remedy}`pip install {package}`.",
        )


def slurm_options() -> list[str]:
    """What SLURM's executor must be told of the cluster that the commands here belong to.

    Its usual status command, `sacct`, waits for ever where jobs are not accounted for, and an
    account cannot be guessed there. Raises `ClusterError` where no controller answers.
    """
    try:
        asked = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ClusterError(
            "executor 'slurm'",
            expected="a controller that answers `scontrol show config`",
            found=" ".join((getattr(error, "stderr", "") or str(error)).split())[:200],
            remedy="Run it on a login node, name the cluster's file with SLURM_CONF, or start a "
            "cluster of one node: tools/start_slurm.sh start.",
        ) from None
    accounted = NO_ACCOUNTING not in asked.stdout
    return [] if accounted else ["--slurm-status-command", "squeue", "--slurm-no-account"]


def kubernetes_options(out: Path | None) -> list[str]:
    """Where a pod's files go. Raises `ClusterError` for a graph whose files lie all over a folder.

    A pod starts in an empty folder, and only what a rule names as its output is brought back.
    """
    if out is None:
        raise ClusterError(
            "executor 'kubernetes'",
            expected="a suite",
            found="the book, whose steps share their working folder",
            remedy="Use SLURM, or the cores of one machine.",
        )
    return ["--default-storage-prefix", str(out.resolve())]


def gpu_resources(device: str) -> dict[str, str | int]:
    """What a rule that loads a model asks for besides, where the device is named as a GPU.

    Kubernetes' executor takes the resource for a wish even where it is 0, so it is left out.
    """
    return {"gpu": 1, "gpu_manufacturer": "nvidia"} if device.startswith("cuda") else {}


def memory_mb(weights: int, *, attempt: int = 1) -> int:
    """Memory in MB to ask for a job that loads weights of so many bytes; a retry gets more."""
    return (FIXED_MB + PER_WEIGHT * weights // 1_000_000) * attempt
