"""The notebooks' own code, run in this process: what a chapter records, without a kernel."""

import json
import warnings
from pathlib import Path

from postmortem.experiments.session import Session

ROOT = Path(__file__).parents[1]


def parameters_of(notebook, folder, **given):
    """The parameters of a session of the shipped case on the models described in a folder."""
    return {
        "notebook": str(ROOT / f"notebooks/{notebook}.ipynb"),
        "case": str(ROOT / "cases/qwen-lora.yml"),
        "profile": "embedded",
        "world": str(folder / "world.json"),
        "records": str(folder / f"records/{notebook}.jsonl"),
        "device": "cpu",
        "dtype": "auto",
        **given,
    }


def cells_of(notebook):
    """The code cells of a notebook, the one with its parameters first and apart."""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    sources = [
        (cell["metadata"].get("tags", []), "".join(cell["source"]))
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    parameters = next(text for tags, text in sources if "parameters" in tags)
    return parameters, [text for tags, text in sources if "parameters" not in tags]


def run_chapter(notebook, /, *, prepare=lambda session: None, **given):
    """Run a notebook's cells with these parameters; return its session, which is not sealed.

    `prepare` changes the session right after it was opened.
    """
    parameters, cells = cells_of(notebook)
    names = {"display": lambda *shown: None}
    exec(parameters, names)
    names |= given
    for cell in cells:
        if cell.strip() == "session.finish()":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in a kernel, where they stop nothing
            exec(compile(cell, notebook, "exec"), names)
        if "session = open_session" in cell:
            prepare(names["session"])
    found = names["session"]
    assert isinstance(found, Session)
    return found


def recorded(session, kind):
    """The session's records of one kind by key."""
    return {record.key: record for record in session.records if isinstance(record, kind)}
