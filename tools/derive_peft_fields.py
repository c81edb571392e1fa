"""Derive checker/peft_fields.csv from released PEFT wheels, reading source and running none.

Usage: python -m tools.derive_peft_fields WHEEL_FOLDER [VERSION ...]
Versions are downloaded into WHEEL_FOLDER with pip; without any, the wheels already there are read.
"""

import ast
import csv
import subprocess
import sys
import zipfile
from pathlib import Path

TABLE = Path(__file__).parent.parent / "src" / "postmortem" / "checker" / "peft_fields.csv"


def download(version: str, folder: Path) -> None:
    """Fetch one release as a wheel, without dependencies and without building anything."""
    arguments = [
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    subprocess.run([sys.executable, "-m", "pip", *arguments, f"peft=={version}"], check=True)


def version_key(version: str) -> tuple[int, ...]:
    """Sort releases by number."""
    return tuple(int(part) for part in version.split("."))


def classes_of(wheel: Path) -> tuple[dict[str, ast.ClassDef], str]:
    """Return the classes of a wheel by name, and the source of the one that loads configs."""
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.namelist()
        names = [n for n in listed if n.startswith("peft/") and n.endswith(".py")]
        # The 0.6.2 wheel carries outdated files: a package shadows the module of the same name,
        # and peft/config.py, the shallower one, replaced peft/utils/config.py.
        names = [n for n in names if f"{n.removesuffix('.py')}/__init__.py" not in listed]
        sources = [archive.read(n).decode() for n in sorted(names, key=lambda n: -n.count("/"))]
    trees = [node for source in sources for node in ast.parse(source).body]
    classes = {node.name: node for node in trees if isinstance(node, ast.ClassDef)}
    return classes, ast.unparse(classes["PeftConfigMixin"]) if "PeftConfigMixin" in classes else ""


def is_init_field(node: ast.AnnAssign) -> bool:
    """Tell whether the dataclass accepts this field as an argument (`init=False` refuses it)."""
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(k.arg == "init" and getattr(k.value, "value", True) is False for k in keywords)


def fields_of(name: str, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Return the names of the init fields of a dataclass and of its bases."""
    if name not in classes:
        return set()
    own = {
        node.target.id
        for node in classes[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if is_init_field(node)
    }
    bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
    return own.union(*(fields_of(base, classes) for base in bases))


def unsaved_fields(lora: ast.ClassDef) -> set[str]:
    """Return the fields that `LoraConfig.to_dict` pops before the configuration is written."""
    methods = [n for n in lora.body if isinstance(n, ast.FunctionDef) and n.name == "to_dict"]
    return {
        str(call.args[0].value)
        for method in methods
        for call in ast.walk(method)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "pop"
        if isinstance(call.args[0], ast.Constant)
    }


def reaction_to_unknown_keys(mixin_source: str) -> str:
    """Say what loading does with a key that is no field: warns, ignores or raises."""
    if "Unexpected keyword arguments" in mixin_source:
        return "warns"
    return "ignores" if "hasattr(config, key)" in mixin_source else "raises"


def rows(wheels: list[Path]) -> list[list[str]]:
    """Build one row per release: how it treats unknown keys, and which fields came and went."""
    table: list[list[str]] = []
    previous: set[str] = set()
    for wheel in sorted(wheels, key=lambda path: version_key(path.name.split("-")[1])):
        classes, mixin_source = classes_of(wheel)
        fields = fields_of("LoraConfig", classes)
        if not fields:
            continue
        added, removed = sorted(fields - previous), sorted(previous - fields)
        unsaved = sorted(unsaved_fields(classes["LoraConfig"]))
        version, reaction = wheel.name.split("-")[1], reaction_to_unknown_keys(mixin_source)
        table.append([version, reaction, *(" ".join(names) for names in (added, removed, unsaved))])
        previous = fields
    return table


def main(folder: Path, versions: list[str]) -> None:
    """Download what is asked for and write the table."""
    for version in versions:
        download(version, folder)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["version", "unknown_keys", "added", "removed", "not_saved"])
        writer.writerows(rows(list(folder.glob("peft-*.whl"))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
