"""One real build of the site of a case of one's own: another architecture, another task."""

import html
import json
import re
import subprocess
import sys

import own
import pytest
import torch
from browser import needs_browser, visit
from building import ENVIRONMENT, clone, edited, holding, longer, make, plan
from safetensors.torch import load, save

from postmortem.experiments.records import read_records

PARTS = ("book/_static", "notebooks", "Snakefile", "_config.yml", "_toc.yml")
SCRIPT = "<script>alert(1)</script>"
TITLE = f'<b>Films</b> & "friends" {SCRIPT}'
GOOD, BAD = "<i>good</i>", "<i>bad</i>"
RUNS = ("files", "attempt_ask", "adapter_swap", "controls", "diagnosis")
# Nothing of the shipped incident may stand in another case's site.
WORDS = ("qwen", "incident's", "jigsaw", "moderation", "write-up", "every prediction was")


@pytest.fixture(scope="module")
def project(tmp_path_factory, pytestconfig):
    """A project with one case of its own, whose texts and labels are hostile."""
    folder = clone(pytestconfig.rootpath, tmp_path_factory.mktemp("own"), parts=PARTS)
    torch.set_num_threads(1)
    base = own.make_base(folder / "models/base")
    own.make_adapter(folder / "adapters/mine", base)
    lines = ["id,review,verdict,shelf"]
    for number, (text, label) in enumerate(own.REVIEWS[:16]):
        odd = f"{SCRIPT} {text}" if number < 4 else text
        lines.append(f'<u>{number}</u>,"{odd}",{GOOD if label else BAD},{SCRIPT} {number % 2}')
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    given = {
        "base": "models/base",
        "suspect": "adapters/mine",
        "data": "rows.csv",
        "id": "id",
        "text": "review",
        "label": "verdict",
        "group": "shelf",
        "positive": GOOD,
        "contract": "choice",
        "answers": "negative,positive",
        "question": "{review} Sentiment:",
        "title": TITLE,
        "symptom": f"It says {SCRIPT}",
    }
    options = [part for key, value in given.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "postmortem", "new", "films", *options]
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def built(project):
    """The project after its first build."""
    result = make(project, "--case", "cases/films.yml", "--cores", "1")
    assert result.returncode == 0, result.stderr
    return project, result


@pytest.fixture(scope="module")
def pages(built):
    """The text of each built page by its name."""
    site = built[0] / "_build/cases/films/_build/html"
    return {str(path.relative_to(site)): path.read_text() for path in sorted(site.rglob("*.html"))}


def test_a_short_case_becomes_a_whole_site(built, pages):
    """From a file of at most 25 lines come all pages and notebooks, and a line that counts them."""
    project, result = built
    assert len((project / "cases/films.yml").read_text().splitlines()) <= 25
    found = re.fullmatch(
        r"book: (\S+/index\.html) \((\d+) pages, (\d+) records, \d+ s\)\n", result.stdout
    )
    assert found
    assert (project / found[1]).is_file()
    prose = {f"{path.stem}.html" for path in (project / "cases/films").glob("*.md")}
    notebooks = {f"notebooks/{name}.html" for name in RUNS}
    assert prose | notebooks <= pages.keys()
    assert int(found[2]) == len(prose | notebooks)
    run = project / "_build/runs/films/own/records"
    assert int(found[3]) == sum(len(read_records(p).records) for p in run.glob("*.jsonl"))


def test_no_word_of_the_shipped_incident_is_in_it(pages):
    """No page of another case names the shipped incident, its model, its data or its task."""
    for name, text in pages.items():
        shown = html.unescape(re.sub(r"<[^>]+>", " ", text)).lower()
        assert [word for word in WORDS if word in shown] == [], name


def test_hostile_text_is_text(pages):
    """Markup in a title, a symptom, a row, an id, a group or a label reaches the page escaped."""
    assert "&lt;b&gt;Films&lt;/b&gt;" in pages["summary.html"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages["evidence.html"]
    for name, text in pages.items():
        for markup in (SCRIPT, "<b>Films", "<i>good", "<u>1</u>"):
            assert markup not in text, name


def test_no_page_lacks_a_value(built, pages):
    """No page shows the mark of a missing key, a traceback or a path of this machine."""
    for name, text in pages.items():
        assert "??" not in re.sub(r"<[^>]+>", " ", text), name
        assert "Traceback" not in text
        assert str(built[0]) not in text, name


def test_numbers_on_a_page_are_those_of_the_records(built, pages):
    """An AUC on the front page is the one of the sealed record."""
    path = built[0] / "_build/runs/films/own/records/adapter_swap.jsonl"
    key = "swap.base.ask.auc"
    found = next(r for r in read_records(path).records if getattr(r, "key", "") == key)
    assert f">{found.value:.2f}<" in pages["summary.html"]


@needs_browser
def test_every_page_opens_cleanly_and_asks_for_nothing(built, pages, tmp_path):
    """In a real browser no page makes an external request, logs an error or scrolls sideways."""
    site = built[0] / "_build/cases/films/_build/html"
    addresses = {(site / name).as_uri() for name in pages}
    seen = visit(addresses, tmp_path)
    assert seen.pages.keys() == addresses
    assert seen.external == ()
    assert seen.console == ()
    assert [address for address, page in seen.pages.items() if not page.fits] == []


def test_without_changes_nothing_runs(built):
    """A second build runs no step."""
    result = make(built[0], "--case", "cases/films.yml", "--cores", "1")
    assert (result.returncode, result.stderr) == (0, "")


NOTEBOOKS = {f"notebook_{name}" for name in RUNS}


def test_an_edited_page_runs_no_notebook(built):
    """After a change of prose the pages alone are built."""
    with longer(built[0] / "cases/films/impact.md", "\nOne more sentence.\n"):
        assert plan(built[0]) == {"book"}


def test_another_title_runs_no_notebook(built):
    """After a change of the case's title and symptom only what shows them is made again."""
    case = built[0] / "cases/films.yml"
    text = case.read_text().replace("Films", "Pictures").replace("It says", "It said")
    with holding(case, text.encode()):
        assert plan(built[0]) == {"publish", "book"}


def test_changed_rows_are_asked_again(built):
    """After an edit of the data file every notebook runs again."""
    with edited(built[0] / "rows.csv", "lovely", "lively"):
        assert plan(built[0]) == {*NOTEBOOKS, "publish", "book"}


def test_a_changed_adapter_is_asked_again(built):
    """After a change of the adapter's weights in place every notebook runs again."""
    weights = built[0] / "adapters/mine/adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load(weights.read_bytes()).items()}
    with holding(weights, save(tensors, metadata={"format": "pt"})):
        assert plan(built[0]) == {"world", *NOTEBOOKS, "publish", "book"}


def test_a_figure_is_drawn_for_both_widths(built):
    """Each figure of such a case is drawn, for a page and for a phone, or says why it is not."""
    folder = built[0] / "_build/runs/films/own/figures"
    told = json.loads((folder / "figures.json").read_text())
    # An untrained model's answers are no choice.
    assert told["missing"] == {"values": "no answer could be read"}
    for name in told["alt"]:
        assert (folder / f"{name}.wide.svg").is_file()
        assert (folder / f"{name}.narrow.svg").is_file()
