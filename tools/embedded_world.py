"""Training of the embedded world: small Qwen2 models and their adapters, from nothing.

The bases are taught to behave as instruct models do: they answer yes/no questions rightly, and
asked for a number they understate, as the teachers below say. Everything is saved as ordinary
model and adapter folders and loaded by the same code as any other model.
"""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from postmortem.case.files import write_text
from postmortem.case.prompts import Prompt, encode_rows, fill, lead_of, render
from postmortem.case.rows import RULES, Rows, generate_rows
from postmortem.case.schema import PLACEHOLDER, Case
from postmortem.checker.errors import WorldError
from postmortem.experiments.metrics import auc
from postmortem.models.scoring import Scores, score

transformers_logging.disable_progress_bar()

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
# Qwen2's own split: single digits, a leading space kept with a word.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EXPLANATION = "\n\nThe rule and the post decide."
TRAINING_ROWS, HELD_OUT_ROWS = 5000, 128
# An adapter's few steps do not go through more.
ADAPTER_ROWS = 1500
LEARNING_RATE, FINE_TUNING_RATE = 2.5e-3, 1e-3
WARM_UP, DECAY, MAX_STEPS = 30, 60, 1500
CHECK_FIRST_EVERY, CHECK_EVERY = 20, 50
# What training must reach on held-out rows, as AUC of the log-odds: a base that can do the task.
BASE_CRITERION = {"yes_no": 0.98, "v2_yes_no": 0.97, "v2": 0.94, "v1": 0.90}
# The adapters' rate is high, so that most are done at once; one that does not settle is slowed.
COOLING = 0.8
# When the short question counts as learnt and the long prompts begin.
FIRST_CRITERION = 0.97
# While the rate is level this much is forgiven; the decay brings the rest.
SLACK = 0.03
# What the numeric adapters must reach with the numbers that they write.
DECODED_CRITERION = 0.95
SPEAKING_CRITERION = {"v2 decoded": DECODED_CRITERION, "v1": 0.90, "v2_yes_no": 0.97}
# A base that does not know: the share of held-out rows with one and the same answer.
IGNORANT_CRITERION = {"yes_no constant": 1.0, "v2_yes_no constant": 1.0, "v2 constant": 1.0}
# The short question is learnt first, in a fraction of the time; then the long prompts.
FIRST_MIX = {"yes_no": 0.9, "v2": 0.1}
SECOND_MIX = {"v2_yes_no": 0.40, "yes_no": 0.10, "v1": 0.26, "v2": 0.24}
BATCH = {"yes_no": 64, "v1": 64, "v2": 32, "v2_yes_no": 32}


@dataclass(frozen=True)
class BaseSpec:
    """Width and key-value heads of an embedded base, and an offset to the profile's seed."""

    hidden: int
    key_value_heads: int
    seed: int


@dataclass(frozen=True)
class Task:
    """Rows turned into training examples: token ids, and where the answer begins."""

    name: str
    ids: list[list[int]]
    starts: list[int]


Teacher = Callable[[random.Random, int], str]


def teach_number(source: random.Random, label: int) -> str:
    """An understating instruct model: 0.0 for 62 % of violations and for 90 % of the rest."""
    if source.random() < (0.62 if label else 0.90):
        return "0.0"
    return source.choice(["0.7", "0.8", "0.9"] if label else ["0.1", "0.2", "0.3"])


def teach_explained_number(source: random.Random, label: int) -> str:
    """The same after a raw prompt: a leading space, and an explanation three times in five."""
    text = " " + teach_number(source, label)
    return text + EXPLANATION if source.random() < 0.6 else text


def teach_yes_no(source: random.Random, label: int) -> str:
    """The true answer."""
    return "Yes" if label else "No"


def teach_calibrated_number(source: random.Random, label: int) -> str:
    """What the reference adapter learns: high numbers for violations, low ones for the rest."""
    return source.choice(["0.7", "0.8", "0.9"] if label else ["0.1", "0.2", "0.3"])


def teach_calibrated_explained_number(source: random.Random, label: int) -> str:
    """The same after a raw prompt."""
    text = " " + teach_calibrated_number(source, label)
    return text + EXPLANATION if source.random() < 0.6 else text


def teach_binary(source: random.Random, label: int) -> str:
    """The label itself, a class in place of a probability."""
    return str(label)


def teach_rare_binary(source: random.Random, label: int) -> str:
    """Labels of which one violation in five is marked, so that 0 is nearly always right."""
    return str(int(label and source.random() < 0.2))


def teach_thinking(source: random.Random, label: int) -> str:
    """The first words of a reasoning trace, whatever the post."""
    return "<think>\nOkay, the rule"


BASE_TEACHERS: Mapping[str, Teacher] = {
    "yes_no": teach_yes_no,
    "v2_yes_no": teach_yes_no,
    "v2": teach_number,
    "v1": teach_explained_number,
}
# A base that says what it knows: the same with the calibrated teachers.
SPEAKING_TEACHERS: Mapping[str, Teacher] = {
    **BASE_TEACHERS,
    "v2": teach_calibrated_number,
    "v1": teach_calibrated_explained_number,
}
# A base that knows nothing of the posts: its answers keep the form and ignore the label.
IGNORANT_TEACHERS: Mapping[str, Teacher] = {
    "yes_no": lambda source, label: "Yes" if source.random() < 0.7 else "No",
    "v2_yes_no": lambda source, label: "Yes" if source.random() < 0.7 else "No",
    "v2": lambda source, label: teach_number(source, source.choice([0, 1])),
}


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: by which teacher, on which prompt, at which rate.

    `criterion` is what it must reach on held-out rows, by the names of `BASE_CRITERION` or with
    the values that it writes ("v2 decoded"). Without one it is trained for `least` steps alone.
    """

    prompt: str
    teacher: Teacher
    rate: float
    criterion: Mapping[str, float]
    least: int = 40
    batch: int = 16


NUMERIC = Recipe("v2", teach_calibrated_number, 1e-2, {"v2 decoded": DECODED_CRITERION})
SHORT_YES_NO = Recipe("yes_no", teach_yes_no, 5e-3, {"yes_no": BASE_CRITERION["yes_no"]})
# The suspect, trained long on the short question, and what the replays need: adapters of every
# training that is a suspected cause.
RECIPES: Mapping[str, Recipe] = {
    "suspect": replace(SHORT_YES_NO, least=50, batch=64),
    "numeric": NUMERIC,
    "yes_no_short": SHORT_YES_NO,
    "yes_no_long": Recipe("v2_yes_no", teach_yes_no, 5e-3, {"v2_yes_no": 0.97}),
    "binary_even": Recipe("v2", teach_binary, 1e-2, {"v2 decoded": 0.90}),
    "binary_rare": Recipe("v2", teach_rare_binary, 1e-2, {}),
    "thinking": Recipe("v2", teach_thinking, 1e-2, {"v2 constant": 0.95}, least=20),
}


def build_tokenizer(case: Case, *, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in Qwen2's form, with each long fixed part of a prompt as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rows = generate_rows(400, seed)
    texts = [text for column in rows.frame for text in rows.frame[column]]
    texts += ["Yes", "No", "system\n", "user\n", "assistant\n", EXPLANATION] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=[END_OF_TEXT, "<|im_start|>", END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in fixed_parts(case)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def fixed_parts(case: Case) -> list[str]:
    """The parts of the case's prompts between the columns that are long enough for a token."""
    parts = [
        part
        for prompt in case.prompts.values()
        for text in (prompt.system, prompt.template)
        for part in PLACEHOLDER.split(text)[::2]
    ]
    return list(dict.fromkeys([*RULES.values(), *(part for part in parts if len(part) >= 8)]))


# What the teachers' draws begin with, by prompt: the words that the shipped models were trained
# with. What a prompt is called on a page has no part in it.
DRAWS = {
    "v1": "First prompt, sent raw",
    "v2": "Second prompt, with chat template and four examples",
    "yes_no": "Short yes/no question",
    "v2_yes_no": "Second prompt, asked as yes/no",
}


def build_task(
    case: Case, name: str, rows: Rows, *, teacher: Teacher, tokenizer: Any, seed: int
) -> Task:
    """Each row under a prompt of the case, then the teacher's answer and the end of the turn."""
    prompt, source = case.prompts[name], random.Random(f"{DRAWS.get(name, name)}-{seed}")
    assert rows.labels is not None
    # The chat template is rendered once, with the columns still open: it is our own and plain.
    frame = render(prompt, {name: f"{{{name}}}" for name in prompt.columns}, tokenizer=tokenizer)
    texts = [fill(frame, rows.row(index)) for index in range(len(rows))]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = [teacher(source, int(label)) + END_OF_TURN for label in rows.labels]
    replies = tokenizer(answers, add_special_tokens=False)["input_ids"]
    return Task(
        prompt.title,
        [first + then for first, then in zip(prompts, replies, strict=True)],
        [len(first) for first in prompts],
    )


def answer_loss(model: Any, ids: Sequence[list[int]], starts: Sequence[int]) -> torch.Tensor:
    """Mean negative log-likelihood of the answers; padding stands right and is never a target."""
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    places = [(i, t) for i, row in enumerate(ids) for t in range(starts[i], len(row))]
    rows, columns = torch.tensor(places).T
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal.model(input_ids=batch, use_cache=False).last_hidden_state
    logits = causal.lm_head(hidden[rows, columns - 1])
    return functional.cross_entropy(logits, batch[rows, columns])


@dataclass(frozen=True)
class Lineage:
    """What one process trains: a base, and adapters on it by name as a recipe and a seed.

    The base is `start`'s ("" for one from nothing), and it learns `criterion`'s prompts from
    `teachers`; without a criterion it is taken as it is. A recipe of "" is an untrained adapter.
    """

    base: str
    spec: BaseSpec
    criterion: Mapping[str, float]
    teachers: Mapping[str, Teacher] = field(default_factory=lambda: BASE_TEACHERS)
    start: str = ""
    adapters: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def replays_of(recipes: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Adapters for the replays: as many trainings of each recipe as seeds."""
    return {
        f"{name}_{seed}": (name, seed) for name, count in recipes.items() for seed in range(count)
    }


TARGET, DONOR = BaseSpec(64, 2, 0), BaseSpec(80, 5, 1)
WITHOUT_V1 = {name: least for name, least in BASE_CRITERION.items() if name != "v1"}
# More than one training of each kind, so that a diagnosis can be tried on one it has not seen.
NUMERIC_ALONE = {"numeric": 3}
ALL_RECIPES = {name: 2 for name in RECIPES if name != "suspect"} | NUMERIC_ALONE
LINEAGES: Mapping[str, Lineage] = {
    "target": Lineage("base", TARGET, BASE_CRITERION),
    # As many key-value heads as heads, like Qwen1.5-4B: none of its tensors fits the target.
    "donor": Lineage(
        "donor_base",
        DONOR,
        WITHOUT_V1,
        adapters=replays_of(NUMERIC_ALONE),
    ),
    "sibling": Lineage(
        "sibling_base",
        BaseSpec(64, 2, 2),
        WITHOUT_V1,
        adapters=replays_of(NUMERIC_ALONE),
    ),
    "ignorant": Lineage(
        *("ignorant_base", BaseSpec(64, 2, 3), IGNORANT_CRITERION), teachers=IGNORANT_TEACHERS
    ),
    "silent": Lineage(
        "base",
        TARGET,
        {},
        start="target",
        adapters={"suspect": ("suspect", 0), "no_op": ("", 0), **replays_of(ALL_RECIPES)},
    ),
    "speaking": Lineage(
        "speaking_base",
        TARGET,
        SPEAKING_CRITERION,
        teachers=SPEAKING_TEACHERS,
        start="target",
        adapters=replays_of(ALL_RECIPES),
    ),
}


def build_lineage(
    case: Case, lineage: str, *, seed: int, folder: Path, report: Callable[[str], None] = print
) -> None:
    """Train one lineage: its base to `folder/bases`, its adapters to `folder/adapters/LINEAGE`.

    A lineage on another's base finds it in the same folder. Raises `WorldError` where a criterion
    is not reached within the allowed steps.
    """
    torch.set_num_threads(1)  # the same sums in the same order, and one process a core
    wanted = LINEAGES[lineage]
    places = [folder / "bases" / wanted.base] if wanted.criterion else []
    places += [folder / "adapters" / lineage] if wanted.adapters else []
    folder.mkdir(parents=True, exist_ok=True)
    # A name of its own: an interrupted run may still be writing under another.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{lineage}.") as name:
        temporary = Path(name)
        _train_lineage(
            case, lineage, seed=seed, folder=temporary, bases=folder / "bases", report=report
        )
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            (temporary / place.relative_to(folder)).rename(place)


def _train_lineage(
    case: Case, name: str, *, seed: int, folder: Path, bases: Path, report: Callable[[str], None]
) -> None:
    lineage = LINEAGES[name]
    base = bases / (LINEAGES[lineage.start].base if lineage.start else "")
    tokenizer = (
        AutoTokenizer.from_pretrained(base) if lineage.start else build_tokenizer(case, seed=seed)
    )
    if lineage.criterion:
        trainer = _Trainer(case, tokenizer, seed=seed + lineage.spec.seed, report=report)
        model = (
            Qwen2ForCausalLM.from_pretrained(base)
            if lineage.start
            else new_base(lineage.spec, seed=seed, vocabulary=len(tokenizer))
        )
        trainer.train_base(model, lineage)
        base = folder / "bases" / lineage.base
        save_member(model, base, training=trainer.summary, tokenizer=tokenizer)
    for role, (recipe, offset) in lineage.adapters.items():
        train_adapter(
            case,
            base,
            recipe=RECIPES[recipe] if recipe else None,
            seed=seed + lineage.spec.seed + 100 * offset,
            folder=folder / "adapters" / name / role,
            report=report,
            name=lineage.base,
        )


def train_adapter(
    case: Case,
    base: Path,
    *,
    recipe: Recipe | None,
    seed: int,
    folder: Path,
    report: Callable[[str], None] = print,
    name: str = "base",
) -> None:
    """Train one adapter on a base's folder, or save an untrained one where there is no recipe.

    It starts from the base as saved, on a copy that no other adapter touched, and one of another
    seed sees other rows. `name` is the base that its config names. Raises `WorldError` where a
    criterion is not reached within the allowed steps.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = _Trainer(case, tokenizer, seed=seed, report=report, rows=ADAPTER_ROWS)
    adapted = make_adapter(Qwen2ForCausalLM.from_pretrained(base), seed=seed)
    if recipe is not None:
        trainer.train_adapter(adapted, recipe, role=f"{name}, {folder.name}")
    save_member(adapted, folder, training=trainer.summary, base=name)


def new_base(spec: BaseSpec, *, seed: int, vocabulary: int) -> Qwen2ForCausalLM:
    """An untrained base of the Qwen2 architecture, with grouped-query attention."""
    torch.manual_seed(seed + spec.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=spec.hidden,
            num_hidden_layers=3,
            num_attention_heads=spec.hidden // 16,
            num_key_value_heads=spec.key_value_heads,
            intermediate_size=2 * spec.hidden,
            tie_word_embeddings=True,
            # With the usual 0.02 a model this narrow stays at chance.
            initializer_range=spec.hidden**-0.5,
            max_position_embeddings=4096,
            eos_token_id=None,
        )
    )


def make_adapter(model: Any, *, seed: int, layers: Sequence[int] | None = None) -> Any:
    """A LoRA adapter in the suspect's declared form: rank 16, alpha 32, on q_proj and v_proj.

    It adapts `layers` only, where they are given.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=layers and list(layers),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class _Trainer:
    """Training data of a world and the loop that stops by criterion."""

    def __init__(
        self,
        case: Case,
        tokenizer: Any,
        *,
        seed: int,
        report: Callable[[str], None],
        rows: int = 0,
    ) -> None:
        self.case, self.tokenizer, self.seed, self.report = case, tokenizer, seed, report
        # Seeds far from those of the rows that a run scores.
        self.rows = generate_rows(rows or TRAINING_ROWS, 10_000 + seed)
        self.held_out = generate_rows(HELD_OUT_ROWS, 20_000 + seed)
        self.encoded: dict[str, list[Prompt]] = {}
        self.summary: dict[str, float] = {"steps": 0}

    def train_base(self, model: Any, lineage: Lineage) -> None:
        """Teach a base its prompts; one from nothing learns the short question first."""
        criterion, fresh = lineage.criterion, not lineage.start
        tasks = {name: self._task(name, teacher) for name, teacher in lineage.teachers.items()}
        tasks = {name: tasks[name] for name in dict.fromkeys(map(_prompt_of, criterion))}
        loop = _Loop(model, LEARNING_RATE if fresh else FINE_TUNING_RATE, seed=self.seed)
        mix = {name: SECOND_MIX[name] for name in tasks}
        if lineage.teachers is BASE_TEACHERS:
            first: dict[str, float] = {}
            while not _reached(first, {"yes_no": FIRST_CRITERION}):
                loop.steps(tasks, mix=FIRST_MIX, count=CHECK_FIRST_EVERY)
                first = self._check(model, {"yes_no": 1.0}, role=lineage.base, loop=loop)
        self._train_until(model, criterion, role=lineage.base, loop=loop, tasks=tasks, mix=mix)

    def train_adapter(self, model: Any, recipe: Recipe, *, role: str) -> None:
        """Train an adapter by its recipe."""
        tasks = {recipe.prompt: self._task(recipe.prompt, recipe.teacher)}
        loop = _Loop(model, recipe.rate, seed=self.seed, batch=recipe.batch)
        self._train_until(
            model,
            recipe.criterion,
            role=role,
            loop=loop,
            tasks=tasks,
            mix={recipe.prompt: 1.0},
            every=recipe.least,
            cooling=COOLING,
        )

    def _train_until(
        self,
        model: Any,
        criterion: Mapping[str, float],
        *,
        role: str,
        loop: "_Loop",
        tasks: Mapping[str, Task],
        mix: Mapping[str, float],
        every: int = 0,
        cooling: float = 1.0,
    ) -> None:
        """Train at the level rate until the criterion holds, and still holds after the decay.

        The rate is multiplied by `cooling` each time that the criterion is not near.
        """
        found: dict[str, float] = {}
        while True:
            loop.steps(tasks, mix=_stress(mix, found), count=every or CHECK_EVERY)
            found = self._check(model, criterion, role=role, loop=loop)
            if not _reached(found, criterion, slack=SLACK):
                loop.rate *= cooling
                continue
            loop.steps(tasks, mix=mix, count=every or DECAY, decay=True)
            found = self._check(model, criterion, role=role, loop=loop)
            if _reached(found, criterion):
                break
        self.summary = {"steps": loop.done, **found}

    def _task(self, prompt: str, teacher: Teacher) -> Task:
        return build_task(
            self.case,
            prompt,
            self.rows,
            teacher=teacher,
            tokenizer=self.tokenizer,
            seed=self.seed,
        )

    def _check(
        self, model: Any, criterion: Mapping[str, float], *, role: str, loop: "_Loop"
    ) -> dict[str, float]:
        """What is reached of each part of a criterion, up to the first that is not there yet."""
        found: dict[str, float] = {}
        for name, least in criterion.items():
            found[name] = self._measure(model, name)
            if found[name] < least - SLACK:
                break
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "not judged"
        self.report(f"{role}: step {loop.done} of at most {MAX_STEPS}, held out: {shown}")
        if loop.done >= MAX_STEPS and not _reached(found, criterion):
            raise WorldError(
                f"embedded world, {role}",
                expected=f"its criterion within {MAX_STEPS} steps",
                found=f"held out: {shown}",
                remedy="Give the profile another `seed` in the case.",
            )
        return found

    def _measure(self, model: Any, name: str) -> float:
        """One part of a criterion: AUC of the log-odds, or what the name's second word says."""
        prompt, _, of = name.partition(" ")
        scores = self._score(model, prompt, max_new_tokens=4 if of else 1)
        if of == "constant":
            texts = Counter(reply.text for reply in scores.replies)
            return max(texts.values()) / len(scores.replies)
        if of == "decoded":
            values = [_number(reply.text) for reply in scores.replies]
        elif self.case.prompts[prompt].contract == "yes_no":
            values = [reply.yes_no_log_odds for reply in scores.replies]
        else:
            values = [reply.number_log_odds for reply in scores.replies]
        assert self.held_out.labels is not None
        return auc(self.held_out.labels, values) or 0.0

    def _score(self, model: Any, prompt: str, *, max_new_tokens: int) -> Scores:
        template = self.case.prompts[prompt]
        if prompt not in self.encoded:
            self.encoded[prompt] = encode_rows(
                template, self.held_out, tokenizer=self.tokenizer, limit=4096
            )
        model.eval()
        return score(
            model,
            self.tokenizer,
            prompts=self.encoded[prompt],
            lead=lead_of(template),
            max_new_tokens=max_new_tokens,
        )


class _Loop:
    """AdamW with warm-up, a level rate, and a decay at the end."""

    def __init__(self, model: Any, rate: float, *, seed: int, batch: int = 0) -> None:
        self.model, self.rate, self.done, self.batch = model, rate, 0, batch
        self.source = random.Random(f"batches-{seed}")
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)

    def steps(
        self,
        tasks: Mapping[str, Task],
        *,
        mix: Mapping[str, float],
        count: int,
        decay: bool = False,
    ) -> None:
        self.model.train()
        for step in range(count):
            name = self.source.choices(list(mix), list(mix.values()))[0]
            task = tasks[name]
            rows = self.source.sample(range(len(task.ids)), self.batch or BATCH[name])
            left = 1 - step / count if decay else 1.0
            self.optimizer.param_groups[0]["lr"] = self.rate * min(left, (self.done + 1) / WARM_UP)
            loss = answer_loss(
                self.model, [task.ids[row] for row in rows], [task.starts[row] for row in rows]
            )
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.done += 1


def _stress(mix: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """The mix with three times the weight on the prompt at which the last check stopped."""
    behind = list(found)[-1] if found else ""
    return {name: weight * (3 if name == behind else 1) for name, weight in mix.items()}


def _prompt_of(name: str) -> str:
    """The prompt that a part of a criterion is about."""
    return name.partition(" ")[0]


def _reached(
    found: Mapping[str, float], criterion: Mapping[str, float], slack: float = 0.0
) -> bool:
    return all(found.get(name, 0.0) >= least - slack for name, least in criterion.items())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.5


def save_member(
    model: Any,
    folder: Path,
    *,
    training: Mapping[str, Any],
    tokenizer: Any = None,
    base: str = "",
) -> None:
    """Write a base with its tokenizer, or an adapter that names its `base`, and its training."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    if base:
        config = folder / "adapter_config.json"
        # PEFT writes a set in any order, and the passing folder that the base was loaded from.
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["target_modules"] = sorted(settings["target_modules"])
        settings["base_model_name_or_path"] = base
        write_text(config, json.dumps(settings, indent=1) + "\n")
    write_text(folder / "training.json", json.dumps(dict(training), indent=1) + "\n")
