import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from handmade import QWEN, write

SOURCE = Path(__file__).parent.parent / "src"


class Hub(BaseHTTPRequestHandler):
    """A hub that serves files of a folder by ranges, redirecting weights as the real one does."""

    def do_GET(self):
        """Serve /OWNER/NAME/resolve/main/FILE, or the same under /cdn after a redirect."""
        match = re.fullmatch(r"(/cdn)?/([\w-]+)/([\w-]+)/resolve/main/([\w.]+)", self.path)
        path = self.root / match[3] / match[4] if match else self.root / "nothing"
        if not path.is_file():
            self.send_error(404)
        elif path.suffix == ".safetensors" and match is not None and not match[1]:
            self.send_response(302)
            self.send_header("Location", f"/cdn{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(path)

    def _send(self, path):
        data, asked = path.read_bytes(), self.headers.get("Range")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        piece = data
        if wanted and not self.ignores_ranges:
            start, end = int(wanted[1]), int(wanted[2])
            piece = data[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        try:
            self.wfile.write(piece)
            self.sent[path.name] = self.sent.get(path.name, 0) + len(piece)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format, *args):
        """Keep the test's output quiet."""


@pytest.fixture
def hub(tmp_path):
    """A running hub over tmp_path."""
    Hub.root, Hub.sent, Hub.ignores_ranges = tmp_path, {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def check(hub, *arguments):
    """Run `postmortem check` against the hub in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "NO_PROXY": "*"}
    command = [sys.executable, "-m", "postmortem", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)


def test_header_is_read_by_range(hub, tmp_path):
    """An adapter on a hub is checked from its header; its tensors are not downloaded."""
    weights = write(tmp_path / "lora") / "adapter_model.safetensors"
    done = check(hub, "acme/lora", "--format", "json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["verdict"]) == (0, "fits"), done
    assert "tensor bytes were not read" in report["notes"]
    assert Hub.sent["adapter_model.safetensors"] < 0.2 * weights.stat().st_size


def test_server_without_ranges(hub, tmp_path):
    """A server that ignores ranges is read only as far as the header goes."""
    write(tmp_path / "lora")
    Hub.ignores_ranges = True
    assert check(hub, "acme/lora").returncode == 0


def test_base_from_the_hub(hub, tmp_path):
    """A base can be a hub id: only its config.json is read."""
    write(tmp_path / "lora", base_model_name_or_path="acme/base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(QWEN))
    done = check(hub, "acme/lora", "--base", "acme/base")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "fits: acme/lora on acme/base")


def test_pickle_on_the_hub(hub, tmp_path):
    """A repository with a pickle in place of safetensors is an error finding."""
    folder = write(tmp_path / "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    done = check(hub, "acme/lora")
    assert done.returncode == 1
    assert "unsafe-pickle" in done.stdout


@pytest.mark.parametrize(
    ("adapter", "closed"), [("acme/nothing", False), ("bad id/x y", False), ("acme/lora", True)]
)
def test_what_cannot_be_reached_is_one_line(hub, adapter, closed):
    """A repository that is not there or cannot be, or a silent hub, ends in exit 2 and one line."""
    if closed:
        hub.server_close()
    done = check(hub, adapter)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done
