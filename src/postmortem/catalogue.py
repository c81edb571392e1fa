"""The failure catalogue: one entry per finding, and the thresholds with their reasons.

Facts about PEFT were measured on 0.15.2, 0.16.0, 0.17.1 and 0.21.2. Threads are public reports.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from postmortem.errors import ModelError
from postmortem.untrusted import printable

SEVERITIES = ("error", "warning", "info")

# alpha/r of published adapters runs from 1/8 (alpha 16, r 128) to 8 (alpha 64, r 8); an alpha that
# lost or gained a factor of eight on the usual 2 lands at 16.
SCALE_LIMITS = (1 / 16, 8.0)
# rank-stabilised adapters divide by the root of r: alpha 512 on r 256 gives 32.
RSLORA_SCALE_LIMITS = (1 / 16, 64.0)
# The greatest finite float16; an update whose norm exceeds it can turn one unit of input infinite.
FLOAT16_LIMIT = 65_504.0
# One silent pair can be a module that no example reached; half of them is a training failure.
UNTRAINED_SHARE = 0.5
# 3.8B models are sold as 4B and 7.6B as 7B; sizes further apart name different models.
SIZE_RATIO = 1.3
# Headers, metadata and rounding explain a tenth; dtype widths are compared separately.
SIZE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the files show: what is wrong, the evidence for it, and what to do."""

    id: str
    severity: str
    message: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known about one kind of failure; `peft` says what PEFT does, by version."""

    id: str
    severity: str
    title: str
    symptom: str
    cause: str
    settles: str
    remedy: str
    peft: str
    threads: tuple[str, ...] = ()


_PEFT, _TRANSFORMERS = "huggingface/peft/issues/", "huggingface/transformers/issues/"
_ENTRIES = (
    Entry(
        "shape-mismatch",
        "error",
        "Tensor shapes do not fit the base",
        symptom="Loading raises a list of size mismatches, or was made to ignore them.",
        cause="The adapter was trained on a base of another width or with other attention heads.",
        settles="Compare in and out sizes in the file's header with the base's config.json.",
        remedy="Load the adapter on the base it was trained on; `postmortem identify` lists bases.",
        peft="Raises RuntimeError in every version. With ignore_mismatched_sizes (since 0.11) it "
        "warns twice and drops the tensors; pairs of which one half fits then change by seed.",
        threads=(_PEFT + "276", _PEFT + "1337", "huggingface/autotrain-advanced/issues/487"),
    ),
    Entry(
        "rank-mismatch",
        "error",
        "Tensor ranks differ from the configured rank",
        symptom="Loading raises size mismatches whose in and out sizes agree.",
        cause="r or rank_pattern was edited, or the config belongs to another run.",
        settles="Compare the first dimension of lora_A with r and rank_pattern.",
        remedy="Restore r and rank_pattern from the training run.",
        peft="Raises RuntimeError in every version.",
    ),
    Entry(
        "missing-tensors",
        "error",
        "The file lacks tensors that the configuration implies",
        symptom="The adapter acts weakly or not at all.",
        cause="Saving was partial, more modules were listed than trained, or the base is deeper.",
        settles="List the keys of the file against those that a fresh adapter would have.",
        remedy="Save again from the training run, or list only the modules that were trained.",
        peft="Warns of missing keys since 0.14; silent before and through load_adapter. Missing "
        "tensors stay at their initial values; with low_cpu_mem_usage they are uninitialised.",
        threads=(_PEFT + "2699", _PEFT + "2772", "tloen/alpaca-lora/issues/526"),
    ),
    Entry(
        "unexpected-tensors",
        "error",
        "The file holds tensors that the configuration does not use",
        symptom="The adapted model is worse than it was in training.",
        cause="target_modules, layers_to_transform or exclude_modules were edited or lost.",
        settles="List the modules in the file against target_modules.",
        remedy="Restore target_modules so that every tensor in the file has a module.",
        peft="Silent in every version: unexpected keys are dropped and not reported.",
        threads=("vllm-project/vllm/issues/55193",),
    ),
    Entry(
        "key-prefix",
        "error",
        "Every key sits under another path than PEFT looks for",
        symptom="Outputs equal those of the base exactly.",
        cause="Saved from a nested, compiled or bare model, or modules were renamed since.",
        settles="Print one key of the file beside one key of a fresh adapter.",
        remedy="Rename the keys, or load with the model class that was used in training.",
        peft="Warns of missing keys since 0.14; silent before and through load_adapter. An adapter "
        "name left in the keys works on 0.21.2 and is a no-op with a warning up to 0.17.1.",
        threads=(_PEFT + "2115", _TRANSFORMERS + "36594", _TRANSFORMERS + "38927"),
    ),
    Entry(
        "layer-out-of-range",
        "error",
        "The adapter has layers that the base does not have",
        symptom="The adapted model answers, and answers worse than expected.",
        cause="The base has fewer layers than the one that was trained on.",
        settles="Compare the highest layer index in the keys with num_hidden_layers.",
        remedy="Load the adapter on a base of the right depth.",
        peft="Silent in every version: the extra layers are dropped.",
    ),
    Entry(
        "target-not-in-base",
        "error",
        "Targeted modules do not exist in the base",
        symptom="Loading raises that no target was found, or part of the adapter is dropped.",
        cause="The adapter belongs to another architecture, or modules were renamed.",
        settles="Compare target_modules with the module names of the base.",
        remedy="Use the architecture that the adapter was trained on.",
        peft="Raises ValueError when no target exists; silent when some do.",
        threads=("vllm-project/vllm/issues/55193", "vllm-project/vllm/issues/48019"),
    ),
    Entry(
        "scale-zero",
        "error",
        "The scale of the adapter is zero",
        symptom="Outputs equal those of the base exactly.",
        cause="lora_alpha is 0: every update is multiplied by alpha over r.",
        settles="Read lora_alpha and alpha_pattern.",
        remedy="Restore lora_alpha from the training run.",
        peft="Silent in every version.",
    ),
    Entry(
        "scale-unusual",
        "warning",
        "The scale of the adapter is outside the usual range",
        symptom="Noise, repetition, or an effect far weaker than in training.",
        cause="alpha, r or use_rslora changed, or alpha was not divided by r.",
        settles="Score the task with alpha at the value of the training run.",
        remedy="Compare lora_alpha, r and use_rslora with the training run.",
        peft="Silent in every version.",
        threads=(
            *("cloneofsimo/lora/issues/240", "Blaizzy/mlx-vlm/pull/986"),
            "vllm-project/vllm/issues/10798",
        ),
    ),
    Entry(
        "untrained",
        "error",
        "The adapter is still at its initial value",
        symptom="Outputs equal those of the base exactly.",
        cause="lora_B stayed zero: no optimiser step reached it, or a fresh adapter was saved.",
        settles="Take the norm of lora_B.",
        remedy="Check that the loss updated the adapter, then save the trained one.",
        peft="Silent in every version.",
        threads=(_PEFT + "793", _PEFT + "1402", "mrbizarro/Phosphene/issues/62"),
    ),
    Entry(
        "non-finite",
        "error",
        "Weights are NaN or infinite",
        symptom="Logits are NaN; greedy decoding repeats token id 0.",
        cause="Training diverged, or the weights overflowed when cast to a narrower dtype.",
        settles="Count non-finite values by tensor.",
        remedy="Return to the last finite checkpoint.",
        peft="Silent in every version.",
        threads=("QwenLM/Qwen3/issues/761", "vllm-project/vllm/issues/14126"),
    ),
    Entry(
        "overflow-risk",
        "warning",
        "The update can overflow float16",
        symptom="NaN logits in float16, none in bfloat16.",
        cause="Weights or scale are so large that products pass 65,504.",
        settles="Run one prompt in bfloat16 and in float16.",
        remedy="Load in bfloat16 or float32, and check why the weights are so large.",
        peft="Silent in every version.",
        threads=("QwenLM/Qwen3/issues/868",),
    ),
    Entry(
        "integer-dtype",
        "error",
        "Adapter tensors are stored as integers",
        symptom="Garbled text.",
        cause="The file was quantised by a tool whose scales PEFT does not read.",
        settles="Read the dtypes in the header.",
        remedy="Use the adapter as it was saved before quantisation.",
        peft="Silent in every version: the integers are cast to floats.",
    ),
    Entry(
        "empty-tensor",
        "error",
        "Tensors have no elements",
        symptom="Loading raises size mismatches with torch.Size([0]).",
        cause="DeepSpeed ZeRO-3 or FSDP partitions were saved without gathering.",
        settles="Read the shapes in the header, or the file's size.",
        remedy="Gather the partitions while saving, or save under ZeRO-2.",
        peft="Raises RuntimeError in every version; 0.21 also warns while saving.",
        threads=(
            _PEFT + "2892",
            "huggingface/trl/issues/4416",
            "deepspeedai/DeepSpeed/issues/4295",
        ),
    ),
    Entry(
        "corrupt-weights",
        "error",
        "The weights file is damaged or is not safetensors",
        symptom="Loading raises SafetensorError.",
        cause="An interrupted copy, a Git LFS pointer, or a file edited by hand.",
        settles="Compare the file's size with its header, and its hash with the original.",
        remedy="Fetch the file again and compare hashes.",
        peft="Raises SafetensorError in every version.",
    ),
    Entry(
        "unsafe-pickle",
        "error",
        "The weights are a pickle, which this checker does not open",
        symptom="Loading runs, or refuses to run, code from the file.",
        cause="The adapter was saved with safe_serialization off, or by an old PEFT.",
        settles="Look for adapter_model.safetensors beside it.",
        remedy="Ask for a safetensors file; convert a trusted pickle in an isolated machine.",
        peft="Loads it with weights_only since 0.13, which refuses code; executes it before.",
    ),
    Entry(
        "missing-weights",
        "error",
        "There is no weights file",
        symptom="Loading fails with a confusing message about repository names.",
        cause="Only the configuration was copied, or the weights carry another name.",
        settles="List the folder.",
        remedy="Copy adapter_model.safetensors beside the configuration.",
        peft="Raises HFValidationError about a repository id in every version.",
    ),
    Entry(
        "config-invalid",
        "error",
        "adapter_config.json is not one that PEFT accepts",
        symptom="Loading raises KeyError, TypeError or ValueError.",
        cause="The file was edited or transcribed by hand, or is not the file that PEFT wrote.",
        settles="Read the key named in the evidence.",
        remedy="Restore the adapter_config.json that PEFT wrote.",
        peft="Raises KeyError without peft_type, TypeError for text where a number belongs.",
        threads=(_PEFT + "577",),
    ),
    Entry(
        "config-unknown-key",
        "warning",
        "The configuration has keys that no released PEFT knows",
        symptom="A warning at load time, or none; the option has no effect.",
        cause="Comments added by hand, a fork of PEFT, or a release newer than this table.",
        settles="Run `postmortem archaeology` on the configuration.",
        remedy="Remove the key, or load with the PEFT that wrote it.",
        peft="Warns and ignores since 0.14; raises TypeError from 0.6 to 0.13; ignores before.",
    ),
    Entry(
        "base-name-mismatch",
        "warning",
        "The adapter names another base",
        symptom="The adapter loads and changes the output without skill.",
        cause="The shapes of several bases agree, so nothing else tells them apart.",
        settles="Score the task on the base that the adapter names.",
        remedy="Load the base that the adapter names, or correct the name.",
        peft="Silent in every version: there is no check of any kind.",
        threads=("unslothai/unsloth/issues/2009",),
    ),
    Entry(
        "name-size-conflict",
        "warning",
        "Names state different model sizes",
        symptom="The adapter's name promises another model than its configuration.",
        cause="The folder was renamed, or the configuration belongs to another adapter.",
        settles="`postmortem identify`: the shapes decide which size is true.",
        remedy="Trust the shapes, and correct the name or the configuration.",
        peft="Silent in every version.",
    ),
    Entry(
        "size-conflict",
        "warning",
        "The size of the file contradicts the configuration",
        symptom="The download is far larger or smaller than r and target_modules imply.",
        cause="The configuration and the weights are of different runs, or saving was partial.",
        settles="Multiply: r × (in + out) for every targeted module, times bytes a parameter.",
        remedy="Find the configuration that was saved together with these weights.",
        peft="Silent in every version.",
        threads=("tloen/alpaca-lora/issues/526", _PEFT + "2892"),
    ),
    Entry(
        "vocab-mismatch",
        "error",
        "Embedding or output tensors have another vocabulary",
        symptom="Loading raises a size mismatch on embed_tokens or lm_head.",
        cause="Tokens were added in training and the base was not resized before loading.",
        settles="Compare the rows of the tensor with vocab_size.",
        remedy="Resize the base's embeddings to the adapter's tokenizer before loading.",
        peft="Raises RuntimeError in every version.",
        threads=("unslothai/unsloth/issues/237", _PEFT + "2898"),
    ),
    Entry(
        "base-weights-in-adapter",
        "warning",
        "The file carries weights of the base itself",
        symptom="Disabling the adapter does not bring the base back.",
        cause="Norms, embeddings or base_layer weights were saved with the adapter.",
        settles="Compare the base's output before loading with that of the disabled adapter.",
        remedy="Use a second copy of the base as control; save without these tensors.",
        peft="Silent in every version: the base is overwritten in place.",
        threads=(_PEFT + "940", _PEFT + "430"),
    ),
    Entry(
        "dora-flag-lost",
        "error",
        "The file holds DoRA magnitudes and the configuration says plain LoRA",
        symptom="The adapted model is worse than it was in training.",
        cause="use_dora was lost when the configuration was rewritten.",
        settles="Look for lora_magnitude_vector among the keys.",
        remedy="Set use_dora to true.",
        peft="Silent in every version: the magnitudes are dropped.",
    ),
    Entry(
        "modules-to-save-missing",
        "error",
        "A module of modules_to_save is not in the file",
        symptom="Loading raises KeyError.",
        cause="The trained head or embedding was not saved, or the list was edited.",
        settles="Look for the module's own weight among the keys.",
        remedy="Save again with the module, or remove it from modules_to_save.",
        peft="Raises KeyError in every version.",
        threads=(_PEFT + "577", "huggingface/sentence-transformers/issues/3980"),
    ),
    Entry(
        "head-dropped",
        "error",
        "A trained classification head is in the file and will not be loaded",
        symptom="Predictions are random although training went well.",
        cause="task_type or modules_to_save does not cover the head.",
        settles="Look for score or classifier among the keys, and at task_type.",
        remedy="Restore task_type, or list the head in modules_to_save.",
        peft="Silent in every version.",
        threads=("huggingface/sentence-transformers/issues/3980",),
    ),
    Entry(
        "quantized-base-mismatch",
        "warning",
        "The adapter names a quantised base and the base is not the same",
        symptom="Slightly different outputs than in training; shapes agree.",
        cause="The adapter was trained against rounded weights, or is used on them.",
        settles="Score the task on both bases.",
        remedy="Load the base with the quantisation used in training.",
        peft="Silent in every version; shapes are those of the unquantised layers.",
        threads=(_PEFT + "1043", _PEFT + "2105"),
    ),
    Entry(
        "init-rewrites-base",
        "warning",
        "The initialisation changes the base's weights while loading",
        symptom="The adapter depends on a decomposition that is repeated at load time.",
        cause="PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract a part of the base's weights.",
        settles="Compare the disabled adapter's output with a fresh base.",
        remedy="Convert to plain LoRA on saving (path_initial_model_for_weight_conversion).",
        peft="Silent in every version: base weights are replaced when the adapter is created.",
    ),
)
CATALOGUE: Mapping[str, Entry] = {entry.id: entry for entry in _ENTRIES}


def find_entry(finding_id: str) -> Entry:
    """Return the entry of an id; raises ModelError for one that is not in the catalogue."""
    if finding_id not in CATALOGUE:
        raise ModelError(finding_id, expected=f"one of {', '.join(CATALOGUE)}")
    return CATALOGUE[finding_id]


def finding(
    finding_id: str,
    *,
    evidence: str,
    expected: str,
    found: str,
    count: int = 1,
    severity: str = "",
    remedy: str = "",
) -> Finding:
    """Build a finding of a catalogued kind; `evidence` names the first tensor or key of `count`."""
    entry = CATALOGUE[finding_id]
    where = printable(evidence, 200)
    detail = f"expected {printable(expected)}, found {printable(found)}"
    times = f" ({count} in all)" if count > 1 else ""
    return Finding(
        id=finding_id,
        severity=severity or entry.severity,
        message=f"{entry.title}: {where}: {detail}",
        evidence=f"{where}: {detail}{times}",
        remedy=remedy or entry.remedy,
    )
