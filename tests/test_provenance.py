import sys
from pathlib import Path

import nbformat
import pytest

from postmortem import provenance
from postmortem.provenance import (
    digest_code,
    modules_behind,
    notebook_digests,
    notebook_sources,
    package_versions,
)
from postmortem.records import digest_file

LIBRARY = Path(provenance.__file__).parent


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of four modules in place of ours: a uses b and b uses a; c stands alone."""
    sources = {
        "a": "from postmortem.b import x\nimport os",
        "b": "import postmortem.a as first",
        "c": "x = 1",
        "errors": "class E(Exception): ...",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        "from postmortem.a import x",
        "from postmortem import a",
        "from postmortem import a as q",
        "import postmortem.a",
        "import os, postmortem.a as q",
        "def f():\n    from postmortem.a import x",
        "if True:\n    import postmortem.b",
        "from postmortem.a.deeper import x",
    ],
)
def test_every_form_of_import_counts(library, source):
    """A module is found however it is imported, and the modules behind it with it."""
    assert list(modules_behind([source])) == ["module a", "module b"]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "import os, numpy.linalg",
        "from postmortems.a import x",
        "import postmortem",
        "from postmortem import nothing",
        "'from postmortem.a import x'",
        "# import postmortem.a",
        "from postmortem.errors import E",
    ],
)
def test_what_is_no_import_of_a_module_does_not_count(library, source):
    """Texts, comments, other packages and the wording of errors are not behind a number."""
    assert modules_behind([source]) == {}


def test_digest_is_that_of_the_code(library):
    """A module's digest changes with its code and with no other."""
    before = modules_behind(["import postmortem.a, postmortem.c"])
    (library / "b.py").write_text("x = 2")
    after = modules_behind(["import postmortem.a, postmortem.c"])
    assert [name for name in before if before[name] != after[name]] == ["module b"]
    assert after["module b"] == digest_code("x = 2")


def test_comments_and_docstrings_are_not_code():
    """A digest stays the same while only comments, layout and docstrings change."""
    plain = "def f(x):\n    return x + 1\n"
    dressed = '"""A module."""\n# why\ndef f( x ):\n    """Adds one."""\n\n    return (x + 1)\n'
    assert digest_code(plain) == digest_code(dressed)
    assert digest_code(plain) != digest_code(plain.replace("1", "2"))


def test_a_digest_is_the_same_on_every_python():
    """What Python 3.11, 3.12 and 3.13 parse into different trees has one digest, written here."""
    source = (
        "class A:\n"
        "    def f(self, *, a=1, **b):\n"
        "        return f\"{a!r:>{b}} it's {self.x[0]:.2f}\" 'and' f'{a}'"
        " if (lambda: None) else None\n"
    )
    assert digest_code(source) == "4010fabdc49b227c"


def test_table_beside_a_module_counts(library):
    """A table that a module reads from beside itself can change a number, so it counts."""
    (library / "c.csv").write_text("1")
    assert modules_behind(["import postmortem.c"])["module c.csv"] == digest_file(library / "c.csv")


def test_shapes_are_behind_the_mismatch():
    """The notebook on shapes rests on the table of shapes, reached through other modules."""
    notebook = LIBRARY.parents[1] / "notebooks" / "03_shape_mismatch.ipynb"
    assert {"module mismatch", "module bases", "module bases.csv"} <= set(
        notebook_digests(notebook)
    )


def test_parsing_is_not_behind_the_world():
    """How an answer is parsed does not change the embedded world."""
    behind = modules_behind(["import tools.embedded_world"])
    assert "module scoring" in behind
    assert "module parsing" not in behind
    assert "module session" not in behind


def test_every_module_can_be_read():
    """Each module of the library is found under its name, apart from the wording of errors."""
    names = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__", "errors"}
    found = modules_behind([f"import postmortem.{name}" for name in sorted(names)])
    assert names <= {name.removeprefix("module ") for name in found}
    assert found["module parsing"] == digest_code((LIBRARY / "parsing.py").read_text())


def test_notebook_sources_are_its_code_cells(tmp_path):
    """Of a notebook only the code counts, as text or as lines."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("import tools.embedded_world"),
        nbformat.v4.new_code_cell("import postmortem.parsing\nx = 1"),
        nbformat.v4.new_code_cell(""),
    ]
    nbformat.write(notebook, str(tmp_path / "n.ipynb"))
    assert notebook_sources(tmp_path / "n.ipynb") == ["import postmortem.parsing\nx = 1", ""]
    assert list(notebook_digests(tmp_path / "n.ipynb")) == ["notebook", "module parsing"]


def test_versions_name_what_computes():
    """The versions are those of Python and of the packages that compute."""
    found = package_versions()
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert {"torch", "transformers", "peft", "numpy"} <= set(found)
    assert all(found.values())
