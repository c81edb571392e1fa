"""Injectors that break a sound adapter, and what PEFT and the checker say to each.

The sound adapters are trained-looking ones (random lora_B) written by PEFT itself on tiny bases.
"""

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import AutoModelForSequenceClassification as AutoClassifier

from postmortem.checker.adapter import PICKLE_FILE, WEIGHTS_FILE
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.config import CONFIG_FILE
from postmortem.checker.errors import catalogue
from postmortem.checker.serving import Serving
from postmortem.experiments.session import Session
from postmortem.models.changes import Change, Tensors, edit_config, edit_tensors
from postmortem.models.loading import user_warnings


def record_reproductions(session: Session, folder: Path) -> None:
    """Reproduce each entry of the catalogue with PEFT and with the checker."""
    reproductions = reproduce(folder)
    session.table(
        "catalogue.reproductions",
        ("id", "fault injected", "PEFT", "our finding"),
        [(r.finding, r.fault, r.reaction, r.severity) for r in reproductions],
    )
    reactions = Counter(r.reaction for r in reproductions)
    for reaction in ("raises", "warns", "silent"):
        session.measure(f"catalogue.{reaction}", reactions[reaction], unit="faults")
    session.measure("catalogue.faults", len(reproductions), unit="faults")
    caught = {r.finding for r in reproductions if r.severity != "none"}
    missed = ", ".join(name for name in catalogue() if name not in caught)
    because = f"without reproduction: {missed}" if missed else "each entry has at least one"
    session.verdict("catalogue.all_reproduced", not missed, because)


_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
# model type -> (configuration, task, target modules)
TINY: Mapping[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "qwen2": ({**_GROUPED, "tie_word_embeddings": True}, "CAUSAL_LM", ("q_proj", "v_proj")),
    "llama": (_GROUPED, "CAUSAL_LM", ("q_proj", "down_proj")),
    "qwen3": ({**_GROUPED, "head_dim": 16}, "CAUSAL_LM", ("k_proj", "o_proj")),
    "phi3": (_GROUPED, "CAUSAL_LM", ("qkv_proj", "gate_up_proj")),
    "gpt2": (
        {**_SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "CAUSAL_LM",
        ("c_attn", "c_fc"),
    ),
    "gpt_neox": (_SIZES, "CAUSAL_LM", ("query_key_value", "dense_h_to_4h")),
    "opt": ({**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, "CAUSAL_LM", ("q_proj", "fc1")),
    "bert": (_SIZES, "SEQ_CLS", ("query", "value")),
    "t5": (_T5, "SEQ_2_SEQ_LM", ("q", "v")),
}
_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoClassifier,
}


Inject = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break an adapter: `inject` changes its folder, and returns it where it moved.

    `runtime` is the one that the adapter is then checked for; PEFT alone without one. `only` is the
    one architecture that has the fault, where not all have it.
    """

    finding: str
    name: str
    inject: Inject
    runtime: str = ""
    only: str = ""

    @property
    def serving(self) -> Serving:
        """Where the adapter is to be served."""
        return Serving((self.runtime,) if self.runtime else ())


@dataclass(frozen=True, slots=True)
class Reproduction:
    """One fault as it was reproduced: PEFT raises, warns or is silent; we find `severity`."""

    finding: str
    fault: str
    reaction: str
    severity: str


def save_base(folder: Path, model_type: str = "qwen2") -> Path:
    """Write a tiny base with random weights and return its folder."""
    values, task, _ = TINY[model_type]
    torch.manual_seed(0)
    model = _CLASSES[task].from_config(AutoConfig.for_model(model_type, **values))
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Write an adapter with PEFT whose weights are all random, as after training."""
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    _, task, targets = TINY[model_type]
    model = _CLASSES[task].from_pretrained(base)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": task, "target_modules": list(targets)}
    turned = {"fan_in_fan_out": model_type == "gpt2"}  # Its Conv1D stores weights as (in, out).
    adapted = get_peft_model(model, LoraConfig(**{**defaults, **turned, **options}))
    randomise(adapted)
    adapted.save_pretrained(folder)
    return folder


def randomise(adapted: torch.nn.Module) -> None:
    """Fill every trainable parameter with small random values."""
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)


def _config(*removed: str, **changes: object) -> Inject:
    return lambda folder: edit_config(folder, *removed, **changes)


def _tensors(change: Change) -> Inject:
    return lambda folder: edit_tensors(folder, change)


def _keys(change: Callable[[str], str]) -> Inject:
    return _tensors(lambda tensors: {change(k): v for k, v in tensors.items()})


def _on(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Inject:
    return _tensors(lambda tensors: {k: change(v) if part in k else v for k, v in tensors.items()})


def _without(pattern: str) -> Inject:
    return _tensors(lambda tensors: {k: v for k, v in tensors.items() if not re.search(pattern, k)})


def _keep(parts: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        kept, rows = torch.zeros_like(tensor), len(tensor) // parts
        kept[:rows] = tensor[:rows]
        return kept

    return change


def _bytes(change: Callable[[bytes], bytes]) -> Inject:
    def inject(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        path.write_bytes(change(path.read_bytes()))

    return inject


def _add_magnitudes(tensors: Tensors) -> Tensors:
    columns = {k: v[:, 0] for k, v in tensors.items() if k.endswith("lora_B.weight")}
    names = {k: k.replace("lora_B.weight", "lora_magnitude_vector") for k in columns}
    return {**tensors, **{names[k]: v for k, v in columns.items()}}


def _copy_deeper(tensors: Tensors) -> Tensors:
    return {**tensors, **{re.sub(r"^(\D+)1\.", r"\g<1>7.", k): v for k, v in tensors.items()}}


def _read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG_FILE).read_text()))


def _first_target(folder: Path) -> str:
    return str(min(_read_config(folder)["target_modules"]))


def _lose_rank_pattern(folder: Path) -> None:
    name = _first_target(folder)

    def halve(tensors: Tensors) -> Tensors:
        halved = {k: v for k, v in tensors.items() if f".{name}.lora_" in k}
        return tensors | {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in halved.items()}

    edit_tensors(folder, halve)


def _rename_target(folder: Path) -> None:
    name = _first_target(folder)
    _keys(lambda key: key.replace(f".{name}.", ".renamed_proj."))(folder)
    edit_config(folder, target_modules=["renamed_proj"])


def _add_embedding(rows: int) -> Inject:
    names = {
        "gpt2": "transformer.wte",
        "gpt_neox": "gpt_neox.embed_in",
        "opt": "model.decoder.embed_tokens",
        "bert": "bert.embeddings.word_embeddings",
        "t5": "shared",
    }

    def inject(folder: Path) -> None:
        base = Path(_read_config(folder)["base_model_name_or_path"])
        model_type = json.loads((base / "config.json").read_text())["model_type"]
        key = f"base_model.model.{names.get(model_type, 'model.embed_tokens')}.weight"
        edit_tensors(folder, lambda tensors: {**tensors, key: torch.ones(rows, 32)})

    return inject


def _add_base_layers(folder: Path) -> None:
    weights = load_file(Path(_read_config(folder)["base_model_name_or_path"], "model.safetensors"))

    def add(tensors: Tensors) -> Tensors:
        paths = [k.removesuffix(".lora_B.weight") for k in tensors if k.endswith(".lora_B.weight")]
        return tensors | {
            f"{path}.base_layer.weight": weights[path.removeprefix("base_model.model.") + ".weight"]
            for path in paths
        }

    edit_tensors(folder, add)


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / PICKLE_FILE)
    (folder / WEIGHTS_FILE).unlink()


def _pickle_stub(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / PICKLE_FILE).write_bytes(b"\x80\x02}q\x00." + bytes(437))


def _rename_folder(folder: Path) -> Path:
    edit_config(folder, base_model_name_or_path="acme/tiny-1.5B-Instruct")
    return folder.rename(folder.with_name("reddit-4b-think"))


def _nest(key: str) -> str:
    return key.replace("base_model.model.", "base_model.model.base_model.model.", 1)


def _wrap(name: str) -> Callable[[str], str]:
    return lambda key: re.sub(r"\.(\d+)\.", rf".\1.{name}.", key, count=1)


def _to_kohya(key: str) -> str:
    path, _, part = key.removesuffix(".weight").rpartition(".")
    name = path.removeprefix("base_model.model.").replace(".", "_")
    return f"lora_te_{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"


def _write_mlx(folder: Path) -> None:
    def turn(tensors: Tensors) -> Tensors:
        held = {k: v for k, v in tensors.items() if ".lora_" in k}
        names = {k: k.removeprefix("base_model.model.").removesuffix(".weight") for k in held}
        lower = {k: re.sub("lora_[AB]", lambda part: part[0].lower(), n) for k, n in names.items()}
        return {lower[k]: v.T for k, v in held.items()}

    edit_tensors(folder, turn)
    (folder / WEIGHTS_FILE).rename(folder / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4}}
    (folder / CONFIG_FILE).write_text(json.dumps(settings))


def _write_beside(folder: Path) -> None:
    (folder / "non_lora_trainables.bin").write_bytes(b"")


def _save_tied(folder: Path) -> None:
    _add_embedding(96)(folder)
    edit_config(folder, modules_to_save=["embed_tokens"])


def _list_another(folder: Path) -> None:
    edit_config(folder, target_modules=[*_read_config(folder)["target_modules"], "other_proj"])


def _drop_head(folder: Path) -> None:
    edit_config(folder, task_type="CAUSAL_LM", modules_to_save=None)
    key = "base_model.model.score.weight"
    edit_tensors(folder, lambda tensors: {**tensors, key: torch.ones(2, 32)})


def _raise_rank(folder: Path) -> None:
    def pad(tensors: Tensors) -> Tensors:
        # A is (rank, in) and B (out, rank): zeros add to the rank and leave the update.
        sides = {k: (0, 0, 0, 28) if "lora_A" in k else (0, 28) for k in tensors if ".lora_" in k}
        padded = {k: torch.nn.functional.pad(tensors[k], side) for k, side in sides.items()}
        return tensors | padded

    edit_tensors(folder, pad)
    edit_config(folder, r=32, lora_alpha=64)


def _keep_first_layer(folder: Path) -> None:
    edit_config(folder, layers_to_transform=[0])
    _without(r"^\D+1\..*lora_")(folder)


# Embedding names of all tiny bases: PEFT ignores those that a base does not have.
_EMBEDDINGS = ["embed_tokens", "wte", "embed_in", "word_embeddings", "shared"]

FAULTS = tuple(
    Fault(*fault)
    for fault in (
        ("shape-mismatch", "a base twice as wide", _on("lora_A", lambda t: torch.cat([t, t], 1))),
        ("shape-mismatch", "twice the attention heads", _on("lora_B", lambda t: torch.cat([t, t]))),
        ("rank-mismatch", "r doubled in the config", _config(r=8)),
        ("rank-mismatch", "rank_pattern lost", _lose_rank_pattern),
        ("missing-tensors", "every lora_B lost", _without("lora_B")),
        ("missing-tensors", "a layer lost", _without(r"^\D+1\.")),
        ("missing-tensors", "no tensor saved", _without("")),
        ("missing-tensors", "use_dora without magnitudes", _config(use_dora=True)),
        (
            "unexpected-tensors",
            "a target lost from the config",
            lambda folder: edit_config(folder, target_modules=[_first_target(folder)]),
        ),
        (
            "unexpected-tensors",
            "a target excluded",
            lambda folder: edit_config(folder, exclude_modules=[_first_target(folder)]),
        ),
        ("unexpected-tensors", "only layer 0 named", _config(layers_to_transform=[0])),
        ("key-prefix", "prefix lost", _keys(lambda k: k.removeprefix("base_model.model."))),
        ("key-prefix", "a PeftModel inside another", _keys(_nest)),
        ("key-prefix", "a compiled model", _keys(lambda k: f"_orig_mod.{k}")),
        ("key-prefix", "layers compiled one by one", _keys(_wrap("_orig_mod"))),
        ("key-prefix", "layers checkpointed", _keys(_wrap("_checkpoint_wrapped_module"))),
        ("key-prefix", "a distributed wrapper", _keys(lambda k: f"module.{k}")),
        ("layer-out-of-range", "a deeper base", _tensors(_copy_deeper)),
        ("target-not-in-base", "another architecture", _rename_target),
        ("target-not-in-base", "a misspelt target", _config(target_modules=["q_porj"])),
        ("scale-zero", "alpha 0", _config(lora_alpha=0)),
        ("scale-unusual", "alpha times sixteen", _config(lora_alpha=128)),
        ("scale-unusual", "alpha negative", _config(lora_alpha=-8)),
        ("untrained", "lora_B zero", _on("lora_B", torch.zeros_like)),
        ("untrained", "lora_A zero", _on("lora_A", torch.zeros_like)),
        ("non-finite", "NaN", _on("lora_B", lambda t: t * float("nan"))),
        ("non-finite", "float16 infinity", _on("lora_A", lambda t: (t * 1e9).half())),
        ("overflow-risk", "lora_B times a million", _on("lora_B", lambda t: t * 1e6)),
        ("integer-dtype", "int8", _on("lora_", lambda t: (t * 1000).to(torch.int8))),
        ("empty-tensor", "ZeRO-3 partitions", _on("lora_", lambda t: t.new_zeros(0))),
        ("corrupt-weights", "truncated", _bytes(lambda data: data[: len(data) // 2])),
        ("corrupt-weights", "bytes appended", _bytes(lambda data: data + b"\0" * 64)),
        ("corrupt-weights", "empty file", _bytes(lambda data: b"")),
        (
            "corrupt-weights",
            "a Git LFS pointer",
            _bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ),
        ("corrupt-weights", "header overwritten", _bytes(lambda d: d[:8] + b"\xff" * 40 + d[48:])),
        ("unsafe-pickle", "saved as a pickle", _pickle),
        ("size-conflict", "a pickle of 443 bytes", _pickle_stub),
        ("missing-weights", "weights not copied", lambda f: (f / WEIGHTS_FILE).unlink()),
        ("config-invalid", "no peft_type", _config("peft_type")),
        ("config-invalid", "alpha as text", _config(lora_alpha="16")),
        ("config-invalid", "r true", _config(r=True)),
        ("config-invalid", "r zero", _config(r=0)),
        ("config-invalid", "modules_to_save as text", _config(modules_to_save="lm_head")),
        ("config-invalid", "not JSON", lambda f: (f / CONFIG_FILE).write_text("{'r': 1}")),
        ("config-unknown-key", "a comment key", _config(_note="copied from the forum")),
        ("config-unknown-key", "an option of a fork", _config(use_turbo_lora=True)),
        (
            "base-name-mismatch",
            "another base named",
            _config(base_model_name_or_path="Qwen/Qwen2.5-1.5B-Instruct"),
        ),
        ("name-size-conflict", "the incident's names", _rename_folder),
        ("vocab-mismatch", "two tokens added", _add_embedding(98)),
        ("base-weights-in-adapter", "the embedding saved along", _add_embedding(96)),
        ("base-weights-in-adapter", "base layers saved along", _add_base_layers),
        ("dora-flag-lost", "use_dora lost", _tensors(_add_magnitudes)),
        ("modules-to-save-missing", "listed, not saved", _config(modules_to_save=_EMBEDDINGS)),
        ("head-dropped", "a head under CAUSAL_LM", _drop_head),
        (
            "quantized-base-mismatch",
            "trained on GPTQ",
            _config(base_model_name_or_path="acme/tiny-GPTQ-Int4"),
        ),
        ("init-rewrites-base", "PiSSA", _config(init_lora_weights="pissa")),
        ("serving-refuses", "rank 32, for vLLM as it comes", _raise_rank, "vllm"),
        ("serving-drops", "layer 0 alone, for TGI", _keep_first_layer, "tgi"),
        ("serving-rescales", "rank-stabilised, for SGLang", _config(use_rslora=True), "sglang"),
        ("rows-not-saved", "one of eight processes saved", _on("lora_B", _keep(8))),
        ("rows-not-saved", "one of two processes saved", _on("lora_", _keep(2))),
        ("saved-in-shards", "half of the rows of each", _on("lora_", lambda t: t[: len(t) // 2])),
        ("saved-in-shards", "flat partitions", _on("lora_", lambda t: t.flatten()[::2])),
        ("factors-transposed", "lora_A transposed", _on("lora_A", lambda t: t.T)),
        ("factors-transposed", "both transposed", _on("lora_", lambda t: t.T)),
        ("side-file", "a projector in a file of its own", _write_beside),
        ("tied-weights-split", "one of two tied modules saved", _save_tied, "", "qwen2"),
        ("target-unmatched", "a name of another architecture", _list_another),
        ("foreign-format", "MLX", _write_mlx),
        ("foreign-format", "kohya's names", _keys(_to_kohya)),
    )
)


def react(base: Path, adapter: Path) -> str:
    """What PEFT does when it loads an adapter: it raises, warns or is silent."""
    _, task, _ = TINY[json.loads((base / "config.json").read_text())["model_type"]]
    model = _CLASSES[task].from_pretrained(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(model, str(adapter))
        # Whatever PEFT raises is what we record.
        except Exception:
            return "raises"
    return "warns" if user_warnings(caught) else "silent"


def reproduce(work: Path, faults: Iterable[Fault] = FAULTS) -> tuple[Reproduction, ...]:
    """Inject each fault into a sound tiny Qwen2 adapter under `work`; record both reactions."""
    base = save_base(work / "base")
    sound = save_adapter(base, work / "sound")
    reproductions = []
    for number, fault in enumerate(faults):
        broken = inject(fault, sound, work / f"fault-{number}" / "adapter")
        inspection = inspect_adapter(str(broken), str(base), serving=fault.serving)
        findings = inspection.report.findings
        severity = next((f.severity for f in findings if f.id == fault.finding), "none")
        reaction = react(base, broken)
        reproductions.append(Reproduction(fault.finding, fault.name, reaction, severity))
    return tuple(reproductions)


def inject(fault: Fault, sound: Path, folder: Path) -> Path:
    """Copy a sound adapter and break the copy; return its folder."""
    shutil.copytree(sound, folder)
    moved = fault.inject(folder)
    return moved if isinstance(moved, Path) else folder
