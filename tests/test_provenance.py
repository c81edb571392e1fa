import subprocess
import sys

import nbformat
import pytest

from postmortem.experiments import records as provenance
from postmortem.experiments.records import (
    NO_COMMIT,
    digest_library,
    digest_notebook,
    find_commit,
    package_versions,
)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of a module, a table and a folder in place of ours, outside any repository."""
    folder = tmp_path / "library"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "table.csv", "inner/config.yaml"):
        (folder / name).write_text("x = 1")
    monkeypatch.setattr(provenance, "LIBRARY", folder)
    # No repository above the temporary folder is found either.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    yield folder
    digest_library.cache_clear()


def digest_now():
    """The digest of the library as it lies there now."""
    digest_library.cache_clear()
    return digest_library()


@pytest.mark.parametrize("name", ["__init__.py", "table.csv", "inner/config.yaml"])
def test_any_byte_of_the_library_changes_its_digest(library, name):
    """One byte more of any file is another library; what Python writes beside it is not."""
    before = digest_now()
    (library / name).write_text("x = 1\n")
    assert digest_now() != before
    (library / name).write_text("x = 1")
    (library / "inner/__pycache__").mkdir()
    (library / "inner/__pycache__/records.cpython-311.pyc").write_bytes(b"\x00")
    assert digest_now() == before


def test_a_file_counts_by_its_place(library):
    """A file under another name, and content moved from one file to the next, are changes."""
    before = digest_now()
    (library / "table.csv").rename(library / "tables.csv")
    renamed = digest_now()
    (library / "tables.csv").rename(library / "table.csv")
    (library / "__init__.py").write_text("x = 1x")
    (library / "table.csv").write_text(" = 1")
    assert len({before, renamed, digest_now()}) == 3


def write_notebook(path, *cells, output="1"):
    """A notebook of these cells, each code cell with an output."""
    kinds = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    notebook = nbformat.v4.new_notebook(cells=[kinds[kind](source) for kind, source in cells])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = int(output)
            cell.outputs = [nbformat.v4.new_output("stream", text=output)]
    nbformat.write(notebook, str(path))
    return digest_notebook(path)


def test_prose_and_outputs_are_not_what_a_notebook_does(tmp_path):
    """Of a notebook the code counts, in its order, and neither its prose nor what it printed."""
    path, one, two = tmp_path / "n.ipynb", ("code", "x = 1"), ("code", "print(x)")
    digest = write_notebook(path, one, two)
    assert write_notebook(path, ("markdown", "A title"), one, two, output="2") == digest
    assert write_notebook(path, two, one) != digest
    assert write_notebook(path, one, ("code", "print(x) ")) != digest


def test_a_tool_is_digested_as_it_is(tmp_path):
    """Every byte of a script that writes records counts, its comments too."""
    digests = set()
    for text in ("x = 1\n", "x = 1\n# why\n", "x = 2\n"):
        (tmp_path / "tool.py").write_text(text)
        digests.add(digest_notebook(tmp_path / "tool.py"))
    assert len(digests) == 3


def test_without_a_repository_of_its_own_there_is_no_commit(library, monkeypatch):
    """A copy that no repository holds names no commit, nor does one where there is no git."""
    assert find_commit() == NO_COMMIT == "no commit"
    git(library.parent, "init")
    git(library.parent, "commit", "--allow-empty", "--message", "theirs")
    assert find_commit() == NO_COMMIT
    monkeypatch.setenv("PATH", "")
    assert find_commit() == NO_COMMIT


def test_a_commit_says_where_files_differ_from_it(library):
    """The commit is named in twelve digits, with a plus where the library has moved on since."""
    git(library, "init")
    git(library, "add", ".")
    git(library, "commit", "--message", "first")
    commit = git(library, "rev-parse", "HEAD")[:12]
    assert find_commit() == commit
    (library / "table.csv").write_text("x = 2")
    assert find_commit() == f"{commit}+"


def git(folder, *arguments):
    """Run git as somebody; what it printed."""
    someone = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *someone, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_versions_name_what_computes():
    """The versions are those of Python, of the packages that compute, and of the library."""
    found = package_versions()
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert {"torch", "transformers", "peft", "numpy", "lora-postmortem"} <= set(found)
    assert all(found.values())
