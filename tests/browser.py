"""Headless Chromium for tests: a page's DOM after its scripts ran, requests and console."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--allow-file-access-from-files"),
)


@dataclass(frozen=True)
class Visit:
    """What a browser saw of a page: its DOM, requests beyond local files, errors on its console."""

    dom: str
    external: tuple[str, ...]
    console: tuple[str, ...]


def visit(page: Path, folder: Path, *, query: str = "") -> Visit:
    """Open a local page in headless Chromium and let its scripts run."""
    log = folder / "net.json"
    result = subprocess.run(
        [
            str(CHROMIUM),
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            "--window-size=1280,1200",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.resolve().as_uri() + (f"?{query}" if query else ""),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    requests = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    asked = {
        request["url"]
        for request in requests
        # The browser's own errands have no origin; those of a page do.
        if "url" in request and request.get("initiator", "not an origin") != "not an origin"
    }
    local = ("file:", "data:", "chrome:", "about:", "blob:")
    console = re.findall(r"CONSOLE.*(?:Uncaught|Failed|Refused|[Ee]rror).*", result.stderr)
    return Visit(
        result.stdout,
        tuple(sorted(url for url in asked if not url.startswith(local))),
        tuple(console),
    )
