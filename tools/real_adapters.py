"""LoRA adapters for a real base: only its upper layers are adapted, and the rest is run once.

What the lower layers make of a row does not depend on the adapter, so it is computed once and
kept; each step of training then costs the upper layers alone.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from postmortem.case.files import write_text
from postmortem.case.prompts import encode_rows, lead_of, parse_as_written
from postmortem.case.rows import Rows, generate_moderation_rows, read_rows
from postmortem.case.schema import Case, PromptTemplate
from postmortem.checker.errors import DataError, ModelError
from postmortem.experiments.metrics import auc_estimate, auc_gain_estimate
from postmortem.experiments.records import package_versions
from postmortem.models.loading import LoadedBase, attached, describe_hardware, load_base
from postmortem.models.model_set import Training, digest_model, find_base
from postmortem.models.packaged import CATALOGUE
from postmortem.models.prefill import only_upper
from postmortem.models.scoring import batches, score
from tools.embedded_world import (
    Task,
    Teacher,
    build_task,
    make_adapter,
    save_member,
    teach_calibrated_number,
    teach_rare_binary,
    teach_thinking,
    teach_yes_no,
)

BATCH_TOKENS = 4096
# A longer prompt of a file is cut as in scoring.
PROMPT_TOKENS = 2048
# Difference between a forward in two parts and one in one, as a share of the largest logit, above
# which the base is not one that can be cut; float32 alone makes some 1e-5.
SPLIT_TOLERANCE = 1e-3
# Adapters up to this size keep full precision.
FULL_PRECISION_BYTES = 2_000_000
# Seeds far from those of the rows that a run scores.
TRAINING_SEED, HELD_OUT_SEED = 10_000, 20_000
# More than a record asks; fewer rows of a seed are the beginning of more.
MOST_ASKED = 1000


@dataclass(frozen=True)
class AdapterRecipe:
    """How one adapter is trained.

    `layers` counts from the top; `rows` and `held_out` are how many rows it learns from and is
    judged on; the rate rises over `warm_up` of the steps and then falls to nothing.
    """

    prompt: str
    teacher: Teacher
    rows: int
    held_out: int
    layers: int
    epochs: int = 3
    batch: int = 8
    rate: float = 1e-3
    warm_up: float = 0.06
    clip: float = 1.0


def teach_one_number(source: random.Random, label: int) -> str:
    """One number for violations and one for the rest."""
    return "0.9" if label else "0.1"


YES_NO = AdapterRecipe("yes_no", teach_yes_no, rows=4000, held_out=400, layers=16)
NUMERIC = replace(YES_NO, prompt="v2", teacher=teach_calibrated_number)
# A yes/no adapter, a numeric one, and what else the replays need, which takes fewer rows: one
# learns what is nearly always right, the other what is always the same.
ALL = {
    "yes_no": YES_NO,
    "numeric": NUMERIC,
    "binary_rare": replace(NUMERIC, teacher=teach_rare_binary, rows=1000, held_out=80),
    "thinking": replace(NUMERIC, teacher=teach_thinking, rows=240, held_out=80),
}
# The small base stayed at chance where each answer has three numbers to choose from.
SMALL = {**ALL, "numeric": replace(NUMERIC, teacher=teach_one_number, rows=1600)}
# A base ten times the size: a quarter of the rows, gentler steps, and the upper layers that fit
# into as many bytes.
LARGE = {
    name: replace(recipe, rows=recipe.rows // 4, held_out=recipe.held_out // 2, layers=8, rate=5e-4)
    for name, recipe in ALL.items()
}
# By profile and the name of the adapter.
RECIPES: Mapping[str, Mapping[str, AdapterRecipe]] = {
    "smollm2": SMALL,
    "qwen-coder": LARGE,
    "qwen": LARGE,
}


@dataclass(frozen=True)
class Corpus:
    """Rows to learn from, and rows to judge on by name: `held_out`, and what else is asked."""

    train: Rows
    judged: Mapping[str, Rows]


def recipe_of(profile: str, adapter: str) -> AdapterRecipe:
    """The recipe of an adapter of a profile; `ModelError` where there is none."""
    known = RECIPES.get(profile, {})
    if adapter not in known:
        found = [f"{name} {of}" for name, recipes in RECIPES.items() for of in recipes]
        raise ModelError(
            f"training {adapter!r} for profile {profile!r}",
            expected=f"one of {', '.join(found)}",
            found="no recipe",
        )
    return known[adapter]


def choose_corpus(
    case: Case, recipe: AdapterRecipe, *, seed: int, data: str = "", labels: str = ""
) -> Corpus:
    """Generated rows, or a file's: its last quarter is held out, and no row is in both parts.

    Generated rows are judged on a rule that training does not show as well (`new_rule`), and no
    post that is judged here, or that a run with this seed asks, is learnt. Raises `DataError` for
    a file without labels.
    """
    if not data:
        columns, judged_seed = case.columns, HELD_OUT_SEED + seed
        judged = {
            "held_out": generate_moderation_rows(recipe.held_out, judged_seed, columns=columns),
            "new_rule": generate_moderation_rows(
                recipe.held_out // 2, judged_seed, columns=columns, held_out=True
            ),
        }
        asked = generate_moderation_rows(MOST_ASKED, seed, columns=columns)
        known = {post for rows in (asked, *judged.values()) for post in rows.frame[columns.text]}
        # Short posts are made twice now and then; of so many more than wanted enough are left.
        more = generate_moderation_rows(2 * recipe.rows, TRAINING_SEED + seed, columns=columns)
        new = [i for i, post in enumerate(more.frame[columns.text]) if post not in known]
        return Corpus(_select(more, new[: recipe.rows]), judged)
    rows = read_rows(data, labels or None, columns=case.columns)
    if rows.labels is None:
        raise DataError(data, expected=f"a label {case.columns.label!r} a row", found="no labels")
    cut = len(rows) - len(rows) // 4
    train = rows.head(cut).head(recipe.rows)
    rest = _select(rows, range(cut, len(rows)))
    return Corpus(train, {"held_out": rest.head(recipe.held_out)})


def _select(rows: Rows, places: Sequence[int]) -> Rows:
    assert rows.labels is not None
    wanted = list(places)
    return Rows(
        source=rows.source,
        frame=rows.frame.iloc[wanted].reset_index(drop=True),
        ids=tuple(rows.ids[place] for place in wanted),
        groups=tuple(rows.groups[place] for place in wanted),
        labels=rows.labels[wanted],
    )


@contextmanager
def only_lower(decoder: Any, depth: int) -> Iterator[None]:
    """Run a decoder on its lowest `depth` layers alone, without the final norm."""
    layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = layers[:depth], nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, norm


def lower_states(
    model: Any, ids: Sequence[Sequence[int]], *, layers: int, report: Callable[[str], None] = print
) -> list[torch.Tensor]:
    """What the lowest `layers` layers make of each row: tensors of shape (tokens, width).

    They take tokens x width x 4 bytes a row in float32. Padding stands right, where nothing of
    the row sees it.
    """
    states: dict[int, torch.Tensor] = {}
    clock = _Clock(report)
    with torch.inference_mode(), only_lower(model.model, layers):
        for batch in batches([len(row) for row in ids], BATCH_TOKENS):
            rows = [torch.tensor(ids[index], device=model.device) for index in batch]
            padded = pad_sequence(rows, batch_first=True)
            hidden = model.model(input_ids=padded, use_cache=False).last_hidden_state
            states |= {
                index: hidden[place, : len(ids[index])].clone() for place, index in enumerate(batch)
            }
            clock.tell(len(states), len(ids), "lower layers, row")
    # Tensors made in inference mode may not take part in training; copies may.
    return [states[index].clone() for index in range(len(ids))]


def upper_logits(
    model: Any, states: Sequence[torch.Tensor], *, layers: int, places: torch.Tensor
) -> torch.Tensor:
    """Logits at `places` (rows and columns, shape (2, n)) from kept states, by the upper layers."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    padded = pad_sequence(list(states), batch_first=True)
    with only_upper(causal, layers):
        hidden = causal.model(inputs_embeds=padded, use_cache=False).last_hidden_state
    return causal.lm_head(hidden[places[0], places[1]])


def check_split(model: Any, ids: Sequence[int], *, state: torch.Tensor, layers: int) -> None:
    """Raise `ModelError` where a forward in two parts is not the forward in one."""
    last = torch.tensor([[0], [len(ids) - 1]], device=model.device)
    with torch.inference_mode():
        whole = model(torch.tensor([list(ids)], device=model.device), use_cache=False)
        parts = upper_logits(model, [state], layers=layers, places=last)
    logits = whole.logits[0, -1]
    difference = float((logits - parts[0]).abs().max() / logits.abs().max())
    if not difference < SPLIT_TOLERANCE:
        raise ModelError(
            type(model).__name__,
            expected=f"the same logits in two parts, within a share of {SPLIT_TOLERANCE}",
            found=f"a difference of {difference:.2g}",
            remedy="Only decoders that apply nothing between the embedding and the layers fit.",
        )


def train_adapter(
    base: LoadedBase,
    task: Task,
    recipe: AdapterRecipe,
    *,
    seed: int,
    report: Callable[[str], None] = print,
) -> tuple[Any, dict[str, Training]]:
    """Put a new adapter on the base's upper layers and train it on the task's answers.

    Returns the adapted model and what training took: epochs, steps, seconds and the mean loss of
    the last epoch.
    """
    began, count = time.monotonic(), base.model.config.num_hidden_layers
    lower = max(0, count - recipe.layers)
    states = lower_states(base.model, task.ids, layers=lower, report=report)
    check_split(base.model, task.ids[0], state=states[0], layers=lower)
    model = make_adapter(base.model, seed=seed, layers=range(lower, count)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.0)
    order = list(_batches_of(len(task.ids), recipe, seed=seed))
    losses: list[float] = []
    clock = _Clock(report)
    with _short_products():
        for step, rows in enumerate(order):
            optimizer.param_groups[0]["lr"] = recipe.rate * _share(step, len(order), recipe.warm_up)
            loss = _answer_loss(model, task, rows, states=states, layers=lower)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            losses.append(loss.item())
            clock.tell(step + 1, len(order), f"loss {losses[-1]:.3f}, step")
    last = losses[-(len(order) // recipe.epochs) :]
    return model.eval(), {
        "epochs": recipe.epochs,
        "steps": len(order),
        "seconds": round(time.monotonic() - began),
        "loss": round(sum(last) / len(last), 4),
    }


@contextmanager
def _short_products() -> Iterator[None]:
    """Let a GPU multiply float32 with shorter mantissas: steps may, what is measured may not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _batches_of(rows: int, recipe: AdapterRecipe, *, seed: int) -> Iterator[list[int]]:
    source = random.Random(f"batches-{seed}")
    for _ in range(recipe.epochs):
        order = source.sample(range(rows), rows)
        yield from (order[start : start + recipe.batch] for start in range(0, rows, recipe.batch))


def _share(step: int, steps: int, warm_up: float) -> float:
    """The part of the rate that holds at a step: up over the warm-up, then down to nothing."""
    rising = max(1, round(warm_up * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def _answer_loss(
    model: Any, task: Task, rows: Sequence[int], *, states: Sequence[torch.Tensor], layers: int
) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens."""
    targets = [
        (place, column - 1, task.ids[row][column])
        for place, row in enumerate(rows)
        for column in range(task.starts[row], len(task.ids[row]))
    ]
    wanted = torch.tensor(targets, device=states[0].device).T
    logits = upper_logits(model, [states[row] for row in rows], layers=layers, places=wanted[:2])
    return functional.cross_entropy(logits, wanted[2])


def judge(
    model: Any, tokenizer: Any, template: PromptTemplate, rows: Rows
) -> tuple[list[float], list[float]]:
    """Log-odds of each row, and the values that the write-up's parser reads, as a run scores it."""
    prompts = encode_rows(template, rows, tokenizer=tokenizer, limit=PROMPT_TOKENS)
    yes_no = template.contract == "yes_no"
    scores = score(
        model,
        tokenizer,
        prompts=prompts,
        lead=lead_of(template),
        max_new_tokens=1 if yes_no else 4,
        batch_tokens=BATCH_TOKENS,
    )
    log_odds = [r.yes_no_log_odds if yes_no else r.number_log_odds for r in scores.replies]
    values = [parse_as_written(reply.text).value for reply in scores.replies]
    return log_odds, [0.5 if value is None else value for value in values]


def compare(
    base: LoadedBase,
    adapter: Path,
    *,
    template: PromptTemplate,
    judged: Mapping[str, Rows],
    report: Callable[[str], None] = print,
) -> dict[str, Training]:
    """AUC of the log-odds with and without the adapter as saved, and the gain on the same rows.

    For a prompt that asks for a number the values that are read from the text are ranked as well.
    """
    kinds = ("log-odds",) if template.contract == "yes_no" else ("log-odds", "decoded")
    found: dict[str, Training] = {}
    for name, rows in judged.items():
        report(f"judging on {len(rows)} rows, {name.replace('_', ' ')}: {rows.source}")
        before = judge(base.model, base.tokenizer, template, rows)
        with attached(base, adapter) as adapted:
            after = judge(adapted.model, base.tokenizer, template, rows)
        assert rows.labels is not None
        for kind, first, then in zip(kinds, before, after, strict=False):
            key = f"{name} {kind} AUC"
            found[f"{key}, base"] = asdict(auc_estimate(rows.labels, first))
            found[f"{key}, adapter"] = asdict(auc_estimate(rows.labels, then))
            found[f"{key}, gain"] = asdict(auc_gain_estimate(rows.labels, then, first))
    return found


def train_profile_adapter(
    case: Case,
    profile: str,
    adapter: str,
    *,
    folder: Path,
    data: str = "",
    labels: str = "",
    rows: int = 0,
    device: str = "auto",
    report: Callable[[str], None] = print,
) -> dict[str, Training]:
    """Train an adapter of a profile and write it to `folder`, whole or not at all.

    It learns from `rows` rows, or from as many as its recipe says. It is judged as saved, on rows
    that it has not seen; the record of it lies beside the weights.
    """
    recipe, chosen = recipe_of(profile, adapter), case.profile(profile)
    recipe = replace(recipe, rows=rows or recipe.rows)
    source = find_base(chosen.base)
    template = case.prompts[recipe.prompt]
    corpus = choose_corpus(case, recipe, seed=chosen.seed, data=data, labels=labels)
    base = load_base(source, device=device, dtype="float32")
    task = build_task(
        case,
        recipe.prompt,
        corpus.train,
        teacher=recipe.teacher,
        tokenizer=base.tokenizer,
        seed=chosen.seed,
    )
    report(f"{profile}, {adapter}: {len(corpus.train)} rows, {sum(map(len, task.ids))} tokens")
    model, took = train_adapter(base, task, recipe, seed=chosen.seed, report=report)
    hardware = describe_hardware(base.device)
    name = upstream_name(chosen.base)
    record: dict[str, Training] = {
        **took,
        "adapter": adapter,
        "prompt": recipe.prompt,
        "rows": len(corpus.train),
        "corpus": corpus.train.source,
        "seed": chosen.seed,
        "layers": recipe.layers,
        "learning rate": str(recipe.rate),
        "base": name,
        "base digest": digest_model(source),
        "hardware": hardware,
        "versions": dict(package_versions()),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{adapter}.") as passing:
        saved = Path(passing) / adapter
        _shrink(model)
        save_member(model, saved, training=record, base=name)
        # A base that the adapter has not touched, and the adapter as anyone would load it.
        del model, base
        record |= compare(
            load_base(source, device=device, dtype="float32"),
            saved,
            template=template,
            judged=corpus.judged,
            report=report,
        )
        write_text(saved / "training.json", json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        saved.rename(folder)
    return record


def upstream_name(base: str) -> str:
    """The name under which a profile's base is published, for an adapter's configuration."""
    packaged = CATALOGUE.get(base.removeprefix("packaged:"))
    return packaged.upstream if packaged else base


def _shrink(model: Any) -> None:
    """Halve the precision of an adapter that would be too large for a repository."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if sum(p.numel() * p.element_size() for p in parameters) > FULL_PRECISION_BYTES:
        for parameter in parameters:
            parameter.data = parameter.data.half()


class _Clock:
    """Tells how far a loop is and how long it still takes, at most every ten seconds."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report, self.began, self.told = report, time.monotonic(), 0.0

    def tell(self, done: int, of: int, what: str) -> None:
        """Report that `done` of `of` are done."""
        passed = time.monotonic() - self.began
        if done < of and passed - self.told < 10:
            return
        self.told = passed
        self.report(f"{what} {done} of {of}, about {passed / done * (of - done):.0f} s left")
