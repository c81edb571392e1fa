"""The safetensors header of an adapter, and a scan of its bytes in chunks.

The header reader is our own: the library's opens local files only, stops at the first fault
without naming the tensor, and accepts headers of 100 MB. This one names the tensor, reads through
range requests, and stops at 8 MB.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postmortem.adapter_config import is_count
from postmortem.catalogue import Finding, finding
from postmortem.sources import ADAPTER_FILES, Folder, Source
from postmortem.untrusted import UntrustedError, parse_json, printable

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_, WEIGHTS_FILE, PICKLE_FILE = ADAPTER_FILES
MAX_JSON = 8_000_000  # Bytes. A header of 10,000 tensors is under 2 MB; a config is a few kB.
MAX_DIMENSIONS = 8
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


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What a tensor's bytes hold: `largest` is the greatest magnitude, `norm` is Frobenius."""

    is_finite: bool
    largest: float
    norm: float


def read_weights(source: Source) -> tuple[dict[str, Tensor], list[Finding]]:
    """Read the header; a file that is absent, damaged or a pickle gives a finding instead."""
    size = source.size(WEIGHTS_FILE)
    if size is None:
        return {}, [_absent(source)]
    head = source.read(WEIGHTS_FILE, 0, 8)
    length = int.from_bytes(head, "little")
    if problem := _length_problem(head, length, size):
        return {}, [problem]
    if isinstance(source, Folder) and source.is_mostly_holes(WEIGHTS_FILE):
        found = f"a sparse file of {size:,} bytes, less than half of them stored"
        return {}, [_corrupt(found, expected="a file copied in full")]
    try:
        header = parse_json(source.read(WEIGHTS_FILE, 8, length))
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
    weights = [n for n in beside if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    found = f"{', '.join(weights[:3])} beside it" if weights else "no such file"
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
    while left > 0 and (data := read(min(CHUNK, left))):
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
    return TensorStats(finite, largest, math.sqrt(squares))


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
