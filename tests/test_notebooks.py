import pytest
from chapters import ROOT, cells_of, run_chapter

from postmortem.experiments.records import Provenance

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# These take a quarter of a minute each.
LONG = {"replay", "diagnosis", "shape_mismatch", "controls"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in NOTEBOOKS],
)
def test_a_notebook_opened_by_hand_runs_to_its_end(name, monkeypatch, tmp_path):
    """From Jupyter's own folder, without a build, a notebook runs with its defaults."""
    monkeypatch.chdir(ROOT / "notebooks")
    session = run_chapter(name, rows=8, records=str(tmp_path / f"{name}.jsonl"))
    assert session.world.profile == session.case.default_profile
    session.finish()
    first = session.records_path.read_text().partition("\n")[0]
    assert Provenance.model_validate_json(first).notebook == name


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_no_longer_than_it_can_be_read(name):
    """A notebook has some hundred lines of code, none of which scrolls far."""
    _, cells = cells_of(name)
    lines = [line for cell in cells for line in cell.splitlines()]
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 100
