import json
import os
import signal
import struct

import pytest
from handmade import CONFIG, header, write
from hypothesis import given
from hypothesis import strategies as st

from postmortem.checker import errors
from postmortem.checker.errors import UntrustedError, match_names
from postmortem.cli import main

HANG = 120  # seconds that only a check without an end takes, however busy the machine


def run(*arguments):
    """Run the command line; it must come to an end, and never with a traceback."""
    before = signal.signal(signal.SIGALRM, stop_hanging)
    signal.alarm(HANG)
    try:
        main(["check", *arguments])
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def stop_hanging(number, frame):
    """Fail the test that is running."""
    raise AssertionError(f"a check that has not ended after {HANG} s")


FIRST = next(iter(header()))


def changed(**parts):
    """The sound header with parts of its first entry changed, as JSON."""
    entries = header()
    entries[FIRST] |= parts
    return json.dumps(entries).encode()


HEADERS = {
    "overlap": changed(shape=[4, 1536], data_offsets=[0, 12288]),
    "hole": json.dumps({key: entry for key, entry in header().items() if key != FIRST}).encode(),
    "negative": changed(data_offsets=[-2, 6142]),
    "reversed": changed(data_offsets=[6144, 0]),
    "huge offsets": changed(data_offsets=[0, 10**40]),
    "wrong size": changed(shape=[3, 1536]),
    "unknown dtype": changed(dtype="Q8"),
    "boolean shape": changed(shape=[True, 3072]),
    "many dimensions": changed(shape=[10**9] * 5000),
    "entry is a list": json.dumps({**header(), FIRST: []}).encode(),
    "duplicate key": json.dumps(header()).encode().replace(b"layers.1.", b"layers.0.", 2),
    "not JSON": b"{" * 100,
    "deep JSON": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a list": b"[]",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "huge number": b'{"a": ' + b"9" * 100_000 + b"}",
    "empty": b"",
    "8 MB of JSON": b'{"__metadata__": {' + b'"k": "v", ' * 790_000 + b'"z": "v"}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_header_is_an_error(name, tmp_path, capsys):
    """A header that does not tile the file exactly is named as damage, with exit code 1."""
    assert run(str(write(tmp_path / "a", HEADERS[name]))) == 1
    assert "corrupt-weights" in capsys.readouterr().out


def test_the_sound_file_of_these_tests_is_sound(tmp_path, capsys):
    """The file that the hostile ones are changed from fits its base."""
    assert run(str(write(tmp_path / "a"))) == 0
    assert capsys.readouterr().out.startswith("fits")


@pytest.mark.parametrize(
    ("length", "file_size"), [(10**18, 100), (2**64 - 1, 64), (9_000_000, 9_000_100), (50, 20)]
)
def test_header_length_is_bounded(length: int, file_size: int, tmp_path):
    """A header length beyond the file or beyond eight megabytes is refused unread."""
    folder = write(tmp_path / "a")
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(file_size)
    assert run(str(folder)) == 1


def test_a_terabyte_of_holes_is_not_read(tmp_path):
    """A sparse file, as an unfinished download leaves, is named as damage and not scanned."""
    size = 10**12
    entries = {FIRST: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    folder = write(tmp_path / "a", json.dumps(entries).encode(), b"")
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size + size)
    assert run(str(folder)) == 1


CONFIGS = {
    "not JSON": "{",
    "a list": "[]",
    "a number": "1",
    "deep JSON": "[" * 200_000,
    "deep value": '{"peft_type": "LORA", "r": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "huge": '{"peft_type": "LORA", "x": "' + "y" * 9_000_000 + '"}',
    "many keys": "{" + ",".join(f'"k{i}": 1' for i in range(300_000)) + "}",
    "duplicate": '{"peft_type": "LORA", "r": 1, "r": 2}',
}
# The same as changes of a sound configuration.
SETTINGS = {
    "r true": {"r": True},
    "r huge text": {"r": "9" * 5000},
    "r beyond int": {"r": 10**400},
    "r a list": {"r": [1]},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha beyond float": {"lora_alpha": 10**400},
    "peft_type a list": {"peft_type": ["LORA"]},
    "peft_type unknown": {"peft_type": "LORA2"},
    "task_type an object": {"task_type": {"a": 1}},
    "bias a list": {"bias": ["all"]},
    "targets of numbers": {"target_modules": [1, 2]},
    "nested repeats": {"target_modules": "(([a-z._0-9]+)*)*!"},
    "many repeats": {"target_modules": ".*" * 30 + "!"},
    "counted repeats": {"target_modules": "((a{0,999}){0,999}){0,999}!"},
    "back-reference": {"target_modules": r"(.+)+\1+!"},
    "broken regex": {"target_modules": "(["},
    "long regex": {"target_modules": "a|" * 100_000},
    "regex as rank": {"rank_pattern": {"(.+)+!": 2}},
    "regex excluded": {"exclude_modules": "(.*.*)*!"},
    "many saved": {"modules_to_save": [f"m{i}" for i in range(200_000)]},
    "many targets": {"target_modules": [f"m{i}" for i in range(400_000)]},
    "many ranks": {"rank_pattern": {f"m{i}": 1 for i in range(300_000)}, "r": 3},
}


@pytest.mark.parametrize("name", [*CONFIGS, *SETTINGS])
def test_hostile_config_is_an_error(name, tmp_path, capsys):
    """A configuration that PEFT would not accept, or that no one should run, is an error."""
    folder = write(tmp_path / "a", **SETTINGS.get(name, {}))
    if name in CONFIGS:
        (folder / "adapter_config.json").write_text(CONFIGS[name])
    assert run(str(folder)) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_other_methods_cannot_be_checked(tmp_path, capsys):
    """An adapter of another PEFT method is refused by name, with exit code 2."""
    assert run(str(write(tmp_path / "a", peft_type="IA3"))) == 2
    assert "IA3" in capsys.readouterr().err


@pytest.mark.parametrize("filename", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_out_of_the_folder_are_not_followed(filename, tmp_path, capsys):
    """A link that leads out of the adapter's folder is refused, whatever it points to."""
    folder = write(tmp_path / "a")
    (tmp_path / "outside").write_bytes((folder / filename).read_bytes())
    (folder / filename).unlink()
    (folder / filename).symlink_to("../outside")
    assert run(str(folder)) == 2
    assert "leads out" in capsys.readouterr().err


def test_links_within_the_hub_cache_are_followed(tmp_path):
    """The hub's cache keeps snapshots as links to its own blobs: those are the adapter's files."""
    snapshot = tmp_path / "models--acme--a" / "snapshots" / "0f"
    snapshot.parent.mkdir(parents=True)
    blobs = tmp_path / "models--acme--a" / "blobs"
    blobs.mkdir()
    write(snapshot)
    for index, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(index))
        path.symlink_to(f"../../blobs/{index}")
    assert run(str(snapshot)) == 0


@pytest.mark.parametrize("make", ["loop", "dangling", "folder", "pipe"])
def test_things_that_are_no_files_are_refused(make, tmp_path):
    """A loop of links, a dangling one, a folder or a pipe in place of the weights is refused."""
    folder = write(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.unlink()
    {
        "loop": lambda: path.symlink_to(path.name),
        "dangling": lambda: path.symlink_to("nowhere"),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }[make]()
    assert run(str(folder)) == 2


def test_the_base_that_an_adapter_names_is_never_opened(tmp_path, capsys):
    """A path in the configuration, with or without dots, is not followed."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text('{"model_type": "llama"}')
    folder = write(tmp_path / "a", base_model_name_or_path="../secret")
    assert run(str(folder)) == 0
    assert "no known base" in capsys.readouterr().out


def test_a_pickle_is_named_and_not_opened(tmp_path):
    """A pickle that would run code is reported, and the code does not run."""
    marker = tmp_path / "ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(payload)
    assert run(str(folder)) == 1
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x02" + payload)
    assert run(str(folder)) == 1
    assert not marker.exists()


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    """Text of the adapter cannot move the cursor or colour the report."""
    name = "base_model.model.\x1b[2J\x07.lora_A.weight"
    entry = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({**header(), name: entry}).encode()
    run(str(write(tmp_path / "a", text, _note="\x1b[31mred")))
    assert "\x1b" not in capsys.readouterr().out


def test_markup_does_not_reach_the_page(tmp_path, capsys):
    """Text of the adapter cannot form HTML or table cells in a Markdown report."""
    folder = write(tmp_path / "a", **{"<script>|": "[x](y)"})
    run(str(folder), "--format", "markdown")
    out = capsys.readouterr().out
    assert "<script>" not in out
    assert "](" not in out


@pytest.mark.parametrize("base", ["no-such-thing", "/nowhere/at/all", "a/b/c", "~/x", "."])
def test_a_base_that_cannot_be_read_ends_in_exit_2(base, tmp_path, monkeypatch):
    """A base that is no folder, config, hub id or known name is said to be so."""
    monkeypatch.chdir(tmp_path)
    assert run(str(write(tmp_path / "a")), "--base", base) == 2


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "/dev/null", "\x1b[2J", "../" * 900])
def test_names_that_are_no_paths_end_in_exit_2(name, capsys):
    """An argument that cannot be a path is refused in one line."""
    assert run(name, "--base", name) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [b"[", b"[]", b"{}", b'{"model_type": "llama", "hidden_size": "9"}', b"\xff", b"9" * 9_000_000],
)
def test_a_hostile_base_config_is_refused_or_unknown(content, tmp_path):
    """A config.json of a base is as untrusted as an adapter's."""
    base = tmp_path / "config.json"
    base.write_bytes(content)
    assert run(str(write(tmp_path / "a")), "--base", str(base)) in (0, 2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = st.sampled_from([*CONFIG, "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora"])
MORE_KEYS = st.sampled_from(
    ["auto_mapping", "trainable_token_indices", "layers_to_transform", "init_lora_weights", "bias"]
)
NAMES = st.sampled_from(
    [*header(1), "base_model.model.lm_head.weight", "x", ".lora_A", "a.lora_A.b"]
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 99), max_size=3) | JSON,
    },
)


@given(content=st.binary(max_size=300))
def test_any_bytes_as_weights(content, tmp_path):
    """Any bytes as a weights file give a finding or a clear refusal, never a traceback."""
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(content)
    assert run(str(folder), "--format", "json") == 1


@given(
    text=st.binary(max_size=200) | st.dictionaries(NAMES, ENTRIES | JSON, max_size=4),
    data=st.binary(max_size=99),
)
def test_any_header(text, data, tmp_path):
    """Any header over any data gives a finding or a clear refusal, never a traceback."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    assert run(str(write(tmp_path / "a", raw, data)), "--format", "json") in (1, 2)


@given(config=st.dictionaries(KEYS | MORE_KEYS | st.text(max_size=9), JSON, max_size=6) | JSON)
def test_any_json_as_config(config, tmp_path):
    """Any JSON as configuration gives a finding or a clear refusal, never a traceback."""
    folder = write(tmp_path / "a")
    content = {**CONFIG, **config} if isinstance(config, dict) else config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert run(str(folder), "--header-only", "--format", "markdown") in (0, 1, 2)


@pytest.mark.parametrize(
    "pattern",
    [
        "a?" * 40 + "a" * 40 + "b",
        ".*" + "(a|a)" * 40 + "b",
        "(?:a|ab?)" * 30 + "c",
        "(a+)+b",
        "a*a*a*b",
    ],
)
def test_choices_in_a_row_are_stopped(pattern: str) -> None:
    """A pattern can be exponential without a repeated group: it ends in time, with a reason."""
    with pytest.raises(UntrustedError, match="did not finish in time"):
        match_names([pattern], ["a" * (50 if "?" in pattern or "|" in pattern else 3000)])


def test_usual_patterns_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What people write is matched at once, however busy the machine is."""
    monkeypatch.setattr(errors, "_match_in_child", None)
    usual = [r"(.*\.)?(layers\.\d+\.mlp)", r"model\.(a|b|c|d|e)\.(q|k|v|o)_proj", r".*_proj"]
    assert match_names(usual, ["model.a.q_proj"])[usual[1]] == {"model.a.q_proj"}


def test_long_lists_take_linear_time(tmp_path, capsys) -> None:
    """Names are looked up and not compared one by one: a list of many thousands ends in time."""
    names = [f"experts.p{number}" for number in range(100_000)]
    folder = write(tmp_path / "adapter", target_parameters=names)
    with pytest.raises(SystemExit):
        main(["check", str(folder), "--base", "Qwen/Qwen2.5-1.5B", "--format", "json"])
    found = {f["id"]: f["evidence"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert "experts.p0, experts.p1" in found["target-unmatched"]
