"""Where an adapter's files come from: a folder, or a hub repository read by range requests."""

import os
import stat
from pathlib import Path
from typing import Any, Protocol

from postmortem.errors import ModelError
from postmortem.untrusted import printable

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
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(1000), strict=False))


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
            expected="an adapter folder or a reachable hub repository",
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


def is_hub_id(text: str) -> bool:
    """Tell whether a text that is no path can be a hub id: owner/name."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


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
