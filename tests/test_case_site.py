import shutil

import nbformat
import own
import pytest
import yaml

from postmortem.book.pages import as_page, list_attempts, stage_site
from postmortem.case.layout import SCAFFOLD, site_of
from postmortem.case.load import load_case

TITLE = 'A "title": <b>bold</b> # & {more}'


@pytest.fixture
def published(tmp_path):
    """A folder of published values and one figure."""
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures/figures.json").write_text("{}")
    (folder / "values.json").write_text("{}")
    return folder


@pytest.fixture
def _at_home(pytestconfig, tmp_path, monkeypatch):
    """A folder with the project's sources, in which a site can be staged."""
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(pytestconfig.rootpath / name, tmp_path / name)
    shutil.copytree(pytestconfig.rootpath / "book", tmp_path / "book")
    monkeypatch.chdir(tmp_path)


def staged(site):
    """The staged files, by their paths."""
    found = (path for path in site.staged.rglob("*") if path.is_file())
    return {str(path.relative_to(site.staged)) for path in found}


@pytest.mark.usefixtures("_at_home")
def test_the_shipped_case_takes_the_book(case, published, tmp_path):
    """The shipped case's site is the book, under the project's own configuration."""
    site = site_of("cases/qwen-lora.yml", case)
    stage_site(site, executed={}, published=published)
    found = staged(site)
    assert {"_config.yml", "_toc.yml", "book/summary.md", "book/_values/values.json"} <= found
    assert (site.staged / "_config.yml").read_text() == (tmp_path / "_config.yml").read_text()
    assert (str(site.html), str(site.summary)) == ("_build/html", "_build/book.json")


def own_site(folder, name="films", **changes):
    """The site of a case of one's own."""
    given = {"base": "models/base", "suspect": "adapters/mine", "data": "rows.csv"} | changes
    path = own.write_case(folder / f"{name}.yml", name=name, **given)
    return site_of(path, load_case(path))


@pytest.mark.usefixtures("_at_home")
def test_a_case_of_ones_own_takes_its_pages_and_no_others(published, tmp_path):
    """Its site holds its pages, the style and the values, under its title and nobody's name."""
    shutil.copytree(SCAFFOLD, tmp_path / "films")
    (tmp_path / "films/own.md").write_text("# Mine?\n")
    (tmp_path / "films/adapter.safetensors").write_bytes(b"weights")
    site = own_site(tmp_path, title=TITLE)
    stage_site(site, executed={}, published=published)
    found = staged(site)
    assert {"own.md", "summary.md", "book/_values/values.json", "book/_static/book.css"} <= found
    assert "adapter.safetensors" not in found
    assert not [name for name in found if name.startswith("book/") and name.endswith(".md")]
    config = yaml.safe_load((site.staged / "_config.yml").read_text())
    assert (config["title"], config["author"]) == (TITLE, "")


@pytest.mark.usefixtures("_at_home")
def test_what_is_gone_is_gone_from_the_site(published, tmp_path):
    """A page that was taken away is taken out of the staged tree."""
    shutil.copytree(SCAFFOLD, tmp_path / "films")
    (tmp_path / "films/own.md").write_text("# Mine?\n")
    stage_site(own_site(tmp_path), executed={}, published=published)
    (tmp_path / "films/own.md").unlink()
    site = own_site(tmp_path)
    stage_site(site, executed={}, published=published)
    assert "own.md" not in staged(site)


def test_two_cases_are_built_apart(tmp_path):
    """Nothing that is built for one case lies where another's is built."""
    first, second = own_site(tmp_path), own_site(tmp_path, "books")
    assert {first.staged, first.out, first.summary} & {second.staged, second.out} == set()
    assert first.summary != second.summary


def test_each_attempt_stands_in_the_place_of_all(tmp_path):
    """A table of contents that names the attempts once lists one for each prompt of the case."""
    prompts = {"one": own.SENTIMENT, "two": own.SENTIMENT}
    runs = own_site(tmp_path, prompts=prompts).runs
    toc = yaml.safe_load(list_attempts((SCAFFOLD / "_toc.yml").read_text(), runs))
    sections = [c.get("sections", []) for part in toc["parts"] for c in part["chapters"]]
    listed = [entry["file"] for found in sections for entry in found]
    assert listed[:4] == [
        "notebooks/files",
        "notebooks/attempt_one",
        "notebooks/attempt_two",
        "notebooks/adapter_swap",
    ]


def test_a_warning_of_a_library_is_on_no_page(tmp_path):
    """What went to the error stream names files of the machine and is left out; the rest stays."""
    streams = [
        nbformat.v4.new_output("stream", name=name, text=name) for name in ("stdout", "stderr")
    ]
    cell = nbformat.v4.new_code_cell("x", outputs=streams, execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    (page,) = as_page(tmp_path / "n.ipynb").cells
    assert [output.text for output in page.outputs] == ["stdout"]
