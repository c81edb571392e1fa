import csv
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import postmortem
from postmortem.checker.errors import CaseError, RecordError, SuiteError
from postmortem.experiments.metrics import auc, auc_estimate, auc_gain_estimate
from postmortem.models.changes import edit_config, edit_tensors
from postmortem.models.loading import footprint
from postmortem.suite import suite
from postmortem.suite.results import (
    UNKNOWN,
    as_csv,
    collect,
    decide_suite,
    find_duplicates,
    mean_ranks,
)
from postmortem.suite.scoring import open_scorer, score_chunk
from postmortem.suite.suite import (
    CHUNKS,
    RESULTS,
    PromptReading,
    Scored,
    SuiteLimits,
    find_adapters,
    make_plan,
    name_adapters,
    read_plan,
    read_result,
    result_path,
    unmark_unfinished,
    write_plan,
)

LABELS = np.array([0, 1] * 20)
OUTPUTS = ("results.json", "results.csv", "summary.txt")
# A short question: the suite's machinery does not care what is asked.
ASKED = {"contract": "number", "chat": True, "template": "Rule: {rule}\nPost: {body}"}


def adapter(place: Path, source: Path, **config) -> Path:
    """A copy of an adapter, its configuration changed."""
    shutil.copytree(source, place)
    if config:
        edit_config(place, **config)
    return place


def each_tensor(change):
    """A change of every tensor by its name."""
    return lambda tensors: {name: change(name, tensor) for name, tensor in tensors.items()}


def spoil(folder: Path, way: str) -> None:
    """Break an adapter in the way of this name."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    norm = "base_model.model.model.norm.weight"
    changes = {
        "corrupt": lambda: weights.write_bytes(b"\xff" * 500),
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "empty": lambda: weights.write_bytes(b""),
        "no-config": config.unlink,
        "no-weights": weights.unlink,
        "not-json": lambda: config.write_text("{'r': 1}"),
        "config-a-list": lambda: config.write_text("[]"),
        "config-a-folder": lambda: (config.unlink(), config.mkdir()),
        "another-method": lambda: edit_config(folder, peft_type="NO_SUCH"),
        "rank-as-text": lambda: edit_config(folder, r="16"),
        "shapes": lambda: edit_tensors(
            folder, each_tensor(lambda k, v: torch.cat([v, v], 1) if "lora_A" in k else v)
        ),
        "nan": lambda: edit_tensors(folder, each_tensor(lambda k, v: v * float("nan"))),
        "nothing": lambda: shutil.rmtree(folder) or folder.mkdir(),
        "base-weights": lambda: edit_tensors(folder, lambda t: {**t, norm: torch.full((64,), 3.0)}),
        "rewrites-base": lambda: edit_config(folder, init_lora_weights="pissa"),
    }
    changes[way]()


BROKEN = (
    "corrupt",
    "truncated",
    "empty",
    "no-config",
    "no-weights",
    "not-json",
    "config-a-list",
    "config-a-folder",
    "another-method",
    "rank-as-text",
    "shapes",
    "nothing",
)
# These load, and what they answer is the question.
LOADING = ("nan", "base-weights", "rewrites-base")


@pytest.fixture(scope="module")
def place(untrained, tmp_path_factory):
    """A folder with a suite of six sound adapters on an untrained base; ten rows."""
    folder = tmp_path_factory.mktemp("suite")
    for number in range(6):
        adapter(folder / "adapters" / f"a{number}", untrained / "suspect", lora_alpha=4 + number)
    write_spec(folder, untrained / "base")
    return folder


def write_spec(folder: Path, base: Path, **changes) -> Path:
    """Write a suite file."""
    spec = {
        "suite_version": 1,
        "title": "small",
        "base": str(base),
        "adapters": ["adapters"],
        "rows": {"count": 10, "seed": 3},
        "ask": ["short"],
        "prompts": {"short": ASKED},
        "max_new_tokens": 2,
        "chunk": 4,
        **changes,
    }
    path = folder / "suite.yml"
    path.write_text(yaml.safe_dump(spec))
    return path


def run_here(spec: Path, out: Path):
    """Run a suite in this process, as its graph would; its results, and how much was scored."""
    plan, lines = make_plan(spec), []
    write_plan(plan, out)
    unmark_unfinished(plan, out)
    for number in plan.chunks:
        score_chunk(plan, out, number, report=lines.append)
    counts = [re.search(r"\d+ of \d+", line).group() for line in lines]
    return collect(plan, out), counts


def bytes_of(out: Path) -> dict[str, bytes]:
    """The final files of a suite."""
    return {name: (out / name).read_bytes() for name in OUTPUTS}


@pytest.fixture(scope="module")
def whole(place):
    """The output of one run from beginning to end."""
    out = place / "whole"
    run_here(place / "suite.yml", out)
    return out


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"suite_version": 2}, CaseError, "suite_version"),
        ({"adapters": []}, CaseError, "at least 1 item"),
        ({"adapters": ["none/*"]}, SuiteError, "at least one adapter folder; found none"),
        ({"ask": ["v9"]}, SuiteError, "one of short; found no such prompt"),
        ({"rows": {}}, SuiteError, "a `count` above 0"),
        ({"limits": {"chance": {"value": 0.5}}}, CaseError, "because"),
    ],
)
def test_a_wrong_suite_file_is_refused_with_its_key(untrained, tmp_path, changes, error, message):
    """What a suite file lacks or names wrongly is said before any model is loaded."""
    with pytest.raises(error, match=message):
        make_plan(write_spec(tmp_path, untrained / "base", **changes))


def test_a_case_lends_its_prompts(case, untrained, tmp_path, pytestconfig):
    """A prompt that the suite file does not hold is taken from the case that it names."""
    adapter(tmp_path / "adapters/a", untrained / "suspect")
    path = str(pytestconfig.rootpath / "cases/qwen-lora.yml")
    plan = make_plan(write_spec(tmp_path, untrained / "base", case=path, ask=["yes_no", "short"]))
    assert list(plan.prompts) == ["yes_no", "short"]
    assert plan.prompts["yes_no"] == case.prompts["yes_no"]


def test_adapters_are_found_once_and_in_order(tmp_path):
    """Globs, folders of adapters and adapters themselves name each folder once, sorted."""
    for name in ("b", "a", ".hidden", "[c]"):
        (tmp_path / "all" / name).mkdir(parents=True)
    (tmp_path / "all/a/adapter_config.json").touch()
    found = find_adapters(["all", "all/*", "all/a", str(tmp_path / "all/b"), "all/[c]"], tmp_path)
    assert [path.name for path in found] == ["[c]", "a", "b"]


def test_a_plan_is_read_back_as_written(untrained, tmp_path):
    """What the steps read is what the command wrote, also of a folder whose name is no Unicode."""
    for name in ("plain", os.fsdecode(b"\xff\xfe")):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    plan = make_plan(write_spec(tmp_path, untrained / "base"))
    write_plan(plan, tmp_path)
    assert read_plan(tmp_path) == plan
    assert all(Path(entry.folder).is_dir() for entry in read_plan(tmp_path).entries)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RecordError, match="expected a plan"):
        read_plan(tmp_path)


@pytest.mark.parametrize("changes", [{"title": "other"}, {"ask": ["long", "short"]}])
def test_a_new_title_or_first_prompt_is_judged_again(untrained, tmp_path, changes):
    """The heading of the results and the prompt that decides are part of what is judged."""
    (tmp_path / "adapters/a").mkdir(parents=True)
    both = {"ask": ["short", "long"], "prompts": {"short": ASKED, "long": ASKED}}
    first = make_plan(write_spec(tmp_path, untrained / "base", **both))
    other = make_plan(write_spec(tmp_path, untrained / "base", **both | changes))
    assert (first.run, first.judged != other.judged) == (other.run, True)


HOSTILE = (
    "=cmd|'x'!A1",
    "+1",
    "@a",
    'a,b"c',
    "<script>",
    "a\nb",
    "\u202egnp",
    "-x",
    "a\tb",
    "a\vb",
)


def test_hostile_names_stay_text_and_apart(tmp_path):
    """A folder's name reaches no table as a formula, line break or control character."""
    folders = [tmp_path / name for name in (*HOSTILE, os.fsdecode(b"\xff\xfe"))]
    for folder in folders:
        folder.mkdir()
    names = [entry.name for entry in name_adapters(folders, tmp_path)]
    assert len(set(names)) == len(folders)
    table = as_csv(decide(dict.fromkeys(names, ramp(0))))
    rows = list(csv.reader(io.StringIO(table)))[1:]
    assert len(rows) == len(folders)
    assert all(row[0].isprintable() and row[0][0] not in "=+-@" for row in rows)


@pytest.fixture(scope="module")
def broken(untrained, tmp_path_factory):
    """The results of one adapter broken in each way, between sound ones that are all equal."""
    folder = tmp_path_factory.mktemp("broken")
    for number, way in enumerate((*BROKEN, *LOADING)):
        spoil(adapter(folder / f"adapters/{number:02d}b-{way}", untrained / "suspect"), way)
        adapter(folder / f"adapters/{number:02d}a", untrained / "suspect")
    adapter(folder / "adapters/99", untrained / "suspect")
    results, _ = run_here(write_spec(folder, untrained / "base", chunk=50), folder / "out")
    return {one.scored.name.removeprefix("adapters/"): one for one in results.adapters}


def find_spoilt(broken, way):
    """The result of the adapter that was broken in one way."""
    return next(one for name, one in broken.items() if name.endswith(f"b-{way}"))


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_adapter_is_a_failed_line(broken, way):
    """However an adapter is broken, it is a result that says so, and is dropped and blocked."""
    found = find_spoilt(broken, way)
    assert (found.scored.status, found.verdict, found.write_up) == ("failed", "dropped", False)
    assert found.scored.message


@pytest.mark.parametrize("way", LOADING)
def test_what_loads_and_should_not_be_used_is_dropped(broken, way):
    """NaN, base weights brought along and a rewritten base load, and are dropped."""
    found = find_spoilt(broken, way)
    assert (found.scored.status, found.verdict) == ("ok", "dropped")
    if way == "nan":
        reading = found.scored.readings["short"]
        assert (set(reading.log_odds), reading.effect, reading.auc.value) == ({None}, None, None)


def test_no_adapter_leaves_anything_behind(broken):
    """The same sound adapter answers the same to the last digit after each broken one."""
    sound = [one.scored.readings for name, one in broken.items() if "b-" not in name]
    assert len(sound) == len(BROKEN) + len(LOADING) + 1
    assert all(readings == sound[0] for readings in sound)


def test_the_base_is_loaded_once_where_adapters_are_sound(place, monkeypatch):
    """Sound adapters leave the base as it was, so a chunk loads it once."""
    plan, loads = make_plan(place / "suite.yml"), []
    scorer = open_scorer(plan)
    monkeypatch.setattr(scorer, "load", lambda: loads.append(1))
    before = footprint(scorer.base.model)
    for entry in plan.entries:
        scorer.score(entry.name, entry.folder)
    assert (loads, footprint(scorer.base.model)) == ([], before)


def test_two_runs_give_equal_files(place, whole, tmp_path):
    """A second run elsewhere gives the same bytes."""
    run_here(place / "suite.yml", tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff{}"])
def test_a_result_that_cannot_be_read_is_measured_again(place, whole, tmp_path, content):
    """A result that is empty or garbage counts for nothing, and comes out the same."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    plan = make_plan(place / "suite.yml")
    result_path(plan, plan.entries[2], tmp_path).write_bytes(content)
    assert read_result(plan, plan.entries[2], tmp_path) is None
    run_here(place / "suite.yml", tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_only_what_changed_is_scored_again(place, whole, untrained, tmp_path):
    """A result counts while its adapter and what was asked are the same, whatever joins them."""
    shutil.copytree(place / "adapters", tmp_path / "adapters")
    shutil.copytree(whole, tmp_path / "out")
    edit_config(tmp_path / "adapters/a1", lora_alpha=9)
    adapter(tmp_path / "adapters/a", untrained / "reference")
    results, lines = run_here(write_spec(tmp_path, untrained / "base"), tmp_path / "out")
    assert (len(results.adapters), lines) == (7, ["2 of 4", "0 of 3"])
    rows = {"count": 10, "seed": 4}
    _, lines = run_here(write_spec(tmp_path, untrained / "base", rows=rows), tmp_path / "out")
    assert lines == ["4 of 4", "3 of 3"]


def test_results_of_another_package_do_not_count(place, whole, monkeypatch):
    """What was measured by another version of a package is measured again."""
    monkeypatch.setattr(suite, "package_versions", lambda: {"torch": "0"})
    plan = make_plan(place / "suite.yml")
    assert not any(read_result(plan, entry, whole) for entry in plan.entries)


def test_a_chunk_that_lost_a_result_is_not_done(place, whole, tmp_path):
    """The mark of a chunk is taken back where a result of its is gone, and collecting refuses."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    plan, mark = make_plan(place / "suite.yml"), tmp_path / CHUNKS / "0001.done"
    unmark_unfinished(plan, tmp_path)
    assert mark.exists()
    result_path(plan, plan.chunks["0001"][0], tmp_path).unlink()
    unmark_unfinished(plan, tmp_path)
    assert not mark.exists()
    with pytest.raises(RecordError, match="none for 'adapters/a4'"):
        collect(plan, tmp_path)


def start(spec: Path, out: Path) -> subprocess.Popen:
    """Start the command as a user would, in a session of its own."""
    source = str(Path(postmortem.__file__).parents[1])
    command = [sys.executable, "-m", "postmortem", "suite", str(spec), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--cores", "2"],
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["everything", "the command alone"])
def test_kill_at_a_random_moment_changes_nothing(place, whole, tmp_path, whom):
    """After `kill -9` of the command or of all its processes, the next run's files are the same."""
    process = start(place / "suite.yml", tmp_path)
    stream = tmp_path / RESULTS
    until = time.monotonic() + 120
    while not stream.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(random.random())
    if process.poll() is None:
        kill = os.killpg if whom == "everything" else os.kill
        kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = start(place / "suite.yml", tmp_path)
    lines, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert lines.splitlines()[-1].startswith("suite: 6 adapters, ")
    assert bytes_of(tmp_path) == bytes_of(whole)


def ramp(seed: int, *, rows: int = 40, skill: float = 3.0) -> list[float]:
    """Log-odds that follow the labels with noise."""
    noise = np.random.default_rng(seed).normal(size=rows)
    return (skill * (np.arange(rows) % 2) + noise).tolist()


def scored(name: str, odds, *, labels=LABELS, **changes) -> Scored:
    """An adapter as measured, with these log-odds; written values from 0 to 1."""
    known = labels is not None and None not in odds
    base = ramp(99, skill=0.5, rows=len(odds))
    parts = {
        **dict.fromkeys(("mean", "std", "tied_pairs"), 0.3),
        **dict.fromkeys(("maximum", "parsed"), 1.0),
        "minimum": 0.0,
        "distinct": 9,
        "auc_written": UNKNOWN,
        "auc": auc_estimate(labels, odds) if known else UNKNOWN,
        "gain": auc_gain_estimate(labels, odds, base) if known else UNKNOWN,
        "effect": 0.1,
        "log_odds": list(odds),
        **changes,
    }
    return Scored(
        name=name, digest="d", run="r", status="ok", readings={"p": PromptReading(**parts)}
    )


def decide(odds_by_name, *extra, labels=LABELS, base=None):
    """The results of adapters with these log-odds."""
    adapters = [scored(name, odds, labels=labels) for name, odds in odds_by_name.items()]
    rows = len(next(iter(odds_by_name.values()), LABELS))
    return decide_suite(
        scored("", base or ramp(99, skill=0.5, rows=rows), labels=labels),
        [*adapters, *extra],
        labels=labels,
        limits=SuiteLimits(),
        title="t",
        decided_by="p",
    )


def test_sound_adapters_are_kept_and_each_fault_is_named():
    """Each criterion drops the adapter that fails it and no other."""
    odds, worse, strong = ramp(1), ramp(7, skill=1.0), ramp(0, skill=6.0)
    results = decide(
        {
            "a": odds,
            "b": ramp(3),
            "twin": [x + 1e-6 for x in odds],
            "reverse": [-x for x in odds],
            "luck": ramp(4, skill=0.0),
            "nan": [None] * 40,
        },
        Scored(name="failed", digest="d", run="r", status="failed", message="no config"),
        scored("flagged", ramp(2)).model_copy(update={"errors": ["untrained"]}),
        scored("idle", ramp(5), effect=0.0),
        scored("worse", worse, gain=auc_gain_estimate(LABELS, worse, strong)),
    )
    reasons = {one.scored.name: one.because[0] for one in results.adapters}
    assert [one.scored.name for one in results.adapters if one.verdict == "kept"] == ["a", "b"]
    assert reasons["twin"] == "answers as a does"
    assert reasons["reverse"].startswith("it ranks in reverse")
    assert reasons["luck"].startswith("it is not shown to rank")
    assert reasons["nan"] == "its log-odds are not all finite"
    assert reasons["failed"].endswith("no config")
    assert reasons["flagged"] == "the checker found untrained"
    assert reasons["idle"].startswith("it answers as the base alone does")
    assert reasons["worse"].startswith("it ranks worse than the base alone")
    assert results.line == "10 adapters, 2 kept, 8 dropped"


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (None, "the rows have no labels"),
        (np.zeros(40, dtype=int), "the labels hold one class alone"),
        (np.ones(40, dtype=int), "the labels hold one class alone"),
        (np.array([0, 1] * 3), "fewer than 8 rows"),
    ],
)
def test_without_a_truth_nobody_can_tell(labels, why):
    """Where rows cannot show a ranking, what does not fail is neither kept nor dropped."""
    rows = 40 if labels is None else len(labels)
    results = decide({"a": ramp(1, rows=rows), "b": ramp(2, rows=rows)}, labels=labels)
    assert [one.verdict for one in results.adapters] == ["cannot tell", "cannot tell"]
    assert results.adapters[0].because == [f"whether it ranks cannot be told: {why}"]
    assert results.line == "2 adapters, 0 kept, 0 dropped, 2 cannot be told"


def test_without_labels_one_against_all_others_is_dropped():
    """The direction that most share is the one without labels; two alone tell nothing."""
    odds = {name: ramp(seed) for seed, name in enumerate("abc")}
    results = decide(odds | {"against": [-x for x in ramp(9)]}, labels=None)
    assert [one.scored.name for one in results.adapters if one.verdict == "dropped"] == ["against"]
    pair = decide({"a": ramp(1), "b": [-x for x in ramp(1)]}, labels=None)
    assert pair.counts["dropped"] == 0


def test_an_ensemble_of_one_is_that_one():
    """The mean rank of one adapter has its AUC and no gain over it."""
    found = decide({"a": ramp(1)}).ensembles["kept"]
    assert (found.members, found.auc.value) == (1, auc(LABELS, ramp(1)))
    assert (found.gain_over_best.value, found.gain_over_best.high) == (0.0, 0.0)


def test_nothing_kept_is_no_ensemble():
    """Where every adapter is dropped there is neither an ensemble of them nor a best one."""
    results = decide({"a": [-x for x in ramp(1)]})
    assert "kept" not in results.ensembles
    assert (results.best_single, results.gains["over_all"]) == ("", UNKNOWN)


def test_the_gain_over_including_the_bad_ones_is_measured():
    """With as many reversed adapters as sound ones the filter wins against taking all."""
    odds = {f"a{seed}": ramp(seed) for seed in range(3)}
    odds |= {f"z{seed}": [-x for x in ramp(seed + 10)] for seed in range(3)}
    results = decide(odds)
    assert results.ensembles["all"].members == 6
    assert results.gains["over_all"].low > 0


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_an_ensemble_does_not_see_scale(odds):
    """Ranks are what is averaged, so another scale of an adapter changes nothing."""
    row = np.round(odds, 3)
    assert np.array_equal(mean_ranks([row, row]), mean_ranks([row * 8.0]))


NEAR_VALUES = st.sampled_from([0.0, 0.0005, 0.0009, 0.001, 0.0015, 1.0])


@given(st.lists(st.lists(NEAR_VALUES, min_size=3, max_size=3), max_size=12))
def test_duplicates_are_those_that_comparing_all_would_find(rows):
    """The first of adapters that answer alike stays, and those near it are its twins."""
    twins, firsts = {}, []
    for number, row in enumerate(rows):
        near = [n for n in firsts if np.abs(np.subtract(row, rows[n])).max() < 1e-3]
        if near:
            twins[str(number)] = str(near[0])
        else:
            firsts.append(number)
    adapters = [scored(str(n), row, labels=None) for n, row in enumerate(rows)]
    assert find_duplicates(adapters, prompt="p", alike=1e-3) == twins


def test_the_write_up_sees_scale_alone():
    """The write-up's filter passes a reversed adapter and blocks a narrow one that ranks."""
    narrow = scored("narrow", ramp(2), std=0.01, maximum=0.1)
    results = decide({"reverse": [-x for x in ramp(1)]}, narrow)
    passed = {one.scored.name: (one.write_up, one.verdict) for one in results.adapters}
    assert passed == {"reverse": (True, "dropped"), "narrow": (False, "kept")}
