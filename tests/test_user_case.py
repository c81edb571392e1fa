import json
import re
import shutil
from pathlib import Path

import own
import pytest
import torch
from chapters import recorded, run_chapter
from safetensors.torch import load_file, save_file
from test_pages import named_keys, typed_numbers

from postmortem.book.publish import add_run_values, collect_values
from postmortem.book.tables import add_any_case, judge
from postmortem.case.layout import SCAFFOLD
from postmortem.case.load import load_case
from postmortem.experiments.records import Measure, Prediction, Table, Verdict, read_records
from postmortem.models.model_set import read_world, resolve_world, write_world

WEIGHTS = "adapter_model.safetensors"
YES_NO = {"contract": "yes_no", "chat": False, "template": "{text} Is it good?"}
READ = {"read": {"contract": "class", "template": "{text}"}}
CHAPTERS = ("files", "adapter_swap", "controls")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two tiny Llamas, sound and broken adapters, and rows."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chapters")
    base = own.make_base(folder / "base")
    own.make_base(folder / "plain", chat=False)
    own.make_adapter(folder / "sound", base)
    own.make_adapter(folder / "zero", base, zero=True)
    own.make_adapter(folder / "classifier", base, task="SEQ_CLS")
    own.write_rows(folder / "rows.csv")
    broken = {
        "wide": lambda tensors: {k: torch.cat([t, t], 1) for k, t in tensors.items()},
        "nan": lambda tensors: {k: t * float("nan") for k, t in tensors.items()},
        "bringing": lambda tensors: (
            tensors | {"base_model.model.lm_head.weight": torch.ones(len(own.make_tokenizer()), 32)}
        ),
    }
    for name, change in broken.items():
        shutil.copytree(folder / "sound", folder / name)
        tensors = load_file(folder / "sound" / WEIGHTS)
        save_file(change(tensors), folder / name / WEIGHTS, metadata={"format": "pt"})
    whole = (folder / "sound" / WEIGHTS).read_bytes()
    config = json.loads((folder / "sound/adapter_config.json").read_text())
    files = {
        "cut": (WEIGHTS, whole[: len(whole) // 2]),
        "pointer": (WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "garbled": ("adapter_config.json", b"{'peft_type': 'LORA'}"),
        "nameless": ("adapter_config.json", b'{"r": 4}'),
        "foreign": ("adapter_config.json", json.dumps(config | {"peft_type": "IA3"}).encode()),
    }
    for name, (file, content) in files.items():
        shutil.copytree(folder / "sound", folder / name)
        (folder / name / file).write_bytes(content)
    shutil.copytree(folder / "sound", folder / "pickled")
    (folder / "pickled" / WEIGHTS).rename(folder / "pickled/adapter_model.bin")
    return folder


class Chapters:
    """Runs the notebooks of a user's case on these folders, as a build does."""

    def __init__(self, place, folder, *, rows=12, **changes):
        given = {"base": place / "base", "suspect": place / "sound", "data": place / "rows.csv"}
        for role in ("base", "suspect", "reference"):
            if role in changes:
                given[role] = place / changes.pop(role)
        given = {key: str(value) for key, value in given.items()}
        self.path = own.write_case(folder / "case.yml", **(given | changes))
        self.case, self.rows, self.folder = load_case(self.path), rows, folder
        write_world(resolve_world(self.case, "own"), folder / "world.json")

    def run(self, notebook, **given):
        """One notebook's session."""
        return run_chapter(
            notebook,
            case=str(self.path),
            world=str(self.folder / "world.json"),
            records=str(self.folder / f"records/{notebook}.jsonl"),
            rows=self.rows,
            device="cpu",
            **given,
        )


BROKEN = ("pointer", "garbled", "nameless", "foreign", "pickled")
# Where every kind of case differs from the others in what it has.
KINDS = {
    "labels and a reference": {"reference": "zero"},
    "no labels": {"columns": {"text": "text"}},
    "yes or no, no chat template": {"base": "plain", "prompts": {"ask": YES_NO}},
    "a number, and another prompt": {
        "prompts": {"rate": {"contract": "number", "template": "{text} 0 or 1?"}, "ask": YES_NO}
    },
    "classifier": {"suspect": "classifier", "prompts": READ},
    "classifier, weights cut short": {"suspect": "cut", "prompts": READ},
    "does not load": {"suspect": "wide"},
    "weights cut short": {"suspect": "cut"},
    "not finite": {"suspect": "nan"},
    **{name: {"suspect": name} for name in BROKEN},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_the_pages_is_recorded_for_any_case(kind, place, tmp_path):
    """Whatever a case lacks, each number, verdict, text and table that the pages name is there."""
    chapters = Chapters(place, tmp_path, **KINDS[kind])
    files = {}
    for name in CHAPTERS:
        session = chapters.run(name)
        session.finish()
        files[name] = read_records(session.records_path)
    chapters.run("attempt", attempt=chapters.case.asked).finish()
    values = collect_values(files.values())
    add_run_values(values, files, world=read_world(tmp_path / "world.json"))
    add_any_case(values, chapters.case)
    # What `publish` counts itself.
    values["texts"] |= {"rows.source": "", "profile.title": ""}
    values["measures"]["rows.count"] = ""
    lacking = {
        key
        for page in SCAFFOLD.glob("*.md")
        for kind, key in named_keys(page.read_text())
        if key not in values[kind] and not key.startswith("diagnosis.")
    }
    assert lacking == set()


def test_an_adapter_that_does_not_load_is_a_finding(place, tmp_path):
    """Where PEFT refuses the suspect, the base has its answers and the suspect PEFT's reason."""
    session = Chapters(place, tmp_path, suspect="wide").run("adapter_swap")
    measures, verdicts = recorded(session, Measure), recorded(session, Verdict)
    assert measures["swap.base.sentiment.rows"].value == 12
    assert measures["swap.suspect.sentiment.rows"].value is None
    assert measures["swap.suspect.sentiment.rows"].reason == (
        "it does not load: 8 tensor(s) do not fit, "
        "model.layers.0.self_attn.q_proj.lora_A.default.weight is (4, 64) in the file "
        "and (4, 32) on the base"
    )
    assert verdicts["swap.suspect.sentiment.moves_the_base"].verdict == "not available"
    assert str(place / "wide") not in str(session.records)


def test_a_classifier_changes_its_value_with_its_class(place, tmp_path):
    """Probabilities differ on every row; what counts as changed is the class that they mean."""
    session = Chapters(place, tmp_path, suspect="classifier", prompts=READ).run("adapter_swap")
    both = {
        system: [
            p.strict_value > 0.5 for p in session.records if getattr(p, "system", "") == system
        ]
        for system in ("base", "suspect")
    }
    changed = sum(a != b for a, b in zip(*both.values(), strict=True))
    assert recorded(session, Measure)["swap.suspect.read.flips"].value == changed / 12


def test_an_adapter_without_effect_is_told_from_a_base_that_fails(place, tmp_path):
    """With lora_B zero nothing changes: the effect is refuted, and switched off it is the base."""
    chapters = Chapters(place, tmp_path, suspect="zero")
    verdicts = recorded(chapters.run("adapter_swap"), Verdict)
    assert verdicts["swap.suspect.sentiment.moves_the_base"].verdict == "refuted"
    verdicts = recorded(chapters.run("controls"), Verdict)
    assert verdicts["controls.suspect.disabled_is_base"].verdict == "holds"
    assert verdicts["controls.zero_b.is_base"].verdict == "holds"
    assert verdicts["controls.flipped.differs"].verdict != "holds"


def test_one_layer_cannot_be_shifted(place, tmp_path):
    """Where one layer is adapted the control is not available and says why."""
    folder = shutil.copytree(place / "sound", tmp_path / "one")
    kept = {k: t for k, t in load_file(folder / WEIGHTS).items() if ".layers.0." in k}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_to_transform": [0]}))
    session = Chapters(place, tmp_path, suspect=folder).run("controls")
    reason = recorded(session, Measure)["controls.shifted.kl"].reason
    assert "one layer alone is adapted" in reason


def test_an_adapter_that_changes_the_base_does_not_reach_the_next(place, tmp_path):
    """The base and the reference answer the same behind a sound suspect and one with weights."""
    answers = []
    for name in ("sound", "bringing"):
        folder = tmp_path / name
        folder.mkdir()
        two = {"one": YES_NO, "two": {**YES_NO, "template": "{text} Is it bad?"}}
        chapters = Chapters(place, folder, suspect=name, reference="zero", prompts=two)
        session = chapters.run("adapter_swap")
        predictions = [r for r in session.records if isinstance(r, Prediction)]
        answers.append([p for p in predictions if p.system in ("base", "reference")])
    assert answers[0] == answers[1] != []


def test_texts_are_shown_on_one_line_and_cut(place, tmp_path):
    """A row's text reaches a table with its line ends visible and never longer than a cell."""
    rows = tmp_path / "odd.csv"
    hostile = "<script>alert(1)</script>\n" + "x" * 500
    rows.write_text(f'text,label\n"{hostile}",1\n"plain",0\n')
    session = Chapters(place, tmp_path, data=str(rows)).run("attempt", attempt="sentiment")
    cell = recorded(session, Table)["sentiment.posts"].rows[0][2]
    assert cell.startswith("<script>alert(1)</script>\\nxxx")
    assert len(cell) == 160


@pytest.mark.parametrize(
    ("statement", "said", "word"),
    [
        ("not a", "holds", "refuted"),
        ("not a", "cannot tell", "cannot tell"),
        ("a", "knows and does not say", "holds"),
        ("a", "does not know", "refuted"),
        ("a", "holds", "holds"),
        ("not a", "not available", "not available"),
    ],
)
def test_a_statement_speaks_for_or_against_its_explanation(statement, said, word):
    """A verdict on a statement becomes one on the explanation, turned round where it denies it."""
    verdicts = {"a": {"verdict": said, "because": "so"}}
    assert judge(verdicts, statement) == (word, "so")


def test_no_number_is_typed_on_a_packaged_page():
    """A packaged page types no digit but the two that a truth can have."""
    for page in SCAFFOLD.glob("*.md"):
        typed = {digits.strip(".,;:") for _, digits in typed_numbers(page.read_text())}
        assert typed <= {"0", "1"}, page.name


def test_the_packaged_pages_are_in_the_table_of_contents():
    """Each packaged page stands in the packaged table of contents, and nothing else does."""
    listed = re.findall(r"(?:file|root): ([a-z]+)$", (SCAFFOLD / "_toc.yml").read_text(), re.M)
    assert sorted(listed) == sorted(path.stem for path in Path(SCAFFOLD).glob("*.md"))
