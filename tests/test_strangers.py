import pytest
import strangers
import torch

from postmortem.case.load import load_case
from postmortem.diagnosis.examination import diagnose_case, stand

# They train a base and an adapter.
pytestmark = pytest.mark.slow

# What a fast test can plant with a single training, and how it may be judged.
NAMED = ("cause named", "kind named")
EXPECTED = {
    "healthy": NAMED,
    "zero-b": NAMED,
    "alpha-zero": NAMED,
    "key-prefix": NAMED,
    "scale-up": NAMED,
    "targets-dropped": NAMED,
    "other-shapes": NAMED,
    "layers-permuted": (*NAMED, "cannot tell"),
    "scale-down": (*NAMED, "cannot tell"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A Llama that the diagnosis has never seen, and faults planted in an adapter for moods."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("strangers")
    base = strangers.make_base(work / "base", steps=200)
    wide = strangers.make_base(work / "wide", steps=1, hidden_size=96)
    sound = strangers.make_adapter(work / "sound", base)
    foreign = strangers.make_adapter(work / "foreign", wide, steps=1)
    rows = strangers.write_rows(work / "rows.csv", count=48)
    return base, strangers.plant_edits(work, sound) | {"other-shapes": foreign}, rows


@pytest.mark.parametrize("cause", EXPECTED)
def test_a_fault_on_an_unknown_base_is_named_or_left_open(planted, tmp_path, cause):
    """On another architecture and task the planted cause is named, or it is said to be open."""
    base, adapters, rows = planted
    path = strangers.write_case(
        tmp_path / "case.yml", base=base, suspect=adapters[cause], data=rows
    )
    case = load_case(path)
    _, found = diagnose_case(
        case, profile="own", minutes=5, prior="flat", told=(), report=lambda line: None
    )
    assert stand(found, cause) in EXPECTED[cause]
