"""One real build of the whole book, then what a person may do to it."""

import json
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from browser import CHROMIUM, visit
from building import COMMAND, ENVIRONMENT, clone, make

from postmortem.records import read_records

needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium here; install it with `apt-get install chromium`",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory, pytestconfig):
    """A clone that the tests of this module build and change."""
    return clone(pytestconfig.rootpath, tmp_path_factory.mktemp("clone") / "project")


@pytest.fixture(scope="module")
def built(project):
    """The project after a build that was killed among its notebooks and gone on with."""
    with subprocess.Popen(
        COMMAND,
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
    result = make(project)
    assert result.returncode == 0, result.stderr
    return project, result


def records_of(project, name, profile="embedded"):
    """The sealed records of one notebook."""
    return read_records(project / f"_build/runs/qwen-lora/{profile}/records/{name}.jsonl")


def values_of(project):
    """The published values."""
    path = project / "_build/runs/qwen-lora/embedded/values.json"
    return json.loads(path.read_text())


def text_of(page):
    """The text of a page without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text()).split())


def test_the_last_line_counts_what_was_built(built):
    """A build's only output is the line that says where the book is and what it holds."""
    project, result = built
    found = re.fullmatch(
        r"book: _build/html/index\.html \((\d+) pages, (\d+) records, \d+ s\)\n", result.stdout
    )
    assert found
    names = sorted(p.stem for p in (project / "notebooks").glob("*.ipynb"))
    assert int(found[2]) == sum(len(records_of(project, name).records) for name in names)
    assert int(found[1]) == len(list((project / "_build/html/book").rglob("*.html")))


def test_without_changes_nothing_runs(built):
    """A second build runs no step."""
    project, _ = built
    result = make(project)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture(scope="module")
def seen(built, tmp_path_factory):
    """What a browser saw of each page in a frame of 390 px, by page; three are open at a time."""
    project, _ = built
    pages = sorted((project / "_build/html/book").rglob("*.html"))
    # A profile folder of its own for each, so that they do not wait for each other.
    folders = [tmp_path_factory.mktemp("profile") for _ in pages]
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(pages, pool.map(on_a_phone, pages, folders), strict=True))


@needs_browser
def test_every_page_opens_cleanly_and_asks_for_nothing(seen):
    """In a real browser no page makes an external request or logs an error to the console."""
    for page, found in seen.items():
        assert found.external == (), page
        assert found.console == (), page
        assert re.search(r"<h1>[^<]*[?:]", page.read_text()) or "notebooks" in str(page)


@needs_browser
def test_every_page_fits_a_phone(seen):
    """At 390 px every figure shows its narrow drawing and no page scrolls sideways."""
    for page, found in seen.items():
        assert 'data-fits="true"' in found.dom, page
        assert 'data-narrow="true"' in found.dom, page


def on_a_phone(page, folder):
    """A visit to a frame of 390 px around a page, in whose DOM is what the page measured."""
    # Chromium's own window is never narrower than 500 px.
    measure = (
        "<script>addEventListener('load', () => { const all = name => [...document"
        ".querySelectorAll(name)]; Object.assign(document.documentElement.dataset, {"
        "fits: document.documentElement.scrollWidth <= 390, narrow: all('.pm-narrow')"
        ".every(f => f.offsetWidth > 0) && all('.pm-wide').every(f => f.offsetWidth === 0)"
        "}) })</script></body>"
    )
    probe, frame = (page.with_name(f"{kind}-{page.name}") for kind in ("probe", "frame"))
    probe.write_text(page.read_text().replace("</body>", measure))
    frame.write_text(
        f'<iframe src="{probe.name}" style="width:390px;height:900px;border:0" '
        'onload="Object.assign(document.documentElement.dataset,'
        'this.contentDocument.documentElement.dataset)"></iframe>'
    )
    try:
        return visit(frame, folder)
    finally:
        probe.unlink()
        frame.unlink()


@needs_browser
def test_search_works_from_disk(built, tmp_path):
    """The search page finds a page by its words without any server."""
    project, _ = built
    page = project / "_build/html/search.html"
    seen = visit(page, tmp_path, query="q=grouped-query")
    assert "world.html" in seen.dom


def test_numbers_on_the_page_are_those_of_the_records(built):
    """The front page's numbers and the swap page's table come from the sealed records."""
    project, _ = built
    found = {r.key: r for r in records_of(project, "04_adapter_swap").of(_measure())}
    page = text_of(project / "_build/html/book/swap.html")
    for system in ("base", "suspect", "reference"):
        measure = found[f"swap.{system}.v2.auc_number"]
        assert f"{measure.value:.2f} [{measure.low:.2f}, {measure.high:.2f}]" in page
    front = text_of(project / "_build/html/book/index.html")
    assert f"{found['swap.base.v2.auc_number'].value:.2f}" in front


def _measure():
    from postmortem.records import Measure

    return Measure


def test_each_figure_is_on_its_page(built):
    """Every figure that was drawn stands on a page, and none is announced as missing."""
    project, _ = built
    drawn = json.loads(
        (project / "_build/runs/qwen-lora/embedded/figures/figures.json").read_text()
    )
    assert drawn["missing"] == {}
    pages = "".join(p.read_text() for p in (project / "_build/html/book").rglob("*.html"))
    for alt in drawn["alt"].values():
        assert alt.split(".")[0][:40] in pages


def test_no_page_shows_a_missing_value(built):
    """No page shows the mark of a missing key, a traceback or a path of this machine."""
    project, _ = built
    for page in (project / "_build/html/book").rglob("*.html"):
        text = page.read_text()
        assert "??" not in text_of(page)
        assert "Traceback" not in text
        assert str(project) not in text


def test_the_embedded_world_replays_the_incident(built):
    """The base alone writes 0.0 on every row under v2 while its log-odds rank the rows."""
    project, _ = built
    measures = values_of(project)["measures"]
    assert measures["swap.base.v2.distinct"]["value"] == 1
    assert measures["swap.base.v2.top_value"]["value"] == 0.0
    assert measures["swap.base.v2.auc_number"]["low"] > 0.9
    assert measures["swap.reference.v2.auc_decoded"]["low"] > 0.8
    assert values_of(project)["verdicts"]["swap.case_a_means_mismatch"]["verdict"] == "refuted"


def test_a_killed_build_goes_on_and_ends_the_same(built):
    """After kill -9 among the notebooks the next build ends whole, with a clean run's digests."""
    project, _ = built
    names = [path.stem for path in sorted((project / "notebooks").glob("*.ipynb"))]
    assert all(records_of(project, name).records for name in names)
    # The build of these tests was killed once; what it then made is what a further run makes.
    before = records_of(project, "04_adapter_swap").digest
    run = project / "_build/runs/qwen-lora/embedded"
    (run / "records/04_adapter_swap.jsonl").unlink()
    (run / "values.json").unlink()
    (project / "_build/book.json").unlink()
    result = make(project)
    assert result.returncode == 0, result.stderr
    assert "04_adapter_swap: started" in result.stderr
    assert records_of(project, "04_adapter_swap").digest == before


def test_an_edited_page_runs_no_notebook(built):
    """After a change of prose only the pages are built again."""
    project, _ = built
    page = project / "book/timeline.md"
    before = page.read_text()
    page.write_text(before + "\nOne more sentence.\n")
    try:
        result = make(project)
        assert result.returncode == 0, result.stderr
        assert "started" not in result.stderr
        assert "One more sentence." in text_of(project / "_build/html/book/timeline.html")
    finally:
        page.write_text(before)


def test_a_wrong_key_on_a_page_fails_the_build_twice(built):
    """A number that no record has fails the build with its key, and again on the next try."""
    project, _ = built
    page = project / "book/timeline.md"
    before = page.read_text()
    page.write_text(before + "\n{num}`no.such.key`\n")
    try:
        for _ in range(2):
            result = make(project)
            assert result.returncode == 2
            assert "no recorded measures 'no.such.key'" in result.stderr
            assert "Traceback" not in result.stderr
    finally:
        page.write_text(before)


def test_a_changed_notebook_runs_with_what_depends_on_it(built):
    """After a change of the first notebook it and the second run, and the others do not.

    The page that failed the build before stands mended, and fails it no more.
    """
    project, _ = built
    path = project / "notebooks/01_v1_run.ipynb"
    before = path.read_text()
    path.write_text(before.replace("Answer every row.", "Let every row be answered."))
    result = make(project)
    assert result.returncode == 0, result.stderr
    started = set(re.findall(r"(\w+): started", result.stderr))
    assert "01_v1_run" in started
    assert started <= {"01_v1_run", "02_v2_run"}


def test_a_failing_notebook_never_reaches_the_book(built):
    """A notebook that raises fails the build by name, and the book keeps its last good state."""
    project, _ = built
    path = project / "notebooks/04_adapter_swap.ipynb"
    before = path.read_text()
    content = json.loads(before)
    content["cells"][-1]["source"] = ["raise RuntimeError('on purpose')"]
    path.write_text(json.dumps(content))
    try:
        result = make(project)
        assert result.returncode == 2
        assert "04_adapter_swap.ipynb" in result.stderr
        assert "RuntimeError: on purpose" in result.stderr
        pages = (project / "_build/html/book").rglob("*.html")
        assert not any("on purpose" in page.read_text() for page in pages)
    finally:
        path.write_text(before)
