"""A book from posts that try to be more than text, on a base alone, which takes no training."""

import csv

import pytest
from browser import CHROMIUM, visit
from building import clone, make

SCRIPTS = (
    "<script>document.documentElement.setAttribute('data-ran', '1')</script>",
    "<img src=x onerror=\"document.documentElement.setAttribute('data-ran', '2')\">",
    "```{include} /etc/passwd\n```",
    "{include}`/etc/passwd` $math$ $$e^x$$ {num}`rows.count`",
    "\x1b[31mred\x1b[0m \u202ereversed \u0000".replace("\u0000", ""),
    "</td></table><script>document.documentElement.setAttribute('data-ran', '3')</script>",
    "long " * 20_000,
    "",
    "{rule} {body} {{7*7}} %s <|im_end|>",
    "\U0001f600 \u4f60\u597d \u0645\u0631\u062d\u0628\u0627",
)


@pytest.fixture
def project(untrained, tmp_path, pytestconfig):
    """A clone whose profile is an untrained base alone."""
    folder = clone(pytestconfig.rootpath, tmp_path / "project")
    case = folder / "cases/qwen-lora.yml"
    text = case.read_text()
    assert "    base: embedded\n" in text
    case.write_text(text.replace("    base: embedded\n", f"    base: {untrained / 'base'}\n"))
    return folder


def test_hostile_posts_are_text_and_run_nothing(project, tmp_path):
    """Posts with markup, directives, escapes, 100,000 characters or nothing are only shown."""
    example = {
        f"{kind}_example_{n}": SCRIPTS[n] for kind in ("positive", "negative") for n in (1, 2)
    }
    rows = [
        {"row_id": f"<b>{i}</b>$x$", "body": post, "rule": SCRIPTS[0]} | example
        for i, post in enumerate(SCRIPTS)
    ]
    data = tmp_path / "posts.csv"
    with data.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    result = make(project, "--data", str(data))
    assert result.returncode == 0, result.stderr
    pages = sorted((project / "_build/html/book").rglob("*.html"))
    shown = "".join(page.read_text() for page in pages)
    assert "<script>document.documentElement.setAttribute('data-ran'" not in shown
    assert "&lt;script&gt;document.documentElement" in shown
    assert "root:x:" not in shown
    assert "\x1b[" not in shown
    if CHROMIUM:
        for name in ("v1", "swap", "notebooks/01_v1_run"):
            (tmp_path / name).mkdir(parents=True)
            seen = visit(project / f"_build/html/book/{name}.html", tmp_path / name)
            assert "data-ran" not in seen.dom.split("<body")[0]
            assert seen.external == ()
