"""Whether an adapter fits a base: which modules it targets, tensor by tensor."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from postmortem.checker.adapter import Adapter, Tensor
from postmortem.checker.bases import BaseModel, Module, kind_of_class, kind_of_task
from postmortem.checker.config import AdapterConfig, Contents, ends_of, layer_of, layer_zero
from postmortem.checker.config import place as place_keys
from postmortem.checker.errors import (
    Finding,
    Place,
    grouped,
    is_literal,
    match_names,
    printable,
)

_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# all-linear leaves the output embedding out, and the head of a classifier.
_OUTPUTS = (
    "lm_head",
    "language_model.lm_head",
    "cls.predictions.decoder",
    "lm_head.decoder",
    "score",
    "classifier",
)


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the base that the adapter changes, with its rank and scale."""

    module: Module
    rank: int
    scale: float

    def shapes(self, config: AdapterConfig) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the tensors that PEFT creates: A (rank, in), B (out, rank), by part name."""
        module, kind = self.module, "lora_embedding_" if self.module.is_embedding else "lora_"
        parts: dict[str, tuple[int | None, ...]] = {
            f"{kind}A": (self.rank, module.inputs),
            f"{kind}B": (module.outputs, self.rank),
        }
        if config.use_dora:
            parts["lora_magnitude_vector"] = (module.outputs,)
        if config.lora_bias and not module.is_embedding:
            parts["lora_B.bias"] = (module.outputs,)
        return parts

    def parameters(self, config: AdapterConfig) -> int:
        """Number of parameters that PEFT trains here."""
        return sum(math.prod(size or 0 for size in s) for s in self.shapes(config).values())


def saved_modules(config: AdapterConfig) -> tuple[str, ...]:
    """Names of modules_to_save, with those that PEFT adds for the task."""
    return (*config.modules_to_save, *_HEADS_OF_TASK.get(config.task_type or "", ()))


def is_under(path: str, name: str) -> bool:
    """Tell whether a module path is the named module or lies below it."""
    return f".{name}." in f".{path}."


def find_targets(config: AdapterConfig, base: BaseModel) -> dict[str, Target]:
    """Return the described modules that the configuration adapts, by module path.

    Raises UntrustedError for a regex that is invalid or too slow.
    """
    names = list(base.modules)
    excluded = _match(config.exclude_modules, names)
    saved = saved_modules(config)
    excluded |= {n for n in names if any(is_under(n, m) for m in saved)}
    chosen = [n for n in _select(config, base, names) if n not in excluded]
    # A weight can be targeted as a parameter: of two dimensions it is what its module is.
    named = frozenset(config.target_parameters)
    weights = [n for n in names if named and not named.isdisjoint(ends_of(f"{n}.weight"))]
    chosen += [n for n in weights if n not in chosen]
    if config.ensures_tying:
        chosen += [n for t in chosen if (n := base.tied(t)) and n not in chosen]
    ranks = _pattern_values(config.rank_pattern, chosen)
    alphas = _pattern_values(config.alpha_pattern, chosen)
    return {
        name: Target(
            base.modules[name],
            rank := int(ranks.get(name, config.r)),
            scale_of(alphas.get(name, config.alpha), rank, use_rslora=config.use_rslora),
        )
        for name in chosen
    }


def implied_parameters(config: AdapterConfig, targets: Mapping[str, Target]) -> int:
    """Count the LoRA parameters that a configuration implies on a base."""
    return sum(target.parameters(config) for target in targets.values())


def scale_of(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """Return the factor of the update B·A: alpha over r, or over its root when rank-stabilised."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _match(wanted: tuple[str, ...] | str | None, names: list[str]) -> set[str]:
    if isinstance(wanted, str):
        return set(match_names([wanted], names)[wanted])
    ends = frozenset(wanted or ())
    return {name for name in names if not ends.isdisjoint(ends_of(name))}


def _select(config: AdapterConfig, base: BaseModel, names: list[str]) -> Iterable[str]:
    wanted = config.target_modules
    if wanted is None:
        wanted = () if config.target_parameters else base.default_targets
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return [n for n in names if n not in _OUTPUTS and not base.modules[n].is_embedding]
    matched = _match(wanted, names)
    if config.layers_to_transform is None or isinstance(wanted, str):
        return [name for name in names if name in matched]
    # A module named in full is targeted whatever its layer.
    return [n for n in names if n in matched and (n in wanted or _in_layers(config, n))]


def _in_layers(config: AdapterConfig, name: str) -> bool:
    patterns = [rf"(?:^|.*?\.){re.escape(p)}\.(\d+)\." for p in config.layers_pattern]
    matches = (re.match(p, name) for p in patterns or [r".*?\.[^.]*\.(\d+)\."])
    index = next((int(m[1]) for m in matches if m), None)
    return index is not None and index in (config.layers_to_transform or ())


def _pattern_values(patterns: Mapping[str, float], names: list[str]) -> dict[str, float]:
    if not patterns:
        return {}
    plain = {key: key.removeprefix("^") for key in patterns}
    # PEFT's (.*\.)?(key), as two: with a group that may be absent, every key would be a risky one.
    regexes = {
        k: (rf"()({k})", rf"(.*\.)({k})") for k, text in plain.items() if not is_literal(text)
    }
    found = match_names([p for pair in regexes.values() for p in pair], names) if regexes else {}
    by_end: dict[str, list[str]] = {}
    for name in names:
        for end in ends_of(name):
            by_end.setdefault(end, []).append(name)
    values: dict[str, float] = {}
    # PEFT takes the first pattern that matches, in the order of the file.
    for key, value in patterns.items():
        if key in regexes:
            matching: Iterable[str] = found[regexes[key][0]] | found[regexes[key][1]]
        elif key.startswith("^"):
            matching = [plain[key]]
        else:
            matching = by_end.get(key, [])
        for name in matching:
            values.setdefault(name, value)
    return values


_HEADS = ("score", "classifier", "classification_head", "qa_outputs")
_HEAD = re.compile(rf"(^|\.)({'|'.join(_HEADS)})(\.|$)")
_HEAD_KINDS = ("seq_cls", "token_cls", "qa")
_UNREADABLE = ("corrupt-weights", "missing-weights", "unsafe-pickle")
_NOTHING = "no such tensor"


@dataclass(frozen=True, slots=True)
class _Case:
    """An adapter's contents under module paths, beside the base's modules and the targets.

    Without a known base, `base` describes the modules that the file itself has tensors for.
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    contents: Contents
    base: BaseModel
    targets: Mapping[str, Target]
    is_known: bool
    is_shifted: bool
    beside: tuple[str, ...]


def check_fit(
    adapter: Adapter,
    config: AdapterConfig,
    base: BaseModel | None,
    targets: Mapping[str, Target] | None,
) -> list[Finding]:
    """Check keys, shapes and completeness, against a base or else against the file itself."""
    if not adapter.tensors:
        nothing = [("adapter_model.safetensors", "LoRA tensors", "no tensor at all")]
        is_explained = any(f.id in _UNREADABLE for f in adapter.findings)
        return [] if is_explained else grouped("missing-tensors", nothing)
    findings, case = _build_case(adapter, config, base, targets)
    plain = _judge_plain_weights(case)
    # A task that was lost also makes PEFT wrap another class, whose keys lie elsewhere.
    if case.base.kind == "bare" and "head-dropped" in plain:
        findings = []
    if layout := _check_layout(case):
        return findings + layout
    findings += [*_check_flags(case), *_check_tokens(case), *_check_saved(case)]
    findings += [*_check_class(case), *_check_tied(case), *_check_head(case)]
    return findings + (_findings(plain) if config.unmodelled else _check_modules(case, plain))


def _build_case(
    adapter: Adapter,
    config: AdapterConfig,
    base: BaseModel | None,
    targets: Mapping[str, Target] | None,
) -> tuple[list[Finding], _Case]:
    findings, contents = place_keys(adapter.contents, base)
    described = base or _own_modules(contents, adapter.tensors)
    return findings, _Case(
        config=config,
        tensors=adapter.tensors,
        contents=contents,
        base=described,
        targets=find_targets(config, described) if targets is None else targets,
        is_known=base is not None,
        is_shifted=any(f.severity != "info" for f in findings),
        beside=adapter.beside,
    )


def held_targets(
    adapter: Adapter, config: AdapterConfig, base: BaseModel | None
) -> list[tuple[Mapping[str, str], Target | None]]:
    """Return the keys of each adapted module by part, and its target where one is described.

    Raises UntrustedError for a pattern that is invalid or too slow.
    """
    _, case = _build_case(adapter, config, base, None)
    return [(parts, case.targets.get(path)) for path, parts in case.contents.lora.items()]


def turned_keys(adapter: Adapter, config: AdapterConfig, base: BaseModel | None) -> frozenset[str]:
    """Return the keys of factors that are transposed; none where a square one leaves it open.

    Raises UntrustedError for a pattern that is invalid or too slow.
    """
    _, case = _build_case(adapter, config, base, None)
    pairs = [pair for pair in _pairs(case) if len(pair.a) == len(pair.b) == 2]
    turned = {key for pair in pairs for key, *_ in _turned_factors(pair)}
    for side in (0, 1):
        keys = {pair.keys[side] for pair in pairs if len({*(pair.a, pair.b)[side]}) == 1}
        if keys and any(pair.keys[side] in turned for pair in pairs):
            return frozenset()
    return frozenset(turned)


# PEFT up to 0.18 took a parameter of (experts, out, in) for one of (experts, in, out).
_EXCHANGED = (
    "Load it with the PEFT that wrote it (up to 0.18), or exchange the factors, with E experts: "
    "A = B.reshape(len(B), r, E).permute(2, 1, 0).reshape(E * r, len(B)), and "
    "B = A.reshape(E, r, A.shape[1]).permute(2, 1, 0).reshape(A.shape[1], r * E)."
)


_UNNAMED = (
    "Restore target_parameters, mostly mlp.experts.gate_up_proj and mlp.experts.down_proj; "
    "target_modules does not reach fused experts."
)


def _findings(places: Mapping[str, list[Place]]) -> list[Finding]:
    unnamed = grouped("unexpected-tensors", places.get("unnamed", []), remedy=_UNNAMED)
    usual = grouped("base-weights-in-adapter", places.get("usual", []), severity="info")
    exchanged = grouped("factors-transposed", places.get("exchanged", []), remedy=_EXCHANGED)
    kinds = (kind for kind in places if kind not in ("usual", "exchanged", "unnamed"))
    found = [f for kind in kinds for f in grouped(kind, places[kind])]
    return [*found, *exchanged, *unnamed, *usual]


def _own_modules(contents: Contents, tensors: Mapping[str, Tensor]) -> BaseModel:
    """Describe the modules that an adapter has tensors for, with the sizes that they imply."""
    modules = {}
    for path, parts in contents.lora.items():
        is_embedding = "lora_embedding_A" in parts
        kind = "lora_embedding_" if is_embedding else "lora_"
        into = tensors[parts[f"{kind}A"]].shape[-1:] if f"{kind}A" in parts else ()
        out = tensors[parts[f"{kind}B"]].shape[:1] if f"{kind}B" in parts else ()
        ends = into[0] if into else None, out[0] if out else None
        modules[path] = Module(*ends, bias=False, is_embedding=is_embedding)
    return BaseModel(
        name="the file",
        model_type="unknown",
        kind="unknown",
        modules=modules,
        layers=0,
        default_targets=(),
        heads=(),
        open_paths=re.compile(r"experts|\.gate$"),  # Mixtures: ranks are multiples of r.
        transposed=False,
        declared_kind=None,
        quantization=None,
        ties_weights=False,
        experts=None,
    )


def _check_flags(case: _Case) -> list[Finding]:
    config = case.config
    parts = [(key, part) for held in case.contents.lora.values() for part, key in held.items()]
    dora = [(key, "use_dora true", "false") for key, p in parts if p == "lora_magnitude_vector"]
    bias = [(key, "lora_bias true", "false") for key, part in parts if part == "lora_B.bias"]
    return [
        *grouped("dora-flag-lost", [] if config.use_dora else dora),
        *grouped(
            "unexpected-tensors",
            [] if config.lora_bias else bias,
            remedy="Set lora_bias to true, as it was in training.",
        ),
    ]


_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """The factors of one module beside the shapes that PEFT expects; without a base, of r alone."""

    keys: tuple[str, str]
    a: Shape
    b: Shape
    rank: int
    inputs: int | None
    outputs: int | None

    def expected(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """Return the shapes that A and B should have."""
        return (self.rank, self.inputs), (self.outputs, self.rank)

    def is_right(self) -> bool:
        """Tell whether both factors have the shapes that they should have."""
        return all(map(_fits, (self.a, self.b), self.expected()))


def _pairs(case: _Case) -> list[_Pair]:
    found = []
    for path, parts in case.contents.lora.items():
        target = case.targets.get(path)
        for a, b in _FACTORS:
            if target is None or a not in parts or b not in parts:
                continue
            keys, module = (parts[a], parts[b]), target.module
            ends = (module.inputs, module.outputs) if case.is_known else (None, None)
            shapes = [case.tensors[key].shape for key in keys]
            found.append(_Pair(keys, shapes[0], shapes[1], target.rank, *ends))
    return found


def _check_layout(case: _Case) -> list[Finding]:
    """Find factors that are whole in kind and wrong in form: cut by rank, flat, or transposed."""
    pairs = _pairs(case)
    flat = [
        (key, "a matrix", f"{shape[0]:,} elements in one dimension")
        for pair in pairs
        for key, shape in zip(pair.keys, (pair.a, pair.b), strict=True)
        if len(shape) == 1 and shape[0]
    ]
    # The flat parameter of one process can lie wholly outside of one factor, which is then empty.
    if flat and len(flat) >= len(pairs):
        return grouped("saved-in-shards", flat)
    matrices = [p for p in pairs if not p.is_right() and len(p.a) == len(p.b) == 2]
    for kind, judge in (
        ("saved-in-shards", _cut_by_rows),
        ("factors-transposed", _turned),
        ("saved-in-shards", _cut_by_ends),
    ):
        places = [place for pair in matrices if (place := judge(pair))]
        ends = {layer_zero(place[0]) for place in places}
        # The sizes of one kind of module can be those of another base; of several kinds hardly.
        if 2 * len(places) > len(pairs) and (judge is not _cut_by_ends or len(ends) > 1):
            return grouped(kind, places)
    return []


def _cut_by_rows(pair: _Pair) -> Place | None:
    """Tell the slice of one process: fewer rows of A than B has ranks, and fewer rows of B."""
    is_whole = pair.outputs is not None and pair.b[0] >= pair.outputs
    if is_whole or not pair.a[0] < pair.b[1] == pair.rank:
        return None
    expected = f"A of {_shape((pair.rank, pair.inputs))}, B of {_shape((pair.outputs, pair.rank))}"
    return pair.keys[0], expected, f"A of {_shape(pair.a)}, B of {_shape(pair.b)}"


def _turned(pair: _Pair) -> Place | None:
    """Tell a factor that is stored as (in, r) or (r, out)."""
    for key, found, expected in _turned_factors(pair):
        return key, _shape(expected), f"{_shape(found)}, the transpose"
    return None


def _turned_factors(pair: _Pair) -> Iterator[tuple[str, Shape, tuple[int | None, ...]]]:
    for key, found, expected in zip(pair.keys, (pair.a, pair.b), pair.expected(), strict=True):
        if not _fits(found, expected) and _fits(found[::-1], expected):
            yield key, found, expected


_ENDS_A_BLOCK = re.compile(
    r"\.(o|o_proj|out_proj|down_proj|c_proj|wo|w2|fc2|dense_4h_to_h|dense)\.lora_"
)


def _cut_by_ends(pair: _Pair) -> Place | None:
    """Tell a module of tensor parallelism: a whole share of B's outputs, or else of A's inputs."""
    if pair.inputs is None or pair.outputs is None or not pair.a[1] or not pair.b[0]:
        return None
    ranks = (pair.a[0], pair.b[1]) == (pair.rank, pair.rank)
    cut_in, cut_out = pair.inputs / pair.a[1], pair.outputs / pair.b[0]
    is_share = max(cut_in, cut_out) >= 2 and (cut_in * cut_out).is_integer()
    # Modules that end a block are cut by their inputs, all others by their outputs: the other way
    # round it is a base of another width whose heads happen to have the same sizes.
    is_cut_in = cut_out == 1 and _ENDS_A_BLOCK.search(pair.keys[0])
    is_cut_out = cut_in == 1 and not _ENDS_A_BLOCK.search(pair.keys[0])
    if not ranks or not is_share or not (is_cut_in or is_cut_out):
        return None
    key, expected, found = (
        (pair.keys[0], (pair.rank, pair.inputs), pair.a)
        if cut_out == 1
        else (pair.keys[1], (pair.outputs, pair.rank), pair.b)
    )
    return key, _shape(expected), f"{_shape(found)}, a whole share"


def _check_tokens(case: _Case) -> list[Finding]:
    held, wanted = case.contents.tokens, case.config.trainable_tokens
    if wanted is None:
        places = [(key, "trainable_token_indices", "null") for key in held.values()]
        remedy = "Restore trainable_token_indices: the indices of the tokens, one for each row."
        return grouped("unexpected-tensors", places, remedy=remedy)
    if beyond := _tokens_beyond(case, wanted):
        return beyond
    if not held:
        expected = "embed_tokens.token_adapter.trainable_tokens_delta"
        return grouped("missing-tensors", [("trainable_token_indices", expected, _NOTHING)])
    counts = {len(wanted)} if isinstance(wanted, tuple) else {len(v) for v in wanted.values()}
    return grouped(
        "shape-mismatch",
        [
            (key, f"{' or '.join(map(str, sorted(counts)))} rows", _shape(case.tensors[key].shape))
            for key in held.values()
            if case.tensors[key].shape[:1] and case.tensors[key].shape[0] not in counts
        ],
    )


def _tokens_beyond(case: _Case, wanted: Mapping[str, list[int]] | tuple[int, ...]) -> list[Finding]:
    """Find indices that the base's vocabulary does not have: PEFT raises IndexError."""
    sizes = [m.inputs for m in case.base.modules.values() if m.is_embedding and m.inputs]
    lists = [wanted] if isinstance(wanted, tuple) else wanted.values()
    largest = max((index for listed in lists for index in listed), default=-1)
    if not case.is_known or not sizes or largest < max(sizes):
        return []
    expected = f"indices below {max(sizes)}, the base's vocabulary"
    return grouped("vocab-mismatch", [("trainable_token_indices", expected, f"{largest}")])


def _check_saved(case: _Case) -> list[Finding]:
    plain = case.contents.plain
    missing = [
        (name, f"the weights of {name}", _NOTHING)
        for name in dict.fromkeys(saved_modules(case.config))
        if not any(_is_saved_under(path, name) for path in plain)
        if _must_be_saved(name, case)
    ]
    missing += _missing_layers(case)
    # Without a base, a listed module may be one that this base does not have.
    is_certain = case.is_known or not {n for n, *_ in missing} <= set(case.config.modules_to_save)
    biased = case.targets if case.config.bias == "lora_only" else case.base.modules
    has_bias = case.config.bias != "none" and any(case.base.modules[p].bias for p in biased)
    is_lost = has_bias and not any("bias" in path for path in plain)
    lost = [("bias", f"the biases, as bias is {case.config.bias}", _NOTHING)] if is_lost else []
    return [
        *grouped("modules-to-save-missing", missing, "" if is_certain else "warning"),
        *grouped("modules-to-save-missing", [] if missing else _lost_norms(case), "warning"),
        *grouped("missing-tensors", lost, severity="warning"),
    ]


def _missing_layers(case: _Case) -> Iterator[Place]:
    """Say which module saved whole, in layers that no config.json describes, some layers lack."""
    held = [path.rpartition(".")[0] for path in case.contents.plain if not case.base.is_open(path)]
    for name in dict.fromkeys(case.config.modules_to_save if case.is_known else ()):
        layers = {layer_of(path) for path in held if path.rpartition(".")[2] == name} - {None}
        lost = [layer for layer in range(case.base.layers) if layer not in layers]
        if layers and lost:
            yield name, f"its weights in layers 0 to {case.base.layers - 1}", f"none in {lost[0]}"


_NORMS = re.compile(r"norm|(^|\.)ln_")


def _lost_norms(case: _Case) -> list[Place]:
    """Name the listed norms of which the file has none: no config.json says what a base has."""
    names = [n for n in dict.fromkeys(case.config.modules_to_save) if _NORMS.search(n)]
    names = [n for n in names if not any(_is_saved_under(path, n) for path in case.contents.plain)]
    return [(n, f"the weights of {n}, if the base has it", _NOTHING) for n in names]


def _is_saved_under(path: str, name: str) -> bool:
    # PEFT wraps every module whose path ends with the name, dot or no dot.
    return is_under(path, name) or path.rpartition(".")[0].endswith(name)


def _must_be_saved(name: str, case: _Case) -> bool:
    if case.is_known:
        return any(is_under(path, name) for path in case.base.modules)
    has_head = any(map(_HEAD.search, case.contents.plain))
    return not (name in _HEADS and has_head)


def _judge_plain_weights(case: _Case) -> dict[str, list[Place]]:
    """Judge the tensors that are no LoRA parts; `usual` are base weights that PEFT itself saves."""
    places: dict[str, list[Place]] = {}
    for path, key in case.contents.plain.items():
        module = path.rpartition(".")[0].removesuffix(".base_layer")
        if verdict := _judge_plain(path, module, key, case):
            kind, expected, found = verdict
            places.setdefault(kind, []).append((key, expected, found))
    return places


def _judge_plain(path: str, module: str, key: str, case: _Case) -> Place | None:
    """Say what is wrong with a whole weight: its finding, what was expected and what was found."""
    if mismatch := _plain_mismatch(path, module, case.tensors[key], case.base):
        return mismatch
    if _HEAD.search(path) and not _loads_heads(case.config):
        task = case.config.class_name or f"task_type {case.config.task_type}"
        return "head-dropped", "a task that loads a head", task
    tied = ("lm_head", "embed_tokens") if case.config.ensures_tying else ()
    saved = (*saved_modules(case.config), *tied)
    if any(_is_saved_under(path, name) for name in saved):
        return None
    if "bias" in path and case.config.bias != "none":
        return None
    # PEFT itself saves the base layer of an embedding or output that LoRA targets.
    parts = case.contents.lora.get(module, {})
    is_vocabulary = "lora_embedding_A" in parts or module.endswith(("lm_head", "embed_tokens"))
    is_usual = path.endswith(".base_layer.weight") and bool(parts) and is_vocabulary
    finding_id = "usual" if is_usual else "base-weights-in-adapter"
    return finding_id, "adapter tensors only", "a weight of the base"


def _loads_heads(config: AdapterConfig) -> bool:
    if config.class_name:
        return kind_of_class(config.class_name) in _HEAD_KINDS
    if config.task_type:
        return kind_of_task(config.task_type) in _HEAD_KINDS
    return any(head in config.modules_to_save for head in _HEADS)


def _plain_mismatch(path: str, module: str, tensor: Tensor, base: BaseModel) -> Place | None:
    known = base.modules.get(module)
    if known is None or not tensor.count or not path.endswith((".weight", ".bias")):
        return None
    is_turned = known.is_embedding or (base.transposed and module not in base.heads)
    ends = (known.inputs, known.outputs) if is_turned else (known.outputs, known.inputs)
    expected = (known.outputs,) if path.endswith(".bias") else ends
    if _fits(tensor.shape, expected):
        return None
    # Another width is another base; with the same width only the vocabulary differs.
    is_width_right = _fits(tensor.shape[1:], expected[1:])
    is_vocabulary = known.is_embedding or _is_output(module, base)
    kind = "vocab-mismatch" if is_vocabulary and is_width_right else "shape-mismatch"
    return kind, _shape(expected), _shape(tensor.shape)


def _is_output(module: str, base: BaseModel) -> bool:
    return module in base.heads and base.kind not in _HEAD_KINDS


def _fits(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    if found == expected:
        return True
    is_open = None in expected and len(found) == len(expected)
    return is_open and all(w in (None, size) for size, w in zip(found, expected, strict=True))


def _shape(sizes: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in sizes) + ")"


def _check_tied(case: _Case) -> list[Finding]:
    """Warn where one of two tied modules is trained apart; LoRA on it is only mentioned."""
    if case.config.ensures_tying:
        return []
    saved = [name for name in case.base.modules if _is_listed(name, case) and case.base.tied(name)]
    place = "no copy of a tied module, or ensure_weight_tying", "modules_to_save without it"
    if saved:
        return grouped("tied-weights-split", [(name, *place) for name in saved])
    held = [name for name in case.contents.lora if case.base.tied(name)]
    found = "LoRA on one of the two; a merge changes both, or unties them"
    return grouped("tied-weights-split", [(n, place[0], found) for n in held], severity="info")


def _is_listed(path: str, case: _Case) -> bool:
    is_held = any(is_under(name, path) for name in case.contents.plain)
    return is_held and any(is_under(path, name) for name in case.config.modules_to_save)


# Weights of a head, and all that trainers save beside the adapter because PEFT does not.
_HEAD_FILE = re.compile(
    r"\w*(head|classifier|score|qa_outputs)\w*\.(bin|pt|pth|safetensors|npz)", re.IGNORECASE
)
_SIDE_FILE = re.compile(
    r"(non_lora\w*|\w*(projector|connector|resampler|merger|embed(ding)?s?|pooler)\w*"
    r"|embed_tokens|trainable_(params|weights)|vit|vision_tower\w*)\.(bin|pt|pth|safetensors|npz)",
    re.IGNORECASE,
)


def _check_head(case: _Case) -> list[Finding]:
    """Find a head that training had and no file of the adapter does, and weights in side files."""
    heads = [name for name in case.beside if _HEAD_FILE.fullmatch(name)]
    others = [name for name in case.beside if _SIDE_FILE.fullmatch(name) and name not in heads]
    places = _lost_heads(case)
    findings = []
    if places:
        where, expected, found = places[0]
        found += f"; {heads[0]} beside it, which PEFT does not load" if heads else ""
        severity = "" if case.is_known or heads or case.config.task_type else "warning"
        remedy = (
            f"Load {heads[0]} into the model's head after PeftModel.from_pretrained."
            if heads
            else "A head in no file is lost: train again with the task_type of the model's class "
            "(SEQ_CLS, TOKEN_CLS, QUESTION_ANS), or with the head in modules_to_save."
        )
        places = [(where, expected, found), *places[1:]]
        findings = grouped("head-dropped", places, severity, remedy=remedy)
        heads = []
    beside = [
        (n, "weights in the adapter's own file", "a file of their own") for n in heads + others
    ]
    return findings + grouped("side-file", beside)


def _lost_heads(case: _Case) -> list[Place]:
    """Say where the adapter shows a head of which the file has no weight."""
    config = case.config
    saved = (*case.contents.plain, *config.modules_to_save)
    if any(map(_HEAD.search, saved)):
        return []
    expected, task, name = (
        "the weights of the head",
        config.task_type or "",
        config.class_name or "",
    )
    has_task = task in _HEADS_OF_TASK or kind_of_class(name) in _HEAD_KINDS
    # LoRA on a head needs the weights below it; a base of the same class has them.
    has_own = case.base.declared_kind in _HEAD_KINDS and case.is_known
    under = [path for path in case.contents.lora if _HEAD.search(path)]
    is_placed = all(path in case.base.modules for path in under)
    if under and not ((has_own or has_task) and is_placed):
        found = f"LoRA on a head, under task_type {config.task_type}"
        return [(path, expected, found) for path in under]
    if kind_of_class(name) in _HEAD_KINDS and not has_own and task not in _HEADS_OF_TASK:
        return [("auto_mapping", expected, f"{name}, and a head in no file")]
    return []


def _check_unmatched(case: _Case) -> list[Finding]:
    """Name what the configuration lists and neither the base nor the file has."""
    config, base = case.config, case.base
    if not case.is_known:
        return []
    listed = config.target_modules if isinstance(config.target_modules, tuple) else ()
    ends = {end for name in base.modules for end in ends_of(name)}
    held = {end for path in case.contents.lora for end in ends_of(path)}
    if base.experts is not None and any(".experts." in path for path in case.contents.lora):
        # A class whose experts are modules of their own has these, trained or not.
        ends |= {name for name in listed if base.experts.shape(name)}
    saved = [n for n in config.modules_to_save if n not in _HEADS]
    # A list with names for several architectures is usual where one of them is the base's.
    saved = [] if any(_is_held(name, case) for name in saved) else saved
    layers = [n for n in config.layers_to_transform or () if n >= base.layers][:9]
    parameters = _parameter_ends(case) if config.target_parameters else set()
    unmatched: dict[str, list[str]] = {
        # Where no name matches, that is the finding.
        "target_modules": [n for n in listed if n not in ends | held] if ends & {*listed} else [],
        "target_parameters": [n for n in config.target_parameters if n not in parameters],
        "modules_to_save": saved,
        "layers_to_transform": [f"layer {n} of {base.layers}" for n in layers],
    }
    return grouped(
        "target-unmatched",
        [(key, f"what {base.name} has", _some(names)) for key, names in unmatched.items() if names],
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" and others" if len(names) > 8 else "")


def _is_held(name: str, case: _Case) -> bool:
    """Tell whether the base, as far as it is described, or the file has a module of this name."""
    paths = (*case.base.modules, *case.contents.plain)
    is_norm = _NORMS.search(name) is not None  # These are judged by _lost_norms.
    return is_norm or any(is_under(p, name) or _is_saved_under(p, name) for p in paths)


def _parameter_ends(case: _Case) -> set[str]:
    """Return the ends of the parameters of the base, as far as it is described, and of the file."""
    held = case.base.experts.paths if case.base.experts else ()
    experts = [f"{path}.{fused}" for path in held for fused in _FUSED]
    weights = [f"{path}.weight" for path in (*case.base.modules, *case.contents.lora)]
    return {end for path in experts + weights for end in ends_of(path)}


def _check_class(case: _Case) -> list[Finding]:
    """Warn when the adapter was made on the bare class of a base that names a class with a head.

    Encoders name their pretraining's class, and are mostly used without its head.
    """
    declared, class_name = case.base.declared_kind, case.config.class_name
    if case.config.task_type or class_name is None or declared in (None, "bare", "mlm"):
        return []
    if case.base.kind != "bare":
        return []
    expected = f"the class that the base names ({declared})"
    return grouped("key-prefix", [("auto_mapping", expected, class_name)], severity="warning")


def _check_modules(case: _Case, plain: Mapping[str, list[Place]]) -> list[Finding]:
    places = {kind: list(found) for kind, found in plain.items()}
    for kind, place in _judge_experts(case):
        places.setdefault(kind, []).append(place)
    if not case.targets:
        return [*_findings(places), *_no_targets(case)]
    held = {p: parts for p, parts in case.contents.lora.items() if not case.base.is_open(p)}
    # Early releases put LoRA on heads that are saved whole; current ones load only the head.
    saved = saved_modules(case.config)
    doubled = {path for path in held if any(is_under(path, name) for name in saved)}
    twice = [(path, "the module saved whole", "LoRA tensors as well") for path in sorted(doubled)]
    held = {path: parts for path, parts in held.items() if path not in doubled}
    for kind, place in (*_mismatches(case, held), *_misplaced(case, held)):
        places.setdefault(kind, []).append(place)
    # Another model's sizes explain another depth and vocabulary as well: one cause, one finding.
    is_other_model = 2 * len(places.get("shape-mismatch", ())) >= max(len(held), 1)
    if is_other_model:
        places.pop("vocab-mismatch", None)
        places.pop("layer-out-of-range", None)
    findings = [*_findings(places), *grouped("unexpected-tensors", twice, severity="warning")]
    findings += _check_unmatched(case)
    if is_other_model or case.is_shifted or "target-not-in-base" in places:
        return findings
    return findings + _missing(case, held)


_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)$")
_FUSED = ("down_proj", "gate_up_proj")


def _judge_experts(case: _Case) -> Iterator[tuple[str, Place]]:
    """Judge the tensors of experts, one module each or fused into parameters, by name and shape."""
    experts = case.base.experts
    if experts is None or not case.is_known:
        return
    single = {path: one for path in case.contents.lora if (one := _ONE_EXPERT.search(path))}
    for path, one in single.items():
        yield from _judge_expert(case, path, int(one[1][:9]), experts.shape(one[2]))
    fused: dict[str, list[str]] = {}
    for path in case.contents.lora:
        if ".experts" in path and path not in single:
            fused.setdefault(path.replace(".base_layer", ""), []).append(path)
    targeted = {path: _targeted(case.config, path) for path in experts.paths}
    for path, levels in fused.items():
        yield from _judge_layer(case, path, levels, targeted)
    for path, names in targeted.items():
        if names and path not in fused and not single and (not fused or targeted.keys() & fused):
            yield "missing-tensors", (path, f"LoRA on {' and '.join(names)}", _NOTHING)


def _judge_layer(
    case: _Case, path: str, levels: Sequence[str], targeted: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, Place]]:
    key = _first_key(case, levels[0])
    if path not in targeted and layer_zero(path) in targeted:
        depth = f"layers 0 to {case.base.layers - 1}"
        yield "layer-out-of-range", (key, depth, f"layer {layer_of(path)}")
    elif path not in targeted:
        yield "key-prefix", (key, f"{next(iter(targeted), 'experts')}, as in the base", path)
    elif not targeted[path]:
        yield "unnamed", (key, "target_parameters that name experts", "none")
    else:
        yield from _judge_fused(case, path, levels, targeted[path])


def _first_key(case: _Case, path: str) -> str:
    return next(iter(case.contents.lora[path].values()))


def _targeted(config: AdapterConfig, path: str) -> list[str]:
    """Return the fused parameters of one layer's experts that the configuration names."""
    wanted = frozenset(config.target_parameters)
    return [name for name in _FUSED if not wanted.isdisjoint(ends_of(f"{path}.{name}"))]


def _judge_expert(
    case: _Case, path: str, number: int, ends: tuple[int, int] | None
) -> Iterator[tuple[str, Place]]:
    key, experts = _first_key(case, path), case.base.experts
    if experts is None or ends is None or number >= experts.count:
        last = (experts.count if experts else 0) - 1
        yield "target-not-in-base", (key, f"a projection of the experts 0 to {last}", path)
        return
    for part, axis, wanted in (("lora_A", 1, ends[0]), ("lora_B", 0, ends[1])):
        found = case.tensors[case.contents.lora[path].get(part, key)].shape
        if part in case.contents.lora[path] and found[axis : axis + 1] != (wanted,):
            expected = _shape((None, wanted) if axis else (wanted, None))
            yield "shape-mismatch", (case.contents.lora[path][part], expected, _shape(found))


def _judge_fused(
    case: _Case, path: str, levels: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[str, Place]]:
    """Hold the nested pairs of one layer's experts against the parameters that are targeted."""
    if len(levels) != len(names):
        kind = "missing-tensors" if len(levels) < len(names) else "unnamed"
        expected = f"one pair for each of {', '.join(names)}"
        yield kind, (_first_key(case, levels[0]), expected, f"{len(levels)}")
        return
    wanted = [_fused_shapes(case, f"{path}.{name}", name) for name in names]
    for level in levels:
        parts = case.contents.lora[level]
        if not {"lora_A", "lora_B"} <= parts.keys():
            yield "missing-tensors", (_first_key(case, level), "lora_A and lora_B", "one of them")
            continue
        a, b = (case.tensors[parts[part]].shape for part in ("lora_A", "lora_B"))
        # Which pair wraps which parameter is PEFT's choice: any that is left will do.
        match = next((pair for pair in wanted if pair == (a, b)), None)
        if match is not None:
            wanted.remove(match)
            continue
        expected = " or ".join(f"A {_shape(p)}, B {_shape(q)}" for p, q in wanted)
        place = (parts["lora_A"], expected, f"A {_shape(a)}, B {_shape(b)}")
        yield _expert_kind(a, b, wanted), place


def _expert_kind(a: Shape, b: Shape, wanted: Sequence[tuple[Shape, Shape]]) -> str:
    """Tell exchanged in and out sizes, and a wrong rank, from other sizes."""
    ends = [(p[1], q[0]) for p, q in wanted]
    if (a[::-1], b[::-1]) in wanted:
        return "factors-transposed"
    if (b[0], a[-1]) in ends and a[0] in [p[0] for p, _ in wanted]:
        return "exchanged"
    return "rank-mismatch" if (a[-1], b[0]) in ends else "shape-mismatch"


def _fused_shapes(case: _Case, path: str, name: str) -> tuple[Shape, Shape]:
    experts = case.base.experts
    rank = int(_pattern_values(case.config.rank_pattern, [path]).get(path, case.config.r))
    return experts.factors(name, rank) if experts else ((0, 0), (0, 0))


def _misplaced(case: _Case, held: Iterable[str]) -> Iterator[tuple[str, Place]]:
    base = case.base
    for path in held:
        if path in case.targets:
            continue
        if path in base.modules and (case.is_known or not case.is_shifted):
            yield "unexpected-tensors", (path, "a module that is targeted", "not targeted")
        elif layer_zero(path) in base.modules and (layer_of(path) or 0) >= base.layers:
            depth = f"layers 0 to {base.layers - 1}"
            yield "layer-out-of-range", (path, depth, f"layer {layer_of(path)}")
        elif path not in base.modules and not _HEAD.search(path):
            yield "target-not-in-base", (path, f"a module of {base.name}", "no such module")


def _no_targets(case: _Case) -> list[Finding]:
    wanted = case.config.target_modules
    if (case.base.open_paths and case.is_known) or case.config.target_parameters or wanted == ():
        return []
    if wanted is None and not case.is_known:
        return []
    named = wanted if wanted is not None else f"PEFT's default for {case.base.model_type}"
    # Where the file's own modules are the base's, the list was edited and not the base changed.
    held = dict.fromkeys(p.rpartition(".")[2] for p in case.contents.lora if p in case.base.modules)
    remedy = f"Restore target_modules: the file has {_some([*held])}." if held else ""
    place = ("target_modules", f"modules of {case.base.name}", str(named))
    return grouped("target-not-in-base", [place], remedy=printable(remedy, 400))


def _mismatches(case: _Case, held: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Place]]:
    for path, parts in held.items():
        shapes = case.targets[path].shapes(case.config) if path in case.targets else {}
        for part, key in parts.items():
            found, expected = case.tensors[key].shape, shapes.get(part)
            if expected is None or _fits(found, expected) or not case.tensors[key].count:
                continue
            by_tokens = part == "lora_embedding_A" or (
                part == "lora_B" and _is_output(path, case.base)
            )
            kind = _mismatch_kind(part, found, expected)
            kind = "vocab-mismatch" if kind == "shape-mismatch" and by_tokens else kind
            yield kind, (key, _shape(expected), _shape(found))


def _mismatch_kind(part: str, found: tuple[int, ...], expected: tuple[int | None, ...]) -> str:
    """Tell a wrong rank from wrong in and out sizes: A is (rank, in) and B is (out, rank)."""
    if len(found) == len(expected) == 2:
        other = 1 if part.endswith("A") else 0
        if expected[other] in (None, found[other]):
            return "rank-mismatch"
    return "shape-mismatch"


def _missing(case: _Case, held: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    config, targets = case.config, case.targets
    halves = [
        (path, f"{part} of shape {_shape(shape)}", _NOTHING)
        for path, target in targets.items()
        if path in held
        for part, shape in target.shapes(config).items()
        if part not in held[path]
    ]
    kinds = {layer_zero(path) for path in held}
    # The twin of a tied module has its weight from the other.
    twins = {path for path in targets if config.ensures_tying and case.base.tied(path) in held}
    lost = [path for path in targets if path not in held and path not in twins]
    # A kind of module that no layer holds was listed and never trained: PEFT leaves it at zero.
    untrained = [(p, "lora_A and lora_B", _NOTHING) for p in lost if layer_zero(p) not in kinds]
    partial = [(p, "lora_A and lora_B", _NOTHING) for p in lost if layer_zero(p) in kinds]
    if halves or partial or not kinds:
        return grouped("missing-tensors", halves + partial + untrained)
    return grouped("missing-tensors", untrained, severity="warning")
