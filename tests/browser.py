"""Headless Chromium for tests: a page's DOM after its scripts ran, requests and console."""

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
    """What a browser saw of a page: its DOM, requests beyond local files, console messages."""

    dom: str
    external: tuple[str, ...]
    console: tuple[str, ...]


def visit(page: Path, folder: Path, *, width: int = 1280) -> Visit:
    """Open a local page in headless Chromium and let its scripts run."""
    log = folder / "net.json"
    result = subprocess.run(
        [
            str(CHROMIUM),
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            f"--window-size={width},1200",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page.resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    asked = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
    local = ("file:", "data:", "chrome:", "chrome-extension:", "devtools:", "about:", "blob:")
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    external = tuple(sorted(url for url in asked if not url.startswith(local)))
    return Visit(result.stdout, external, tuple(console))
