"""Replays: every suspected cause injected, run, and met with every experiment."""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from scipy.special import log_softmax

from postmortem.case.prompts import Prompt, counts_as_parsed, encode_rows, lead_of, parse_strict
from postmortem.case.rows import GENERATORS, Rows
from postmortem.case.schema import Attempt, Case
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import ModelError
from postmortem.diagnosis.battery import choose_scale, decide_home, tell_order
from postmortem.diagnosis.causes import CAUSES, Cause, Materials, Run, Unavailable
from postmortem.diagnosis.symptom import EFFECTS, TESTS
from postmortem.experiments.metrics import THRESHOLDS, auc, describe, kl_divergence
from postmortem.experiments.records import Cell, Replay
from postmortem.experiments.session import Session
from postmortem.models.changes import CHANGES, NothingToChange, changed_in_memory
from postmortem.models.loading import AttachedAdapter, LoadedBase, attached
from postmortem.models.prefill import SharedLayers
from postmortem.models.scoring import Scores, score

# The name under which PEFT loads an adapter that is given none.
ADAPTER = "default"
# What an adapter that does not load leaves without an answer.
ANSWERED = [
    name for name, test in TESTS.items() if "no answer" in test.outcomes and name != "base-alone"
]


@dataclass(frozen=True)
class Bench:
    """What all replays of one kind of base and seed share: rows, controls and their answers."""

    case: Case
    rows: Rows
    materials: Materials
    reference: Path | None
    attempts: Mapping[str, Attempt]
    shared: SharedLayers | None = None
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def differs(self, base: LoadedBase) -> bool:
        """Whether a loaded base has other weights than the published one, beyond its dtype."""
        published = self.materials.base.model.state_dict()
        return not all(
            torch.allclose(weights.float(), published[name].float(), rtol=2e-3, atol=1e-4)
            for name, weights in base.model.state_dict().items()
        )

    def prompts(self, name: str, run: Run) -> list[Prompt]:
        """The prompts as this run sends them."""
        key = ("prompts", name, run.rewrite)
        if key not in self.known:
            template, tokenizer = self.case.prompts[name], run.base.tokenizer
            found = encode_rows(template, self.rows, tokenizer=tokenizer, limit=512)
            self.known[key] = [run.rewrite(p, tokenizer) for p in found] if run.rewrite else found
        return list(self.known[key])

    def ask(self, model: Any, name: str, run: Run, *, tokens: int = 0) -> Scores:
        """Score the rows on a model; `tokens` limits the answer where its text is not needed."""
        written = [a.decoding.max_new_tokens for a in self.attempts.values() if a.prompt == name]
        return score(
            model,
            run.base.tokenizer,
            prompts=self.prompts(name, run),
            lead=lead_of(self.case.prompts[name]),
            max_new_tokens=tokens or next(iter(written), 3),
            # A cause may have changed the base; then nothing below its adapter is the same.
            shared=self.shared if run.base is self.materials.base else None,
        )

    def rank(self, scores: Sequence[float]) -> str:
        """Whether scores rank the rows; no answer where they are not finite, or without labels."""
        labels = self.rows.labels
        if labels is None or not np.isfinite(scores).all():
            return "no answer"
        return tell_order(labels, np.asarray(scores, dtype=float)).outcome

    def base_alone(self, run: Run) -> str:
        """What the base writes in this run's setting, without any adapter."""

        def decide() -> str:
            scores = self.ask(run.base.model, "v2", run)
            values = [run.parse(reply.text) for reply in scores.replies]
            return classify_values(values, self.attempts["v2"].reported_value)

        return self._once(("base", *_setting(run)), decide)

    def reference_works(self, run: Run, reference: Path) -> str:
        """Whether a sound adapter, put through this run's steps, writes values that rank."""

        def decide() -> str:
            with attached(run.base, reference) as loaded:
                loaded.model.to(run.base.model.dtype)
                scores = self.ask(loaded.model, "v2", run)
            values = [run.parse(reply.text) for reply in scores.replies]
            return "works" if self.rank(values) == "ranks" else "does not work"

        return self._once(("reference", *_setting(run)), decide)

    def _once(self, key: tuple[Any, ...], decide: Callable[[], str]) -> str:
        if key not in self.known:
            self.known[key] = decide()
        return str(self.known[key])


def _setting(run: Run) -> tuple[Any, ...]:
    """All of a run but its adapter."""
    return run.base.model, run.rewrite, run.parse


@dataclass
class Seen:
    """The outcomes and features of one run, collected."""

    outcomes: dict[str, str] = field(default_factory=dict)
    features: dict[str, float | int | str | bool | None] = field(default_factory=dict)


def observe(run: Run, bench: Bench) -> Seen:
    """Meet one run with every experiment."""
    seen = Seen({"inspect": _inspect(run, bench), "prompt": _compare_prompts(run, bench)})
    seen.outcomes["base-alone"] = bench.base_alone(run)
    seen.outcomes["names"] = _compare_names(run, bench)
    # Whether it works is a question of rank, and takes labels.
    if bench.reference is not None and bench.rows.labels is not None:
        seen.outcomes["reference"] = bench.reference_works(run, bench.reference)
    changed = bench.differs(run.base)
    with ExitStack() as stack:
        loaded = None
        try:
            if run.adapter is not None:
                loaded = stack.enter_context(
                    attached(
                        run.base, run.adapter, ignore_mismatched_sizes=run.ignore_mismatched_sizes
                    )
                )
        except ModelError:
            seen.outcomes |= {"load": "raises", "status": "none"}
            seen.features |= {"loads": False, "no missing keys": True}
            seen.outcomes |= dict.fromkeys(ANSWERED, "no answer")
        else:
            note_loading(loaded, seen)
            set_status(loaded, run)
            seen.outcomes["status"] = ask_status(loaded)
            _observe_answers(run.base.model if loaded is None else loaded.model, run, bench, seen)
    # Once more, because a file that brings base weights changes the base for good.
    words = {(True, True): "differs", (False, True): "differs after loading"}
    seen.outcomes["fingerprint"] = words.get((changed, bench.differs(run.base)), "as published")
    return seen


def note_loading(loaded: AttachedAdapter | None, seen: Seen) -> None:
    """Note what PEFT said of the weights while it loaded them."""
    said = loaded.warnings if loaded else ()
    about_weights = [line for line in said if "adapter keys" in line or "mismatched" in line]
    seen.outcomes["load"] = "warns" if about_weights else "silent"
    seen.features["loads"] = True
    seen.features["no missing keys"] = not any("missing" in line for line in about_weights)


def set_status(loaded: AttachedAdapter | None, run: Run) -> None:
    """Leave the adapter answering, disabled, or with another one active in its place."""
    if loaded is None:
        return
    if run.status == "another":
        loaded.model.add_adapter("another", LoraConfig(r=4, target_modules=["q_proj"]))
        loaded.model.set_adapter("another")
    elif run.status == "disabled":
        loaded.model.base_model.disable_adapter_layers()
    loaded.model.to(run.base.model.dtype)


def ask_status(loaded: AttachedAdapter | None) -> str:
    """Which adapter answers, as PEFT tells it of the model: one of the outcomes of `status`."""
    if loaded is None:
        return "none"
    status = loaded.model.get_model_status()
    if status.enabled is not True:
        return "disabled"
    return "active" if status.active_adapters == [ADAPTER] else "another"


def _observe_answers(model: Any, run: Run, bench: Bench, seen: Seen) -> None:
    answers = {name: bench.ask(model, name, run) for name in ("v1", "v2")}
    values = {name: [run.parse(r.text) for r in found.replies] for name, found in answers.items()}
    v2, texts = answers["v2"], [reply.text for reply in answers["v2"].replies]
    for name, found in values.items():
        seen.outcomes[name] = classify_values(found, bench.attempts[name].reported_value)
    seen.outcomes["raw-text"] = classify_texts(texts)
    seen.outcomes["parsers"] = compare_parsers(texts, values["v2"])
    finite = bool(np.isfinite(v2.first_log_probs.max(axis=1)).all())
    seen.outcomes["finite"] = "finite" if finite else "not finite"
    seen.outcomes["number-log-odds"] = bench.rank([r.number_log_odds for r in v2.replies])
    asked = bench.ask(model, "yes_no", run, tokens=1)
    seen.outcomes["yes-no"] = bench.rank([r.yes_no_log_odds for r in asked.replies])
    seen.outcomes["settings"] = _try_settings(model, run, bench)
    seen.features |= symptom_features(values, bench)
    if run.adapter is None:
        seen.outcomes |= {"effect": "none", "scale": "no effect"}
        seen.outcomes["home"] = "no effect"
        return
    with model.disable_adapter():
        off = bench.ask(model, "v2", run, tokens=1)
    seen.outcomes["effect"] = effect = classify_effect(v2, off)
    seen.outcomes["scale"] = (
        "no effect" if effect == "none" else _try_scales(model, run, bench, as_is=values["v2"])
    )
    seen.outcomes["home"] = _find_home(model, run, bench, on=v2, off=off)


def classify_values(values: Sequence[float], reported: float) -> str:
    """The symptom that values have: all the reported one, all another, or how they vary."""
    health = describe(values, groups=["all"] * len(values))
    if health.constant:
        return "all 0.0" if health.top_value == reported else "one other value"
    return "mostly one value" if health.top_share > THRESHOLDS.top_share else "varies"


def classify_texts(texts: Sequence[str]) -> str:
    """What most of the generated texts are."""
    patterns = {
        "a decimal": r"\s*[01]?\.\d+\s*",
        "a bare digit": r"\s*\d\s*",
        "a tag": r"\s*<.*",
        "nothing": r"\s*",
        "a word": r".*",
    }
    kinds = [
        next(kind for kind, pattern in patterns.items() if re.fullmatch(pattern, text, re.DOTALL))
        for text in texts
    ]
    return max(patterns, key=kinds.count)


def classify_effect(on: Scores, off: Scores) -> str:
    """How far two answers are apart: mean KL over the eleven numbers in nats."""
    both = [log_softmax(scores.number_log_probs, axis=1) for scores in (on, off)]
    if not np.isfinite(both).all():
        return "not finite"
    kl = float(kl_divergence(*both).mean())
    return next(word for word, most in EFFECTS.items() if kl <= most)


def compare_parsers(texts: Sequence[str], values: Sequence[float]) -> str:
    """Whether a strict parser reads the same numbers; most texts without one say so."""
    strict = [parse_strict(text).value for text in texts]
    if strict.count(None) * 2 > len(strict):
        return "no number"
    pairs = zip(strict, values, strict=True)
    return "agree" if all(s is None or s == v for s, v in pairs) else "disagree"


def symptom_features(values: Mapping[str, Sequence[float]], bench: Bench) -> dict[str, Cell]:
    """The observed symptom in parts, as measured on the values of each attempt."""
    features: dict[str, Cell] = {}
    for name, found in values.items():
        health = describe(found, groups=["all"] * len(found))
        features |= {
            f"{name} parse rate": float(np.mean(list(map(counts_as_parsed, found)))),
            f"{name} distinct": health.distinct,
            f"{name} value": health.top_value,
        }
    labels = bench.rows.labels
    return features | {"v2 AUC": None if labels is None else auc(labels, values["v2"])}


def _try_settings(model: Any, run: Run, bench: Bench) -> str:
    """Generate one row greedily at the temperature of each attempt."""
    ids = torch.tensor([bench.prompts("v2", run)[0].token_ids], device=model.device)
    said = set()
    for attempt in bench.attempts.values():
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                temperature=attempt.decoding.temperature,
                max_new_tokens=4,
                pad_token_id=0,
            )
        said.add(tuple(answer[0].tolist()))
    return "unchanged" if len(said) == 1 else "changed"


def _try_scales(model: Any, run: Run, bench: Bench, *, as_is: Sequence[float]) -> str:
    """Whether the written values rank better with the adapter at an eighth, or eightfold."""
    labels = bench.rows.labels
    if labels is None:
        return "no better"
    aucs = {"no better": auc(labels, as_is) or 0.0}
    for word, change in (("better at 1/8", "eighth"), ("better at 8", "eightfold")):
        with changed_in_memory(model, CHANGES[change]):
            replies = bench.ask(model, "v2", run).replies
        aucs[word] = auc(labels, [run.parse(reply.text) for reply in replies]) or 0.0
    return choose_scale(aucs)


def _find_home(model: Any, run: Run, bench: Bench, *, on: Scores, off: Scores) -> str:
    """Whether the adapter moves the log-odds the right way, and only as it was saved."""
    as_saved, without = _log_odds(on), _log_odds(off)
    if bench.rows.labels is None or not np.isfinite([as_saved, without]).all():
        return "no answer"
    if np.abs(as_saved - without).max() < EFFECTS["none"]:
        return "no effect"
    others = [_ask_changed(model, run, bench, change) for change in ("flipped", "shifted")]
    kept = [as_saved if other is None else other for other in others]
    return decide_home(bench.rows.labels, as_saved, others=kept)


def _ask_changed(model: Any, run: Run, bench: Bench, change: str) -> np.ndarray | None:
    """The log-odds with the adapter changed; None where the change changes nothing."""
    try:
        with changed_in_memory(model, CHANGES[change]):
            return _log_odds(bench.ask(model, "v2", run, tokens=1))
    except NothingToChange:
        return None


def _log_odds(scores: Scores) -> np.ndarray:
    return np.array([reply.number_log_odds for reply in scores.replies])


def _inspect(run: Run, bench: Bench) -> str:
    """The id of the worst finding of the checker, or that it found nothing."""
    if run.adapter is None:
        return "no adapter"
    base = bench.materials.world.path(bench.materials.role)
    findings = inspect_adapter(str(run.adapter), str(base)).report.findings
    told = [finding.id for finding in findings if finding.severity != "info"]
    return told[0] if told else "nothing"


def _compare_names(run: Run, bench: Bench) -> str:
    if run.adapter is None:
        return "no adapter"
    config = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    same = config["base_model_name_or_path"] == bench.materials.role
    return "the same" if same else "another"


def _compare_prompts(run: Run, bench: Bench) -> str:
    if run.rewrite is None:
        return "whole"
    sent = [prompt.token_ids for prompt in bench.prompts("v2", run)]
    meant = [prompt.token_ids for prompt in bench.prompts("v2", Run(run.base, None))]
    if sent == meant:
        return "whole"
    is_cut = all(ids == whole[: len(ids)] for ids, whole in zip(sent, meant, strict=True))
    return "cut" if is_cut else "another markup"


def make_bench(session: Session, materials: Materials, *, trainings: int) -> Bench:
    """The bench of one training of the adapters: generated rows of its own, whatever is scored."""
    case, size = session.case, session.profile.replays
    assert size is not None
    seed = 30_000 + 100 * session.world.seed + materials.seed
    chosen = GENERATORS[session.profile.corpus](size.rows, seed, columns=case.columns)
    # The sound adapter of the control is not the one that the causes are made from.
    other = f"{materials.kind}/numeric_{(materials.seed + 1) % trainings}"
    member = session.world.replays.get(other)
    reference = None if member is None or member.path is None else Path(member.path)
    return Bench(case, chosen, materials, reference, case.attempts, shared=session.shared)


def replay_causes(
    session: Session, *, kind: str, role: str, whole: bool
) -> tuple[list[Replay], dict[str, str]]:
    """Inject every cause on one base; also say of each cause that could not be, why not.

    The `whole` is every severity into each training of the sound adapter, else the first of both.
    """
    base = session.base if role == "base" else session.load(role)
    trained = sum(name.startswith(f"{kind}/numeric_") for name in session.world.replays)
    replays: list[Replay] = []
    absent: dict[str, str] = {}
    for seed in range(trained if whole else 1):
        with TemporaryDirectory() as scratch:
            materials = Materials(session.world, role, base, kind, seed, Path(scratch))
            bench = make_bench(session, materials, trainings=trained)
            step = f"{kind} base, adapters {seed + 1} of {trained if whole else 1}"
            follow = session.follow(step, total=len(CAUSES), unit="causes")
            for number, (name, cause) in enumerate(CAUSES.items(), 1):
                try:
                    replays += _replay_cause(name, cause, bench=bench, whole=whole)
                except Unavailable as reason:
                    absent[name] = str(reason)
                follow(number)
        session.say(f"{step}: {len(replays)} replays")
    # The later trainings have no adapter of the rarer kinds.
    done = {replay.cause for replay in replays}
    return replays, {name: why for name, why in absent.items() if name not in done}


def replay_all(session: Session) -> tuple[list[Replay], dict[str, str]]:
    """Inject every cause at every severity on each kind of base, into each training."""
    replays: list[Replay] = []
    absent: dict[str, str] = {}
    for kind, role in (("silent", "base"), ("speaking", "speaking_base")):
        found, missing = replay_causes(session, kind=kind, role=role, whole=True)
        replays += found
        absent |= missing
    return replays, absent


def replay_once(session: Session) -> list[Replay]:
    """Inject every cause once, in its plainest form, on the base of the session."""
    return replay_causes(session, kind="silent", role="base", whole=False)[0]


def _replay_cause(name: str, cause: Cause, *, bench: Bench, whole: bool) -> list[Replay]:
    materials, replays = bench.materials, []
    for severity, value in list(cause.severities.items())[: None if whole else 1]:
        seen = observe(cause.inject(materials, value), bench)
        replays.append(
            Replay(
                key=f"{name}.{materials.kind}.{materials.seed}.{severity}",
                cause=name,
                base=materials.kind,
                seed=materials.seed,
                severity=severity,
                outcomes=seen.outcomes,
                features=seen.features,
            )
        )
    return replays
