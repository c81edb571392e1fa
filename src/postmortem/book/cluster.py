"""Where the graph runs: on cores of this machine, or through an executor plugin of Snakemake's."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

from postmortem.case.load import read_yaml
from postmortem.checker.errors import ClusterError

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
