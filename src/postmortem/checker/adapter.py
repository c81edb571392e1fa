"""An adapter as its files say: where it lies, its tensors, its configuration."""

import itertools
import math
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from postmortem.checker.config import (
    CONFIG_FILE,
    FORMATS,
    PEFT_TYPES,
    PREFIX,
    AdapterConfig,
    Contents,
    build_config,
    check_config,
    check_method,
    invalid,
    is_count,
    sort_keys,
)
from postmortem.checker.errors import (
    Finding,
    ModelError,
    UntrustedError,
    finding,
    is_hub_id,
    parse_json,
    printable,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


HTTP_SECONDS = 5.0
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Source(Protocol):
    """A named set of files, read in bounded pieces."""

    name: str
    is_local: bool

    def size(self, filename: str) -> int | None:
        """Return the file's size in bytes, or None when there is no such file."""

    def read(self, filename: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes from byte `start`."""


class Folder:
    """An adapter folder; nothing outside it is opened, whatever its links say."""

    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._root = path.resolve()

    def resolve(self, filename: str) -> Path | None:
        """Return the regular file of this name, None without one; refuse links that lead out."""
        path = self.path / filename
        try:
            if not path.is_symlink() and not path.exists():
                return None
            target = path.resolve(strict=True)
            is_file = stat.S_ISREG(target.stat().st_mode)
        except (OSError, RuntimeError, ValueError) as error:
            reason = f"a link or file that cannot be followed ({type(error).__name__})"
            raise ModelError(path, found=reason) from None
        if not any(target.is_relative_to(root) for root in self._allowed_roots()):
            raise ModelError(
                path,
                expected="a file inside the adapter's folder",
                found="a link that leads out of it",
                remedy="Copy the file into the folder; links are not followed out of it.",
            )
        if not is_file:
            raise ModelError(path, expected="a regular file", found="something else")
        return target

    def _allowed_roots(self) -> tuple[Path, ...]:
        # The hub cache keeps snapshots as links to its own blobs, beside the snapshots folder.
        cache = self._root.parent.parent
        is_snapshot = self._root.parent.name == "snapshots" and cache.name.startswith("models--")
        return (self._root, cache / "blobs") if is_snapshot else (self._root,)

    def size(self, filename: str) -> int | None:
        """Return the file's size in bytes, or None when there is no such file."""
        path = self.resolve(filename)
        return None if path is None else path.stat().st_size

    def read(self, filename: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes from byte `start`."""
        path = self.resolve(filename)
        if path is None:
            return b""
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise ModelError(path, found=f"a file that cannot be read: {error}") from None

    def is_mostly_holes(self, filename: str) -> bool:
        """Tell whether less than half of the file is stored: a sparse file reads as zeros."""
        path = self.resolve(filename)
        status = path.stat() if path else None
        # Some network file systems report no blocks at all: that says nothing.
        blocks = getattr(status, "st_blocks", 0)
        return status is not None and blocks > 0 and 512 * blocks < status.st_size / 2

    def names(self) -> list[str]:
        """Return the names in the folder, at most a thousand, sorted."""
        return [entry.name for entry in _entries(self.path)]


class HubRepository:
    """A hub repository: only the bytes asked for are fetched, and none are kept."""

    is_local = False

    def __init__(self, repo_id: str) -> None:
        self.name = repo_id
        self._sizes: dict[str, int | None] = {}

    def size(self, filename: str) -> int | None:
        """Return the file's size in bytes, or None when there is no such file."""
        if filename not in self._sizes:
            self._fetch(filename, 0, 1)
        return self._sizes[filename]

    def read(self, filename: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes from byte `start`."""
        return self._fetch(filename, start, length)

    def _fetch(self, filename: str, start: int, length: int) -> bytes:
        # Imported here: a check of a folder must not pay for the hub's client.
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import get_session

        wanted = f"bytes={start}-{start + length - 1}"
        try:
            url = hf_hub_url(self.name, filename)
            headers = {**build_hf_headers(), "Range": wanted, "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=HTTP_SECONDS) as reply:
                return self._take(reply, filename, start, length)
        except (HFValidationError, OSError) as error:
            raise self._unreachable(error) from None
        except Exception as error:
            # The client's own errors differ between its generations (requests, httpx).
            if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore"):
                raise
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ModelError:
        return ModelError(
            self.name,
            expected="a folder or a reachable hub repository",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )

    def _take(self, reply: Any, filename: str, start: int, length: int) -> bytes:
        if reply.status_code == 416:  # An empty file has no first byte to give.
            self._sizes[filename] = 0
            return b""
        if reply.status_code in (401, 403, 404):
            self._sizes[filename] = None
            return b""
        if reply.status_code not in (200, 206):
            raise ModelError(self.name, expected=filename, found=f"HTTP {reply.status_code}")
        body = bytearray()
        # A server that ignores the range sends the whole file: stop at what was asked for.
        end = length if reply.status_code == 206 else start + length
        for piece in reply.iter_bytes():
            body += piece
            if len(body) >= end:
                break
        total = reply.headers.get("Content-Range", "").rpartition("/")[2]
        total = total if total.isdigit() else reply.headers.get("Content-Length", "")
        self._sizes[filename] = int(total) if total.isdigit() else len(body)
        return bytes(body[end - length : end])


def kind_of_path(path: Path) -> str:
    """Say what is at a path that a user typed: folder, file, other, or nothing usable."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "nothing"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def open_source(adapter: str) -> Folder | HubRepository:
    """Open an adapter by folder path or hub id; raises ModelError when it is neither."""
    path = Path(adapter)
    found = kind_of_path(path)
    # Commit hooks pass the files that changed: they stand for the folder that holds them.
    if found == "file" and path.name in ADAPTER_FILES:
        return Folder(path.parent)
    if found == "folder":
        return Folder(path)
    if found == "nothing" and is_hub_id(adapter):
        return HubRepository(adapter)
    expected = "an adapter folder or a hub id (owner/name)"
    raise ModelError(printable(adapter), expected=expected, found=found)


_, WEIGHTS_FILE, PICKLE_FILE = ADAPTER_FILES
MAX_JSON = 8_000_000  # Bytes. A header of 10,000 tensors is under 2 MB; a config is a few kB.
MAX_DIMENSIONS = 8
MAX_RUNS = 64  # More runs of zero rows than this are scattered: no slice of a matrix.
CHUNK = 4_000_000  # Bytes scanned at a time: memory stays flat whatever the tensor's size.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the header; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What a tensor's bytes hold: `largest` is the greatest magnitude, `norm` is Frobenius.

    `zero_rows` and `zero_columns` are the runs of them that are exactly zero, as (start, end);
    neither is told of a tensor that is no matrix, or whose rows are longer than a chunk.
    """

    is_finite: bool
    largest: float
    norm: float
    zero_rows: Runs = ()
    zero_columns: Runs = ()


def read_weights(
    source: Source, filename: str = WEIGHTS_FILE
) -> tuple[dict[str, Tensor], list[Finding]]:
    """Read the header; a file that is absent, damaged or a pickle gives a finding instead."""
    size = source.size(filename)
    if size is None:
        return {}, [_absent(source)]
    head = source.read(filename, 0, 8)
    length = int.from_bytes(head, "little")
    if problem := _length_problem(head, length, size):
        return {}, [problem]
    if isinstance(source, Folder) and source.is_mostly_holes(filename):
        found = f"a sparse file of {size:,} bytes, less than half of them stored"
        return {}, [_corrupt(found, expected="a file copied in full")]
    try:
        header = parse_json(source.read(filename, 8, length))
        return parse_header(header, data_start=8 + length, file_size=size), []
    except UntrustedError as error:
        return {}, [_corrupt(str(error), expected="a safetensors header")]


def _corrupt(found: str, *, expected: str, remedy: str = "") -> Finding:
    return finding(
        "corrupt-weights", evidence=WEIGHTS_FILE, expected=expected, found=found, remedy=remedy
    )


def _length_problem(head: bytes, length: int, size: int) -> Finding | None:
    if len(head) < 8:
        return _corrupt(f"{size:,} bytes", expected="a safetensors file")
    if length <= min(MAX_JSON, size - 8):
        return None
    # Read as a length, the first bytes of other formats are far beyond any file's size.
    if head.startswith(b"version "):
        remedy = "Fetch the file itself: git lfs pull."
        return _corrupt("a Git LFS pointer", expected="the weights", remedy=remedy)
    if head.startswith(_PICKLE_HEADS):
        found = "a pickle under this name"
        return finding("unsafe-pickle", evidence=WEIGHTS_FILE, expected="safetensors", found=found)
    found = f"a header of {length:,} bytes in a file of {size:,}"
    return _corrupt(found, expected=f"a header of at most {min(MAX_JSON, size - 8):,} bytes")


def _absent(source: Source) -> Finding:
    pickle = source.size(PICKLE_FILE)
    if pickle is not None:
        found = f"{pickle:,} bytes of pickle"
        return finding("unsafe-pickle", evidence=PICKLE_FILE, expected=WEIGHTS_FILE, found=found)
    beside = source.names() if isinstance(source, Folder) else []
    shards = [n for n in beside if re.fullmatch(r"adapter_model-\d+-of-\d+\.safetensors", n)]
    if shards:
        found = f"{len(shards)} shards of it, {shards[0]} first, which PEFT does not read"
        remedy = (
            "Join them: weights = {}; for each shard weights |= safetensors.torch.load_file(shard);"
            " safetensors.torch.save_file(weights, 'adapter_model.safetensors')."
        )
        return finding(
            "missing-weights",
            evidence=WEIGHTS_FILE,
            expected="the weights in one file",
            found=found,
            remedy=remedy,
        )
    weights = [n for n in beside if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    below = _adapters_below(source.path) if isinstance(source, Folder) else []
    found = f"{', '.join(weights[:3])} beside it" if weights else "no such file"
    found += f"; adapters in {', '.join(path.name for path in below[:4])}" if below else ""
    return finding("missing-weights", evidence=WEIGHTS_FILE, expected="the weights", found=found)


def parse_header(header: object, *, data_start: int, file_size: int) -> dict[str, Tensor]:
    """Turn a parsed header into tensors that tile the data exactly; UntrustedError otherwise."""
    if not isinstance(header, dict):
        raise UntrustedError("the header is no JSON object")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors = {name: _parse_entry(name, entry, data_start) for name, entry in entries.items()}
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            fault = "overlaps the tensor" if tensor.start < position else "leaves a hole"
            raise UntrustedError(f"tensor {printable(name)} {fault} before it")
        position = tensor.end
    if position != file_size:
        fault = "truncated" if position > file_size else "too long"
        described = f"{file_size:,} bytes where the header describes {position:,}"
        raise UntrustedError(f"the file is {fault}: {described}")
    return tensors


def _parse_entry(name: str, entry: object, data_start: int) -> Tensor:
    dtype, shape, offsets = (
        (entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets")))
        if isinstance(entry, dict)
        else (None, None, None)
    )
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UntrustedError(f"tensor {printable(name, 100)} has dtype {dtype!r:.40}")
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise UntrustedError(f"tensor {printable(name, 100)} has no usable shape and offsets")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        found = f"{end - start:,} bytes for shape {shape}"
        raise UntrustedError(f"tensor {printable(name, 100)} has {found}")
    return Tensor(dtype, tuple(shape), data_start + start, data_start + end)


def _counts(values: object) -> list[int] | None:
    return values if isinstance(values, list) and all(map(is_count, values)) else None


def scan(source: Folder, tensors: Mapping[str, Tensor]) -> dict[str, TensorStats]:
    """Scan the bytes of the floating-point tensors; memory stays near the chunk size."""
    path = source.resolve(WEIGHTS_FILE)
    if path is None:
        return {}
    stats = {}
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            if tensor.dtype in _DECODERS and tensor.count:
                file.seek(tensor.start)
                stats[name] = _scan_one(file.read, tensor)
    return stats


def _scan_one(read: Callable[[int], bytes], tensor: Tensor) -> TensorStats:
    import numpy as np

    finite, largest, squares, left = True, 0.0, 0.0, tensor.end - tensor.start
    row, lines = _row_bytes(tensor), _ZeroLines()
    step = CHUNK // row * row if row else CHUNK
    while left > 0 and (data := read(min(step, left))):
        left -= len(data)
        values = _DECODERS[tensor.dtype](data)
        with np.errstate(all="ignore"):
            total = float(np.dot(values, values))
        if not math.isfinite(total):
            # Either a value is not finite, or squares of finite ones overflowed 32 bits.
            finite = finite and bool(np.isfinite(values).all())
            total = math.inf
        if finite:
            largest = max(largest, float(values.max()), -float(values.min()))
        squares += total
        if row:
            lines.add(values.reshape(-1, tensor.shape[1]))
    return TensorStats(finite, largest, math.sqrt(squares), *lines.runs())


def _row_bytes(tensor: Tensor) -> int:
    """Bytes of a row of a matrix; 0 for what is no matrix, or has rows longer than a chunk."""
    row = tensor.shape[-1] * DTYPE_BITS[tensor.dtype] // 8 if len(tensor.shape) == 2 else 0
    return row if row <= CHUNK else 0


class _ZeroLines:
    """The rows and columns of a matrix that are exactly zero, gathered from blocks of rows."""

    def __init__(self) -> None:
        self._height = 0
        self._rows: list[tuple[int, int]] = []
        self._columns: Array | None = None

    def add(self, block: "Array") -> None:
        """Take the next rows."""
        import numpy as np

        # Only a line that starts with a zero can be one of zeros, and few do.
        starts = np.flatnonzero(block[:, 0] == 0)
        rows = self._height + starts[~block[starts].any(axis=1)]
        # A hostile file could have any number of them: one run more than the most tells enough.
        self._rows = _join([*self._rows, *_runs(rows)])[: MAX_RUNS + 1]
        known = self._columns
        starts = np.flatnonzero(block[0] == 0) if known is None else known
        self._columns = starts[~block[:, starts].any(axis=0)]
        self._height += len(block)

    def runs(self) -> tuple[Runs, Runs]:
        """Return the runs of zero rows and of zero columns; of too many, none."""
        columns = [] if self._columns is None else _runs(self._columns)
        rows, across = (
            tuple(found) if len(found) <= MAX_RUNS else () for found in (self._rows, columns)
        )
        return rows, across


def _runs(places: "Array") -> list[tuple[int, int]]:
    """Return the first runs of consecutive numbers of a sorted array, as (start, end)."""
    import numpy as np

    breaks = np.flatnonzero(np.diff(places) != 1)[: MAX_RUNS + 1]
    starts = [0, *(breaks + 1).tolist()] if len(places) else []
    ends = [*breaks.tolist(), len(places) - 1]
    pairs = zip(starts, ends, strict=False)
    return [(int(places[start]), int(places[end]) + 1) for start, end in pairs]


def _join(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _decode_bf16(data: bytes) -> "Array":
    import numpy as np

    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _decode_f8(exponent_bits: int, data: bytes) -> "Array":
    import numpy as np

    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & (2**mantissa_bits - 1)
    # A zero exponent marks a subnormal: no implied leading one.
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    table = fraction * 2.0 ** (np.maximum(exponent, 1) - bias) * np.where(codes < 128, 1, -1)
    # E4M3 keeps one NaN code and no infinity; E5M2 reserves its whole last exponent.
    table[(codes & 127) == 127 if exponent_bits == 4 else exponent == 31] = np.nan
    return np.take(table.astype("<f4"), np.frombuffer(data, "u1"))


def _decode_plain(dtype: str, width: str = "<f4") -> Callable[[bytes], "Array"]:
    def decode(data: bytes) -> "Array":
        import numpy as np

        return np.frombuffer(data, dtype).astype(width, copy=False)

    return decode


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "BF16": _decode_bf16,
    "F16": _decode_plain("<f2"),
    "F32": _decode_plain("<f4"),
    "F64": _decode_plain("<f8", "<f8"),
    "F8_E4M3": lambda data: _decode_f8(4, data),
    "F8_E5M2": lambda data: _decode_f8(5, data),
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter; what could not be read is a finding, not a guess.

    `raw` is the JSON of the configuration, `config` its typed form when PEFT would accept it;
    `beside` are the names in its folder.
    """

    name: str
    raw: Mapping[str, object]
    config: AdapterConfig | None
    tensors: Mapping[str, Tensor]
    contents: Contents
    weight_bytes: int | None
    pickle_bytes: int | None
    beside: tuple[str, ...]
    findings: tuple[Finding, ...]


def read_adapter(source: Source) -> Adapter:
    """Read the configuration and the header; nothing is executed, unpickled or loaded whole.

    Raises ModelError when the adapter is of another method than LoRA, cannot be reached, or lies
    in another folder than this.
    """
    raw, findings = _read_config(source)
    problems = check_config(raw)
    # Without its method named, a configuration can still be held against names and sizes.
    config = None if findings or problems else build_config(raw)
    findings += [*problems, *([] if findings else check_method(raw))]
    method = raw.get("peft_type")
    if isinstance(method, str) and method in PEFT_TYPES:
        raise ModelError(source.name, expected="a LoRA adapter", found=f"peft_type {method}")
    tensors, weight_findings = read_weights(source)
    beside = tuple(source.names()) if isinstance(source, Folder) else ()
    if foreign := _find_foreign(source, raw, tensors, beside):
        raw, config, tensors, findings, weight_findings = {}, None, {}, [foreign], []
    elif isinstance(source, Folder) and not {*ADAPTER_FILES} & {*beside}:
        _point_to_adapters(source, beside)
    return Adapter(
        name=source.name,
        raw=raw,
        config=config,
        tensors=tensors,
        contents=sort_keys(tensors),
        weight_bytes=source.size(WEIGHTS_FILE),
        pickle_bytes=None if tensors else source.size(PICKLE_FILE),
        beside=beside,
        findings=(*findings, *weight_findings),
    )


def _find_foreign(
    source: Source,
    raw: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    beside: Sequence[str],
) -> Finding | None:
    """Recognise the folder of another tool, by its settings, its keys or the names of its files."""
    is_peft = "peft_type" in raw
    if not tensors and WEIGHTS_FILE not in beside and not is_peft:
        names = [name for name in beside if name.endswith(".safetensors")]
        tensors = {k: t for name in names[:3] for k, t in read_weights(source, name)[0].items()}
    # Most keys are as PEFT writes them, and no other tool writes those.
    own = (".lora_A.weight", ".lora_B.weight")
    foreign = [k for k in tensors if not (k.startswith(PREFIX) and k.endswith(own))]
    for form in FORMATS:
        setting = next((key for key in form.settings if key in raw and not is_peft), None)
        key = next((key for key in foreign if form.keys.search(key)), None)
        # A name alone says less than what PEFT itself wrote beside it.
        is_bare = not is_peft and WEIGHTS_FILE not in beside
        file = next((name for name in beside if is_bare and form.files.fullmatch(name)), None)
        if where := key or setting or file:
            return finding(
                "foreign-format",
                evidence=where,
                expected="an adapter as PEFT writes it",
                found=f"the format of {form.tool}",
                remedy=form.remedy,
            )
    return None


_WHOLE_MODEL = re.compile(
    r"(model|pytorch_model|consolidated)([.-]\d+(-of-\d+)?)?\.(safetensors|bin|pth)(\.index\.json)?"
)
# What the checkpoints of sharded trainings hold, and what joins each of them.
_CHECKPOINTS = (
    (
        re.compile(r"global_step\d+|zero_to_fp32\.py|latest"),
        "a checkpoint of DeepSpeed",
        "Join its partitions: python zero_to_fp32.py . joined; then save_pretrained with them.",
    ),
    (
        re.compile(r"pytorch_model_fsdp_\d+|.*\.distcp|\.metadata"),
        "a checkpoint of FSDP",
        "Join its shards: accelerate merge-weights FOLDER joined; then save_pretrained with them.",
    ),
    (
        re.compile(r".*\.(zip|tar|tar\.gz|tgz|7z)"),
        "an archive",
        "Unpack it, and check the folder that it holds.",
    ),
)
_MAX_FOLDERS = 300  # Looked into for an adapter below a folder that holds none.


def _point_to_adapters(source: Folder, beside: Sequence[str]) -> None:
    """Raise ModelError where the adapter lies below or above, or where this is a whole model."""
    near = _adapters_below(source.path)
    if not near and CONFIG_FILE in _names_in(source.path.parent):
        near = [source.path.parent]
    whole = next((name for name in beside if _WHOLE_MODEL.fullmatch(name)), None)
    if near:
        names = [os.path.relpath(path, source.path) for path in near[:4]]
        listed = ", ".join(printable(name, 80) for name in names)
        more = f" and {len(near) - 4} more" if len(near) > 4 else ""
        raise ModelError(
            source.path,
            expected=f"{CONFIG_FILE} in this folder",
            found=f"adapters in {listed}{more}",
            remedy=f"Check one of them: postmortem check {printable(near[-1], 400)}",
        )
    if whole and "config.json" in beside:
        raise ModelError(
            source.path,
            expected="an adapter",
            found=f"a whole model ({printable(whole)}), as a merge or full training writes it",
            remedy="It needs no adapter: load it with from_pretrained, and check the adapter from "
            "before the merge.",
        )
    for pattern, kind, remedy in _CHECKPOINTS:
        if name := next((name for name in beside if pattern.fullmatch(name)), None):
            raise ModelError(
                source.path,
                expected=f"{CONFIG_FILE} and {WEIGHTS_FILE}",
                found=f"neither, but {kind} ({printable(name, 80)})",
                remedy=remedy,
            )


def _adapters_below(path: Path) -> list[Path]:
    """Find the folders below that hold an adapter's configuration, in the order of their steps."""
    found, waiting = [], [path]
    for _ in range(_MAX_FOLDERS):
        if not waiting:
            break
        folder = waiting.pop(0)
        if folder != path and CONFIG_FILE in _names_in(folder):
            found.append(folder)
        elif len(folder.relative_to(path).parts) < 3:
            waiting += _folders_in(folder)
    return sorted(found, key=lambda p: [int(n) for n in re.findall(r"\d{1,18}", p.name)])


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder)]


def _folders_in(folder: Path) -> list[Path]:
    # A link could lead anywhere, and in circles.
    return [Path(e.path) for e in _entries(folder) if e.is_dir(follow_symlinks=False)]


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(itertools.islice(entries, 1000), key=lambda entry: entry.name)
    except OSError:
        return []


def _read_config(source: Source) -> tuple[Mapping[str, object], list[Finding]]:
    size, expected = source.size(CONFIG_FILE), f"a JSON object of at most {MAX_JSON:,} bytes"
    if size is None and not source.is_local:
        raise ModelError(source.name, expected=CONFIG_FILE, found="no such file, or no access")
    if size is None or size > MAX_JSON:
        found = "no such file" if size is None else f"{size:,} bytes"
        return {}, [invalid(CONFIG_FILE, expected=expected, found=found)]
    try:
        raw = parse_json(source.read(CONFIG_FILE, 0, MAX_JSON))
    except UntrustedError as error:
        return {}, [invalid(CONFIG_FILE, expected=expected, found=str(error))]
    if not isinstance(raw, dict):
        return {}, [invalid(CONFIG_FILE, expected=expected, found=f"a {type(raw).__name__}")]
    return raw, []
