"""Headless Chromium for tests: all pages of a site at the width of a phone, in one process."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--allow-file-access-from-files",
)
# Chromium's own window is never narrower than 500 px, so each page stands in a frame. All of them
# lie at the window's corner: what is out of sight may not be drawn.
STYLE = "iframe { position: absolute; top: 0; left: 0; width: 390px; height: 900px; border: 0 }"
# The document of an empty frame is held open, and with it the page that the browser waits for,
# until each frame has loaded and its scripts had a second.
MEASURE = """
const frames = [...document.querySelectorAll("iframe")];
const hold = document.body.appendChild(document.createElement("iframe")).contentDocument;
hold.open();
const look = frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const all = name => [...page.querySelectorAll(name)];
  Object.assign(frame.dataset, {
    fits: root.scrollWidth <= 390,
    narrow: all(".pm-narrow").every(figure => figure.offsetWidth > 0)
      && all(".pm-wide").every(figure => figure.offsetWidth === 0),
    ran: root.dataset.ran ?? "",
    found: all("#search-results a").map(link => link.getAttribute("href")).join(" "),
  });
};
const loads = ({contentDocument: page}) =>
  page && (page.URL === "about:blank" || page.readyState !== "complete");
const waiting = setInterval(() => {
  if (frames.some(loads)) return;
  clearInterval(waiting);
  setTimeout(() => {
    frames.filter(frame => frame.contentDocument).forEach(look);
    hold.close();
  }, 1000);
}, 100);
"""

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; install it with `apt-get install chromium`"
)


@dataclass(frozen=True)
class Seen:
    """What a page measured of itself at 390 px, after its scripts ran.

    `narrow` says that each figure shows its narrow drawing alone, `ran` what a script left in the
    root's `data-ran`, `found` the links that a search page lists.
    """

    fits: bool
    narrow: bool
    ran: str
    found: tuple[str, ...]


@dataclass(frozen=True)
class Visit:
    """What a browser saw: pages by address, requests beyond local files, errors on the console."""

    pages: dict[str, Seen]
    external: tuple[str, ...]
    console: tuple[str, ...]


def visit(addresses: Iterable[str], folder: Path) -> Visit:
    """Open local pages, given as `file:` addresses, side by side and let their scripts run."""
    driver, log = folder / "frames.html", folder / "net.json"
    frames = "".join(f'<iframe src="{address}"></iframe>' for address in addresses)
    text = f"<style>{STYLE}</style><body>{frames}<script>{MEASURE}</script></body>"
    driver.write_text(f"<!doctype html><meta charset='utf-8'>{text}")
    result = subprocess.run(
        [
            str(CHROMIUM),
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            "--window-size=1280,1200",
            "--timeout=300000",
            "--dump-dom",
            driver.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,  # only a hang reaches it
        check=True,
    )
    console = re.findall(r"CONSOLE.*(?:Uncaught|Failed|Refused|[Ee]rror).*", result.stderr)
    return Visit(read_frames(result.stdout), external_requests(log), tuple(console))


def read_frames(dom: str) -> dict[str, Seen]:
    """What each frame measured, by its address; one that never loaded is not among them."""
    found = {}

    class Frames(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = {name: value or "" for name, value in attrs}
            if tag == "iframe" and "data-fits" in given:
                found[given["src"]] = Seen(
                    fits=given["data-fits"] == "true",
                    narrow=given["data-narrow"] == "true",
                    ran=given["data-ran"],
                    found=tuple(given["data-found"].split()),
                )

    Frames().feed(dom)
    return found


def external_requests(log: Path) -> tuple[str, ...]:
    """The addresses beyond local files that the pages asked for, from Chromium's network log."""
    requests = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    asked = {
        request["url"]
        for request in requests
        # The browser's own errands have no origin; those of a page do.
        if "url" in request and request.get("initiator", "not an origin") != "not an origin"
    }
    local = ("file:", "data:", "chrome:", "about:", "blob:")
    return tuple(sorted(url for url in asked if not url.startswith(local)))
