import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml
from pods import Pods
from test_suite import adapter, bytes_of, write_spec

import postmortem
from postmortem.book import build
from postmortem.book.build import (
    PROFILES,
    SHIPPED,
    gpu_resources,
    memory_mb,
    place_options,
    read_executor,
    require_plugin,
)
from postmortem.checker.errors import ClusterError
from postmortem.suite.suite import make_plan, result_path

START = Path(__file__).parents[1] / "tools/start_slurm.sh"
PROGRAMS = ("sbatch", "munged", "slurmctld", "slurmd")


def lacks(*, programs=(), plugins=()):
    """What is missing here for a test, as its reason to be skipped; nothing if all is there."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    missing += [name for name in plugins if find_spec(name) is None]
    return f"no {', '.join(missing)} here" if missing else ""


NO_SLURM = lacks(programs=PROGRAMS, plugins=["snakemake_executor_plugin_slurm"])
NO_PODS = lacks(
    programs=["rsync"],
    plugins=["snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs"],
)


def command(spec, out, *options):
    """The suite's command as a user gives it."""
    named = [sys.executable, "-m", "postmortem", "suite", spec, "--out", out, *options]
    return list(map(str, named))


def environment(**more):
    """The environment of a run of this source on one thread."""
    source = str(Path(postmortem.__file__).parents[1])
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"} | more


def run(arguments, env):
    """Run a command to its end and return its last line."""
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def place(untrained, tmp_path_factory):
    """A folder with a suite of eight adapters in two chunks, each long enough to be killed in."""
    folder = tmp_path_factory.mktemp("cluster")
    for number in range(8):
        adapter(folder / "adapters" / f"a{number}", untrained / "suspect", lora_alpha=4 + number)
    write_spec(folder, untrained / "base", rows={"count": 800, "seed": 3})
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """The output of one run on the cores of this machine."""
    run(command(place / "suite.yml", place / "cores", "--cores", 2), environment())
    return bytes_of(place / "cores")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a SLURM of one node, which is stopped after the tests."""
    if NO_SLURM:
        pytest.skip(NO_SLURM)
    if os.geteuid() != 0:
        pytest.skip("SLURM's node daemon needs root")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([START, "start", folder], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    yield environment(
        SLURM_CONF=str(folder / "slurm.conf"), PATH=f"{folder / 'bin'}:{os.environ['PATH']}"
    )
    subprocess.run([START, "stop", folder], check=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The shipped profile for SLURM, looking every second for jobs that have ended."""
    folder = tmp_path_factory.mktemp("profile")
    profile = yaml.safe_load((PROFILES / "slurm/config.yaml").read_text())
    profile["slurm-init-seconds-before-status-checks"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def wait_for(told, *, process, seconds=600):
    """What a question answers as soon as it answers anything; only a hang takes the `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := told():
            return found
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def worker_of(out, number):
    """The process that scores a chunk of an output folder."""
    for process in psutil.process_iter():
        try:
            if {"suite-chunk", number} <= set(process.cmdline()) and process.cwd() == str(out):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


@pytest.mark.slow
def test_killed_jobs_lose_nothing(slurm, place, whole, quick, tmp_path):
    """Jobs on SLURM that are killed or cancelled after their first results go on from there."""
    with subprocess.Popen(
        command(place / "suite.yml", tmp_path, "--executor", quick, "--cores", 2),
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        first = end_jobs(make_plan(place / "suite.yml"), tmp_path, process=process, env=slurm)
        told, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    assert told.splitlines()[-1].startswith("suite: 8 adapters, ")
    assert bytes_of(tmp_path) == whole
    # Each adapter was measured once: what had a result when its job ended was not written again.
    assert {path: path.stat().st_mtime_ns for path in first} == first


def end_jobs(plan, out, *, process, env):
    """Kill the worker of one chunk and cancel the job of another, each in the middle.

    Returns the results that each had by then, with the times at which they were written.
    """
    worker, other = (
        wait_for(lambda n=number: worker_of(out, n), process=process) for number in ("0000", "0001")
    )
    job = other.environ()["SLURM_JOB_ID"]
    ends = {
        "0000": lambda: worker.send_signal(signal.SIGKILL),
        "0001": lambda: subprocess.run(["scancel", job], env=env, check=True),
    }
    first = {}
    while ends:
        number = wait_for(
            # One that has the result of its first adapter and not yet of all four.
            lambda: next((n for n in ends if 1 <= len(held(plan, out, n)) < 4), None),
            process=process,
        )
        ends.pop(number)()
        first |= {path: path.stat().st_mtime_ns for path in held(plan, out, number)}
    return first


def held(plan, out, number):
    """The results of a chunk's adapters so far."""
    paths = [result_path(plan, entry, out) for entry in plan.chunks[number]]
    return [path for path in paths if path.is_file()]


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_PODS), reason=NO_PODS)
def test_what_is_sent_to_kubernetes_is_complete(place, whole, tmp_path):
    """Each pod's command runs in an empty folder with the environment that its secret gives."""
    pods = Pods(tmp_path)
    env = environment(KUBECONFIG=str(pods.write_config()))
    out = tmp_path / "out"
    run(command(place / "suite.yml", out, "--executor", "kubernetes"), env)
    pods.close()
    assert bytes_of(out) == whole
    container = pods.described[0]["spec"]["template"]["spec"]["containers"][0]
    plan = make_plan(place / "suite.yml")
    assert container["resources"]["limits"]["memory"] == f"{memory_mb(plan.base_bytes)}M"
    assert len(pods.described) == len(plan.chunks)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_names_its_executor(name, monkeypatch):
    """A shipped profile's executor has its name, and a missing plugin is told by its command."""
    profile = yaml.safe_load((PROFILES / name / "config.yaml").read_text())
    assert read_executor(PROFILES / name) == profile["executor"] == name
    assert profile["retries"] > 0
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=f"pip install snakemake-executor-plugin-{name}"):
        require_plugin(name)


@pytest.mark.parametrize("text", ["jobs: 3", "[]", "executor: 3", "executor: a.b", "", None])
def test_a_profile_without_an_executor_is_refused(tmp_path, text):
    """A folder without a profile, or one that names no executor, would run here: it is refused."""
    assert place_options("", cores=2) == ["--cores", "2"]
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ClusterError, match=r"its `executor`; .* Give slurm or kubernetes, or the"):
        place_options(str(tmp_path), cores=1)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("echo AccountingStorageType = accounting_storage/slurmdbd", []),
        (
            "echo AccountingStorageType = accounting_storage/none",
            ["--slurm-status-command", "squeue", "--slurm-no-account"],
        ),
    ],
)
def test_accounting_decides_how_jobs_are_watched(monkeypatch, tmp_path, script, options):
    """Without accounting SLURM is asked by `squeue`."""
    put_scontrol(monkeypatch, tmp_path, script)
    assert build.slurm_options() == options


@pytest.mark.parametrize(
    ("script", "found"),
    [(None, "found .*No such file.*scontrol"), ("echo lost >&2; exit 1", "lost")],
)
def test_a_controller_that_does_not_answer_is_an_error(monkeypatch, tmp_path, script, found):
    """Where SLURM's commands are missing or silent the script that starts a cluster is named."""
    put_scontrol(monkeypatch, tmp_path, script)
    with pytest.raises(ClusterError, match=rf"a controller that answers.*{found}.*start_slurm"):
        build.slurm_options()


def put_scontrol(monkeypatch, folder, script):
    """Make a script SLURM's `scontrol`, or let there be none."""
    if script is not None:
        (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_book_is_not_for_pods():
    """The book's steps share a folder that pods have not, which is said before any runs."""
    with pytest.raises(ClusterError, match="expected a suite; found the book"):
        build.kubernetes_options(None)


@pytest.mark.parametrize(("device", "asked"), [("auto", 0), ("cpu", 0), ("cuda", 1), ("cuda:1", 1)])
def test_a_gpu_is_asked_for_where_one_is_named(device, asked):
    """A job asks for a GPU where the device is one by name, and has no such wish elsewhere."""
    assert gpu_resources(device).get("gpu", 0) == asked
    assert bool(gpu_resources(device)) == bool(asked)


def test_memory_is_asked_for_by_the_weights(place):
    """The plan says how large the base is; what is asked for grows with that and each attempt."""
    plan = make_plan(place / "suite.yml")
    weights = sum(file.stat().st_size for file in Path(plan.base).glob("*.safetensors"))
    assert plan.base_bytes == weights > 0
    assert memory_mb(3_000_000_000) - memory_mb(0) == 9000
    assert memory_mb(0, attempt=2) == 2 * memory_mb(0)


def test_the_script_names_what_is_missing(tmp_path):
    """The script wants start or stop, and says which programs of SLURM's it lacks."""
    wrong = subprocess.run([START, "restart"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "expected start or stop; found restart" in wrong.stderr
    for name in ("bash", "realpath", "dirname", "id", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name))
    text = START.read_text().replace(":/usr/sbin:/sbin", "")
    done = subprocess.run(
        ["bash", "-c", text, "start_slurm", "start", tmp_path / "x"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "found no munged" in done.stderr
    assert "apt-get install slurm-wlm munge" in done.stderr
