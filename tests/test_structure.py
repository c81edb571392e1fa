import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import postmortem

SOURCE = Path(postmortem.__file__).parent
# Lowest first: a package imports from those before it.
PACKAGES = ("checker", "case", "models", "experiments", "diagnosis", "suite", "book")
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.name != "__init__.py"
}


def read_imports(path: Path, *, late: bool = True) -> set[str]:
    """The modules of the library that a file imports, also within functions where `late`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("postmortem.") for name in names} & set(MODULES)


IMPORTS = {name: read_imports(path) for name, path in MODULES.items()}
LOADED = {name: read_imports(path, late=False) for name, path in MODULES.items()}


@cache
def chain(name: str) -> int:
    """How many modules stand on each other where this one is loaded, itself included."""
    return 1 + max(map(chain, LOADED[name]), default=0)


def level(name: str) -> int:
    """Where the package of a module stands; the command line stands above all."""
    package = name.partition(".")[0]
    return PACKAGES.index(package) if package in PACKAGES else len(PACKAGES)


def test_the_packages_are_those_of_the_design():
    """The library is seven packages and the command line, and nothing lies beside them."""
    folders = {name.partition(".")[0] for name in MODULES}
    assert folders == {*PACKAGES, "cli", "commands", "__main__"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    """A module imports from its own package and from those below it alone."""
    assert {other for other in IMPORTS[name] if level(other) > level(name)} == set()


def test_no_module_imports_itself_by_a_detour():
    """Imports have no circle, so that each module can be read with what lies below it."""
    seen: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in seen:
            seen[name] = 1
            for other in IMPORTS[name]:
                visit(other, (*path, name))

    for name in MODULES:
        visit(name, ())


def test_no_package_has_more_than_eight_modules():
    """A package can be taken in: it has at most eight modules."""
    sizes = Counter(name.partition(".")[0] for name in MODULES)
    assert max(sizes.values()) <= 8


def test_no_module_stands_on_more_than_eight_others():
    """The longest chain of modules that load each other has eight."""
    assert max(map(chain, MODULES)) <= 8


def test_no_class_name_stands_twice():
    """A name of a class says which one is meant, wherever it is read."""
    names = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, times in names.items() if times > 1] == []
