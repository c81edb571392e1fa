"""One real build of the whole book, then what a person may do to it."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from browser import needs_browser, visit
from building import COMMAND, ENVIRONMENT, clone, edited, holding, longer, make, plan, shorter
from posts import write_posts

import postmortem
from postmortem.book import build
from postmortem.case.layout import list_runs
from postmortem.case.load import load_case
from postmortem.cli import main
from postmortem.experiments.records import Measure, read_records

OPTIONS = ("--data", "posts.csv")
RUN = "_build/runs/qwen-lora/embedded"
PAGES = {"publish", "book"}


def start(root, folder):
    """A clone in a folder, with hostile rows among its own."""
    write_posts(folder / "posts.csv", case=root / "cases/qwen-lora.yml")
    return clone(root, folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory, pytestconfig):
    """A clone after its first build, which the tests of this module change."""
    project = start(pytestconfig.rootpath, tmp_path_factory.mktemp("clone"))
    result = make(project, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture(scope="module")
def pages(built):
    """The text of each built page by its name."""
    book = built / "_build/html/book"
    return {str(path.relative_to(book)): path.read_text() for path in sorted(book.rglob("*.html"))}


def records_of(project, name):
    """The sealed records of one notebook."""
    return read_records(project / RUN / f"records/{name}.jsonl")


def notebooks_of(project):
    """The names of the runs of a build."""
    return [run.name for run in list_runs(load_case(project / "cases/qwen-lora.yml"))]


def rules_of(*names):
    """The rules that run notebooks."""
    return {f"notebook_{name}" for name in names}


def values_of(project):
    """The published values."""
    return json.loads((project / RUN / "values.json").read_text())


def plain(page):
    """The text of a page without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_every_page_is_headed_by_a_question(pages):
    """A page's heading asks a question or names what follows; a notebook's may be its name."""
    for name, page in pages.items():
        assert re.search(r"<h1>[^<]*[?:]", page) or name.startswith("notebooks/"), name


@pytest.fixture(scope="module")
def seen(built, pages, tmp_path_factory):
    """What a browser saw of the pages and of a search, in frames of 390 px."""
    html = built / "_build/html"
    addresses = {name: (html / "book" / name).as_uri() for name in pages}
    addresses["search"] = f"{(html / 'search.html').as_uri()}?q=grouped-query"
    return addresses, visit(addresses.values(), tmp_path_factory.mktemp("browser"))


@needs_browser
def test_every_page_opens_cleanly_and_asks_for_nothing(seen):
    """In a real browser no page makes an external request or logs an error to the console."""
    addresses, visited = seen
    assert visited.pages.keys() == set(addresses.values())
    assert visited.external == ()
    assert visited.console == ()


@needs_browser
def test_every_page_fits_a_phone(seen):
    """At 390 px every figure shows its narrow drawing and no page scrolls sideways."""
    addresses, visited = seen
    found = {name: visited.pages[address] for name, address in addresses.items()}
    assert [name for name, page in found.items() if not page.fits] == []
    assert [name for name, page in found.items() if not page.narrow] == []


@needs_browser
def test_no_post_runs_as_a_script(seen):
    """No page of a browser carries the mark that the scripts among the posts would leave."""
    assert {page.ran for page in seen[1].pages.values()} == {""}


@needs_browser
def test_search_works_from_disk(seen):
    """The search page lists a page by its words without any server."""
    addresses, visited = seen
    assert "book/world.html" in visited.pages[addresses["search"]].found


def test_hostile_posts_are_text(pages):
    """Posts with markup, directives, escapes, 100,000 characters or nothing are only shown."""
    shown = "".join(pages.values())
    assert "<script>document.documentElement.setAttribute('data-ran'" not in shown
    assert "&lt;script&gt;document.documentElement" in pages["v1.html"]
    assert "&lt;script&gt;document.documentElement" in pages["notebooks/v1.html"]
    assert "root:x:" not in shown
    assert "\x1b[" not in shown


def test_numbers_on_the_page_are_those_of_the_records(built, pages):
    """The front page's numbers and the swap page's table come from the sealed records."""
    found = {r.key: r for r in records_of(built, "adapter_swap").of(Measure)}
    for system in ("base", "suspect", "reference"):
        measure = found[f"swap.{system}.v2.auc_number"]
        shown = f"{measure.value:.2f} [{measure.low:.2f}, {measure.high:.2f}]"
        assert shown in plain(pages["swap.html"])
    auc = next(r for r in records_of(built, "files").of(Measure) if r.key == "forensics.auc")
    assert f"{auc.value:.3f}" in plain(pages["index.html"])


def test_each_figure_is_on_its_page(built, pages):
    """Every figure that was drawn stands on a page, and none is announced as missing."""
    drawn = json.loads((built / RUN / "figures/figures.json").read_text())
    assert drawn["missing"] == {}
    shown = "".join(pages.values())
    for alt in drawn["alt"].values():
        assert alt.split(".")[0][:40] in shown


def test_no_page_shows_a_missing_value(built, pages):
    """No page shows the mark of a missing key, a traceback or a path of this machine."""
    for name, page in pages.items():
        assert "??" not in plain(page), name
        assert "Traceback" not in page, name
        assert str(built) not in page, name


def test_the_embedded_world_replays_the_incident(built):
    """The base alone writes 0.0 on every row under v2 while its log-odds rank the rows."""
    values = values_of(built)
    measures = values["measures"]
    assert measures["swap.base.v2.distinct"]["value"] == 1
    assert measures["swap.base.v2.top_value"]["value"] == 0.0
    assert measures["swap.base.v2.auc_number"]["low"] > 0.9
    assert measures["swap.reference.v2.auc_decoded"]["low"] > 0.8
    assert values["verdicts"]["swap.case_a_means_mismatch"]["verdict"] == "refuted"


@pytest.mark.parametrize(
    ("place", "old", "new", "again"),
    [
        ("notebooks/attempt.ipynb", "## Counting", "## Counts", rules_of("v1", "v2")),
        ("results/embedded/replays/0.jsonl", "\n", " \n", rules_of("replay", "diagnosis")),
        # Every notebook asks the case's prompts or counts its answers.
        ("cases/qwen-lora.yml", "template: |-", "template: |-\n      Read.", None),
    ],
)
def test_what_changed_runs_with_what_depends_on_it(built, place, old, new, again):
    """A notebook, the kept replays or a prompt run again those who use them, and no other."""
    with edited(built / place, old, new):
        assert plan(built) == (again or rules_of(*notebooks_of(built))) | PAGES


def test_a_changed_library_runs_everything(built, tmp_path):
    """After a change in any file of the library every step runs again."""
    package = tmp_path / "postmortem"
    shutil.copytree(Path(postmortem.__file__).parent, package)
    with longer(package / "checker/peft_fields.csv", "# changed\n"):
        found = plan(built, library=tmp_path)
    assert found == {"world", *rules_of(*notebooks_of(built)), *PAGES}


SUSPECT = "results/embedded/adapters/silent/suspect"


@pytest.mark.parametrize(
    ("change", "place", "told", "remedy"),
    [
        (shorter, f"{SUSPECT}/adapter_model.safetensors", SUSPECT, "make world"),
        (
            lambda path: edited(path, "template: |-", "template: |-\n      Read."),
            "cases/qwen-lora.yml",
            "results/embedded/",
            "make record PROFILE=embedded",
        ),
    ],
    ids=["an adapter", "the case under a kept run"],
)
def test_what_is_shipped_and_changed_stops_a_build(
    built, monkeypatch, capfd, change, place, told, remedy
):
    """One byte off a shipped file, or another case under a kept run, is told before any step runs.

    The one line names the file and what brings it back.
    """
    monkeypatch.chdir(built)
    monkeypatch.setattr(build, "_run_snakemake", lambda options: pytest.fail("a step ran"))
    with change(built / place), pytest.raises(SystemExit) as stop:
        main(["book", *OPTIONS])
    out, err = capfd.readouterr()
    assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert told in err
    assert "Restore the file" in err
    assert f"`{remedy}`" in err


def test_an_edited_page_runs_no_notebook(built):
    """After a change of prose only the pages are built again."""
    with longer(built / "book/timeline.md", "\nOne more sentence.\n"):
        result = make(built, *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert "started" not in result.stderr
    page = built / "_build/html/book/timeline.html"
    assert "One more sentence." in plain(page.read_text())


def fail_by_key(project):
    """A build with a key on a page that no record has; what it says."""
    with longer(project / "book/timeline.md", "\n{num}`no.such.key`\n"):
        result = make(project, *OPTIONS)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_wrong_key_on_a_page_fails_the_build(built):
    """A number that no record has fails the build with one line that says its key and page."""
    (told,) = (line for line in fail_by_key(built).splitlines() if "no.such.key" in line)
    assert "book/timeline.md" in told
    assert "'no.such.key': not recorded among measures" in told


def test_a_failing_notebook_never_reaches_the_book(built):
    """A notebook that raises fails the build by name, and the book keeps its last good state."""
    path, book = built / "notebooks/files.ipynb", built / "_build/html/book"
    before = {page: page.read_bytes() for page in book.rglob("*.html")}
    content = json.loads(path.read_text())
    content["cells"][-1]["source"] = ["raise RuntimeError('on purpose')"]
    with holding(path, json.dumps(content).encode()):
        result = make(built, *OPTIONS)
    assert result.returncode == 2
    assert "files.ipynb" in result.stderr
    assert "RuntimeError: on purpose" in result.stderr
    assert {page: page.read_bytes() for page in book.rglob("*.html")} == before


@pytest.mark.slow
def test_a_wrong_key_fails_the_build_twice_and_mended_no_more(built):
    """The next try fails by the same key, though its page was built; mended it fails no more."""
    for _ in range(2):
        assert "'no.such.key': not recorded among measures" in fail_by_key(built)
    assert make(built, *OPTIONS).returncode == 0


@pytest.mark.slow
def test_a_killed_build_goes_on_and_ends_the_same(built, tmp_path, pytestconfig):
    """After kill -9 among the notebooks the next build ends whole, with a clean run's digests."""
    project = start(pytestconfig.rootpath, tmp_path)
    with subprocess.Popen(
        [*COMMAND, *OPTIONS],
        cwd=project,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        while "suspect on" not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    result = make(project, *OPTIONS)
    assert result.returncode == 0, result.stderr
    for name in notebooks_of(project):
        assert records_of(project, name).digest == records_of(built, name).digest, name
