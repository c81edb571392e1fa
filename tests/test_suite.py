import csv
import io
import json
import os
import random
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
from postmortem.suite.results import (
    UNKNOWN,
    as_csv,
    collect,
    decide_suite,
    find_duplicates,
    find_reversed,
    mean_ranks,
    safe_cell,
)
from postmortem.suite.scoring import open_scorer, score_chunk
from postmortem.suite.suite import (
    CHUNKS,
    RESULTS,
    Limits,
    Reading,
    Scored,
    find_adapters,
    load_suite,
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


def adapter(place: Path, source: Path, change=None, **config) -> Path:
    """A copy of an adapter, changed."""
    shutil.copytree(source, place)
    if change:
        edit_tensors(place, change)
    if config:
        edit_config(place, **config)
    return place


def spoil(place: Path, source: Path, name: str) -> None:
    """One adapter that is broken in the way of its name."""
    folder = adapter(place / name, source)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
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
            folder,
            lambda t: {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in t.items()},
        ),
        "nan": lambda: edit_tensors(folder, lambda t: {k: v * float("nan") for k, v in t.items()}),
        "nothing": lambda: shutil.rmtree(folder) or folder.mkdir(),
        "base-weights": lambda: edit_tensors(
            folder,
            lambda t: {**t, "base_model.model.model.norm.weight": torch.full((64,), 3.0)},
        ),
        "rewrites-base": lambda: edit_config(folder, init_lora_weights="pissa"),
    }
    changes[name]()


BROKEN = (
    *("corrupt", "truncated", "empty", "no-config", "no-weights", "not-json", "config-a-list"),
    *("config-a-folder", "another-method", "rank-as-text", "shapes", "nothing"),
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
    """Run a suite in this process, as its graph would."""
    plan = make_plan(spec)
    write_plan(plan, out)
    for number in plan.chunks:
        score_chunk(plan, out, number)
    return collect(plan, out)


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
    ("changes", "error", "told"),
    [
        ({"suite_version": 2}, CaseError, "suite_version"),
        ({"adapters": []}, CaseError, "at least 1 item"),
        ({"adapters": ["none/*"]}, SuiteError, "at least one adapter folder; found none"),
        ({"ask": ["v9"]}, SuiteError, "one of short; found no such prompt"),
        ({"rows": {}}, SuiteError, "a `count` above 0"),
        ({"unknown": 1}, CaseError, "a known key"),
        ({"limits": {"chance": {"value": 0.5}}}, CaseError, "because"),
    ],
)
def test_a_wrong_suite_file_is_refused_with_its_key(untrained, tmp_path, changes, error, told):
    """What a suite file lacks or names wrongly is said before any model is loaded."""
    with pytest.raises(error, match=told):
        make_plan(write_spec(tmp_path, untrained / "base", **changes))


def test_a_missing_suite_file_is_named(tmp_path):
    """A suite file that is not there is an error of ours."""
    with pytest.raises(CaseError, match="expected a suite file; found no such file"):
        load_suite(tmp_path / "none.yml")


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


HOSTILE = ("=cmd|'x'!A1", "+1", "@a", 'a,b"c', "<script>", "a\nb", "\u202egnp", "-x", "a\tb")


def test_hostile_names_stay_text(tmp_path, untrained):
    """A folder's name reaches no table as a formula, a line break or a control character."""
    folders = []
    for name in (*HOSTILE, os.fsdecode(b"\xff\xfe")):
        (tmp_path / "x" / name).mkdir(parents=True)
        folders.append(tmp_path / "x" / name)
    entries = name_adapters(sorted(folders, key=os.fsencode), tmp_path / "x")
    results = judge(dict.fromkeys([entry.name for entry in entries], ramp(0)))
    rows = list(csv.reader(io.StringIO(as_csv(results))))[1:]
    assert len(rows) == len(folders)
    assert all(row[0].isprintable() and row[0][0] not in "=+-@" for row in rows)
    json.loads(results.model_dump_json())


def test_names_that_print_alike_stay_apart(tmp_path):
    """Two folders whose names differ in what cannot be printed have two names."""
    for name in ("a\x01", "a\x02"):
        (tmp_path / name).mkdir()
    assert [e.name for e in name_adapters(sorted(tmp_path.iterdir()), tmp_path)] == ["a?", "a? (2)"]


@given(st.text())
def test_no_text_cell_is_a_formula(text):
    """Whatever a cell held, a spreadsheet takes it for text."""
    assert not safe_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.fixture(scope="module")
def broken(untrained, tmp_path_factory):
    """The results of one adapter broken in each way, between sound ones that are all equal."""
    folder = tmp_path_factory.mktemp("broken")
    for number, name in enumerate((*BROKEN, *LOADING)):
        spoil(folder / "adapters", untrained / "suspect", name)
        (folder / "adapters" / name).rename(folder / "adapters" / f"{number:02d}b-{name}")
        adapter(folder / "adapters" / f"{number:02d}a", untrained / "suspect")
    adapter(folder / "adapters" / "99", untrained / "suspect")
    spec = write_spec(folder, untrained / "base", chunk=50)
    return {
        j.scored.name.partition("b-")[2] or j.scored.name: j
        for j in run_here(spec, folder / "out").adapters
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_a_failed_line(broken, name):
    """However an adapter is broken, it is a result that says so, and is dropped and blocked."""
    found = broken[name]
    assert (found.scored.status, found.verdict, found.write_up) == ("failed", "dropped", False)
    assert found.scored.message


@pytest.mark.parametrize("name", LOADING)
def test_what_loads_and_should_not_be_used_is_dropped(broken, name):
    """NaN, base weights brought along and a rewritten base load, and are dropped."""
    assert broken[name].scored.status == "ok"
    assert broken[name].verdict != "kept"


def test_nan_is_no_number_anywhere(broken):
    """Log-odds that are not finite are nothing, and their effect is unknown."""
    reading = broken["nan"].scored.readings["short"]
    assert (set(reading.log_odds), reading.effect, reading.auc) == ({None}, None, reading.gain)


def test_no_adapter_leaves_anything_behind(broken):
    """The same sound adapter answers the same to the last digit after each broken one."""
    sound = [j.scored.readings for name, j in broken.items() if name.startswith("adapters/")]
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


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff{}", "half"])
def test_a_result_that_cannot_be_read_is_measured_again(place, whole, tmp_path, content):
    """A result that is cut short, empty or garbage counts for nothing, and comes out the same."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    plan = make_plan(place / "suite.yml")
    path = result_path(plan, plan.entries[2], tmp_path)
    held = path.read_bytes()
    path.write_bytes(held[: len(held) // 2] if content == "half" else content)
    assert read_result(plan, plan.entries[2], tmp_path) is None
    run_here(place / "suite.yml", tmp_path)
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_only_what_changed_is_scored_again(place, untrained, tmp_path):
    """A result counts while adapter, base, rows and prompts are those it was measured on."""
    shutil.copytree(place / "adapters", tmp_path / "adapters")
    spec, out = write_spec(tmp_path, untrained / "base"), tmp_path / "out"
    run_here(spec, out)
    edit_config(tmp_path / "adapters/a1", lora_alpha=9)
    plan, told = make_plan(spec), []
    for number in plan.chunks:
        score_chunk(plan, out, number, report=told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "1 of 4 adapters scored",
        "0 of 2 adapters scored",
    ]
    other = make_plan(write_spec(tmp_path, untrained / "base", rows={"count": 10, "seed": 4}))
    assert all(read_result(plan, entry, out) for entry in plan.entries)
    assert not any(read_result(other, entry, out) for entry in other.entries)


def test_an_adapter_that_joins_moves_the_others_and_is_scored_alone(
    place, whole, untrained, tmp_path
):
    """One more adapter at the front changes every chunk, and nothing else is measured again."""
    shutil.copytree(place / "adapters", tmp_path / "adapters")
    shutil.copytree(whole, tmp_path / "out")
    adapter(tmp_path / "adapters/a", untrained / "reference")
    plan, told = make_plan(write_spec(tmp_path, untrained / "base")), []
    unmark_unfinished(plan, tmp_path / "out")
    for number in plan.chunks:
        score_chunk(plan, tmp_path / "out", number, report=told.append)
    assert [line.partition(": ")[2] for line in told] == [
        "1 of 4 adapters scored",
        "0 of 3 adapters scored",
    ]
    assert len(collect(plan, tmp_path / "out").adapters) == 7


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
    told, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert told.splitlines()[-1].startswith("suite: 6 adapters, ")
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
    return Scored(name=name, digest="d", run="r", status="ok", readings={"p": Reading(**parts)})


def judge(odds_by_name, *, labels=LABELS, extra=()):
    """The results of adapters with these log-odds."""
    found = [scored(name, odds, labels=labels) for name, odds in odds_by_name.items()]
    rows = len(next(iter(odds_by_name.values()), LABELS))
    return decide_suite(
        scored("", ramp(99, skill=0.5, rows=rows), labels=labels),
        [*found, *extra],
        labels=labels,
        limits=Limits(),
        title="t",
        decided_by="p",
    )


def verdicts(results) -> dict[str, str]:
    """The word of each adapter."""
    return {j.scored.name: j.verdict for j in results.adapters}


def test_sound_adapters_are_kept_and_each_fault_is_named():
    """Each criterion drops the adapter that fails it and no other."""
    odds = ramp(1)
    failed = Scored(name="f", digest="d", run="r", status="failed", message="no config")
    flagged = scored("e", ramp(2)).model_copy(update={"errors": ["untrained"]})
    results = judge(
        {
            "a": odds,
            "b": ramp(3),
            "twin": [x + 1e-6 for x in odds],
            "reverse": [-x for x in odds],
            "luck": ramp(4, skill=0.0),
            "nan": [None] * 40,
        },
        extra=[failed, flagged, scored("idle", ramp(5), effect=0.0)],
    )
    told = {j.scored.name: "; ".join(j.because) for j in results.adapters}
    assert [name for name, word in verdicts(results).items() if word == "kept"] == ["a", "b"]
    assert told["twin"] == "answers as a does"
    assert told["reverse"].startswith("it ranks in reverse")
    assert told["luck"].startswith("it is not shown to rank")
    assert told["nan"] == "its log-odds are not all finite"
    assert told["f"].endswith("no config")
    assert told["e"] == "the checker found untrained"
    assert told["idle"].startswith("it answers as the base alone does")
    assert results.line == "9 adapters, 2 kept, 7 dropped"


def test_one_that_ranks_worse_than_the_base_is_dropped():
    """An adapter above chance that costs the base its ranking is not kept."""
    strong, worse = ramp(0, skill=6.0), ramp(7, skill=1.0)
    base, gain = scored("", strong), auc_gain_estimate(LABELS, worse, strong)
    found = decide_suite(
        base,
        [scored("w", worse, gain=gain)],
        labels=LABELS,
        limits=Limits(),
        title="t",
        decided_by="p",
    ).adapters[0]
    assert found.scored.readings["p"].auc.low > 0.5
    assert found.because[0].startswith("it ranks worse than the base alone")


def test_without_labels_nobody_can_tell():
    """Without labels what does not fail is neither kept nor dropped, and there is no AUC."""
    results = judge({"a": ramp(1), "b": ramp(2)}, labels=None)
    assert set(verdicts(results).values()) == {"cannot tell"}
    assert "the rows have no labels" in results.adapters[0].because[0]
    assert (results.best_single, results.best_auc, results.ensembles["kept"].auc) == (
        "",
        UNKNOWN,
        UNKNOWN,
    )
    assert results.line == "2 adapters, 0 kept, 0 dropped, 2 cannot be told"


def test_without_labels_one_against_all_others_is_dropped():
    """The direction that most share is the one without labels; two alone tell nothing."""
    odds = {name: ramp(seed) for seed, name in enumerate("abc")}
    results = judge(odds | {"against": [-x for x in ramp(9)]}, labels=None)
    assert verdicts(results)["against"] == "dropped"
    pair = [scored("a", ramp(1)), scored("b", [-x for x in ramp(1)])]
    assert find_reversed(pair, prompt="p") == []


@pytest.mark.parametrize("labels", [np.zeros(40, dtype=int), np.ones(40, dtype=int)])
def test_one_class_alone_is_no_ranking(labels):
    """Labels of one class say nothing of a ranking."""
    results = judge({"a": ramp(1)}, labels=labels)
    assert results.labels == "one class"
    assert "one class alone" in results.adapters[0].because[0]


def test_few_rows_cannot_tell():
    """A perfect order of six rows keeps nothing and drops nothing."""
    found = judge({"a": [0.0, 1, 0, 1, 0, 1]}, labels=np.array([0, 1] * 3))
    assert verdicts(found) == {"a": "cannot tell"}


def test_an_ensemble_of_one_is_that_one():
    """The mean rank of one adapter has its AUC and no gain over it."""
    found = judge({"a": ramp(1)}).ensembles["kept"]
    assert found.members == 1
    assert found.auc.value == auc(LABELS, ramp(1))
    assert (found.gain_over_best.value, found.gain_over_best.high) == (0.0, 0.0)


def test_nothing_kept_is_no_ensemble():
    """Where every adapter is dropped there is neither an ensemble of them nor a best one."""
    results = judge({"a": [-x for x in ramp(1)]})
    assert "kept" not in results.ensembles
    assert (results.best_single, results.gains["over_all"]) == ("", UNKNOWN)


def test_the_gain_over_including_the_bad_ones_is_measured():
    """With as many reversed adapters as sound ones the filter wins against taking all."""
    odds = {f"a{seed}": ramp(seed) for seed in range(3)}
    odds |= {f"z{seed}": [-x for x in ramp(seed + 10)] for seed in range(3)}
    results = judge(odds)
    assert results.ensembles["all"].members == 6
    assert results.gains["over_all"].low > 0


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.floats(0.1, 10), st.floats(-5, 5))
def test_an_ensemble_does_not_see_scale(odds, factor, offset):
    """Ranks are what is averaged, so another scale of a member changes nothing."""
    row = np.round(odds, 3)
    assert np.array_equal(mean_ranks([row]), mean_ranks([row * 8.0]))
    assert np.array_equal(mean_ranks([row, row]), mean_ranks([row]))


@given(st.permutations(list("abcdef")))
def test_the_first_of_equals_stays(names):
    """Of adapters that answer alike the first is kept, in whatever order they stand."""
    found = [scored(name, ramp(1)) for name in names]
    assert find_duplicates(found, prompt="p", alike=1e-3) == dict.fromkeys(names[1:], names[0])


@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, 0.0005, 0.0009, 0.001, 0.0015, 1.0]), min_size=3, max_size=3
        ),
        max_size=12,
    )
)
def test_duplicates_are_those_that_comparing_all_would_find(rows):
    """Looking among neighbours finds the first twin of each, as a look at all of them does."""
    found, firsts = {}, []
    for number, row in enumerate(rows):
        twins = (n for n in firsts if np.abs(np.subtract(row, rows[n])).max() < 1e-3)
        if (twin := next(twins, None)) is None:
            firsts.append(number)
        else:
            found[str(number)] = str(twin)
    parts = [scored(str(n), row, labels=None) for n, row in enumerate(rows)]
    assert find_duplicates(parts, prompt="p", alike=1e-3) == found


def test_the_write_up_sees_scale_alone():
    """The write-up's filter passes a reversed adapter and blocks a narrow one that ranks."""
    results = judge(
        {"reverse": [-x for x in ramp(1)]}, extra=[scored("narrow", ramp(2), std=0.01, maximum=0.1)]
    )
    passed = {j.scored.name: (j.write_up, j.verdict) for j in results.adapters}
    assert passed == {"reverse": (True, "dropped"), "narrow": (False, "kept")}
