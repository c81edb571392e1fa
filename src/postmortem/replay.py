"""Replays: every suspected cause injected, run, and met with every experiment."""

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
from peft.tuners.lora import LoraLayer
from scipy.special import log_softmax
from scipy.stats import mannwhitneyu

from postmortem.case import Attempt, Case
from postmortem.catalogue import catalogue
from postmortem.causes import CAUSES, Materials, Run, Unavailable
from postmortem.corpus import Rows, generate_rows
from postmortem.errors import ModelError
from postmortem.health import THRESHOLDS, describe
from postmortem.inspection import inspect_adapter
from postmortem.metrics import auc, kl_divergence
from postmortem.models import AttachedAdapter, LoadedBase, attached
from postmortem.parsing import counts_as_parsed
from postmortem.prompts import Prompt, encode, lead_of
from postmortem.records import Replay
from postmortem.scoring import Scores, score
from postmortem.session import Session

# Below this KL in nats two answers are the same up to rounding; below the second, nearly so.
NO_OP, SMALL = 1e-6, 0.1
# An AUC is better, and not by luck alone, when it rises by more than this.
GAIN = 0.1
SYMPTOM = ("all 0.0", "one other value", "mostly one value", "varies", "no answer")
RANKS = ("ranks", "does not rank", "ranks in reverse", "no answer")
INSPECTED = ("nothing", *catalogue(), "no adapter")


@dataclass(frozen=True)
class Test:
    """An experiment: what it asks, and the outcomes that it can have.

    The cost is in `hands`, a person's minutes (a judgement of ours), in models loaded, and in
    `passes`: runs over the incident's rows as long as the second attempt's. A test that rides
    `on` another looks at what that one has produced already.
    """

    title: str
    outcomes: tuple[str, ...]
    hands: float
    loads: int = 0
    passes: float = 0.0
    on: str = ""


TESTS: Mapping[str, Test] = {
    "load": Test("load the adapter and read what PEFT says", ("silent", "warns", "raises"), 1, 1),
    "v1": Test("ask the first prompt", SYMPTOM, 5, 1, 12.0),
    "v2": Test("ask the second prompt", SYMPTOM, 5, 1, 1.0),
    "raw-text": Test(
        "print what is generated, before any parser",
        ("a decimal", "a bare digit", "a word", "a tag", "nothing", "no answer"),
        *(1, 1, 0.3),
    ),
    "settings": Test(
        "change temperature and generate again", ("unchanged", "changed", "no answer"), 1, 1, 1.0
    ),
    "inspect": Test("check the adapter's files against the base", INSPECTED, 1),
    "prompt": Test(
        "print the tokens that the model receives", ("whole", "cut", "another markup"), 2
    ),
    "status": Test(
        "ask PEFT which adapter answers", ("active", "disabled", "another", "none"), 1, 1
    ),
    "finite": Test("look for NaN in the logits", ("finite", "not finite", "no answer"), 2, 1, 0.1),
    "base-alone": Test("ask the base without the adapter", SYMPTOM, 2, 1, 1.0),
    "effect": Test(
        "compare answers with the adapter on and off",
        ("none", "small", "large", "not finite", "no answer"),
        *(3, 1, 2.0),
    ),
    "number-log-odds": Test("rank the rows by the number's log-odds", RANKS, 5, 1, 1.0),
    "yes-no": Test("ask yes or no, and rank by the log-odds", RANKS, 5, 1, 0.3),
    "scale": Test(
        "scale the adapter to an eighth, and eightfold",
        ("no effect", "no better", "better at 1/8", "better at 8", "no answer"),
        *(4, 1, 2.0),
    ),
    "fingerprint": Test(
        "compare the base with the published one, before and after loading",
        ("as published", "differs", "differs after loading"),
        *(5, 2, 0.2),
    ),
    "reference": Test(
        "put a sound adapter through the same steps", ("works", "does not work"), 10, 1, 1.0
    ),
}


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
    known: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def differs(self, base: LoadedBase) -> bool:
        """Whether a loaded base has other weights than the published one, beyond its dtype."""
        published = self.materials.base.model.state_dict()
        return not all(
            torch.allclose(weights.float(), published[name].float(), rtol=2e-3, atol=1e-4)
            for name, weights in base.model.state_dict().items()
        )

    def prompts(self, name: str, run: Run, *, count: int = 0) -> list[Prompt]:
        """The prompts as this run sends them."""
        template = self.case.prompts[name]
        tokenizer = run.base.tokenizer
        found = [
            encode(template, self.rows.row(index), tokenizer=tokenizer, limit=512)
            for index in range(count or len(self.rows))
        ]
        return [run.rewrite(p, tokenizer) for p in found] if run.rewrite else found

    def ask(self, model: Any, name: str, run: Run, *, count: int = 0) -> Scores:
        """Score the rows on a model."""
        limits = [a.decoding.max_new_tokens for a in self.attempts.values() if a.prompt == name]
        return score(
            model,
            run.base.tokenizer,
            prompts=self.prompts(name, run, count=count),
            lead=lead_of(self.case.prompts[name]),
            max_new_tokens=limits[0] if limits else 3,
        )

    def rank(self, log_odds: Sequence[float]) -> str:
        """Whether log-odds rank the rows, by a two-sided rank test at 5 %."""
        labels = self.rows.labels
        if labels is None or not np.isfinite(log_odds).all():
            return "no answer"
        scores = np.asarray(log_odds)
        test = mannwhitneyu(scores[labels == 1], scores[labels == 0])
        if not test.pvalue < 0.05:
            return "does not rank"
        return "ranks" if (auc(labels, scores) or 0.0) > THRESHOLDS.chance else "ranks in reverse"

    def base_alone(self, run: Run) -> str:
        """What the base writes in this run's setting, without any adapter."""

        def decide() -> str:
            scores = self.ask(run.base.model, "v2", run)
            values = [run.parse(reply.text) for reply in scores.replies]
            return classify_values(values, self.attempts["v2"].reported_value)

        return self._once(("base", *_setting(run)), decide)

    def reference_works(self, run: Run) -> str:
        """Whether a sound adapter, put through this run's steps, writes values that rank."""

        def decide() -> str:
            assert self.reference is not None
            with attached(run.base, self.reference) as loaded:
                loaded.model.to(run.base.model.dtype)
                scores = self.ask(loaded.model, "v2", run)
            values = [run.parse(reply.text) for reply in scores.replies]
            return "works" if self.rank(values) == "ranks" else "does not work"

        return self._once(("reference", *_setting(run)), decide)

    def _once(self, key: tuple[Any, ...], decide: Callable[[], str]) -> str:
        if key not in self.known:
            self.known[key] = decide()
        return self.known[key]


def _setting(run: Run) -> tuple[Any, ...]:
    """All of a run but its adapter."""
    return run.base.model, run.rewrite, run.parse


@dataclass
class Observed:
    """The outcomes and features of one run, collected."""

    outcomes: dict[str, str] = field(default_factory=dict)
    features: dict[str, float | int | str | bool | None] = field(default_factory=dict)


def observe(run: Run, bench: Bench) -> Observed:
    """Meet one run with every experiment."""
    seen = Observed({"inspect": _inspect(run, bench), "prompt": _compare_prompts(run, bench)})
    seen.outcomes["base-alone"] = bench.base_alone(run)
    seen.outcomes["reference"] = bench.reference_works(run)
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
            _note_loading(loaded, run, seen)
            _observe_answers(run.base.model if loaded is None else loaded.model, run, bench, seen)
    # Once more, because a file that brings base weights changes the base for good.
    words = {(True, True): "differs", (False, True): "differs after loading"}
    seen.outcomes["fingerprint"] = words.get((changed, bench.differs(run.base)), "as published")
    return seen


def _note_loading(loaded: AttachedAdapter | None, run: Run, seen: Observed) -> None:
    said = loaded.warnings if loaded else ()
    about_weights = [line for line in said if "adapter keys" in line or "mismatched" in line]
    seen.outcomes["load"] = "warns" if about_weights else "silent"
    seen.outcomes["status"] = run.status if loaded else "none"
    seen.features["loads"] = True
    seen.features["no missing keys"] = not any("missing" in line for line in about_weights)
    if loaded is None:
        return
    if run.status == "another":
        loaded.model.add_adapter("another", LoraConfig(r=4, target_modules=["q_proj"]))
        loaded.model.set_adapter("another")
    elif run.status == "disabled":
        loaded.model.base_model.disable_adapter_layers()
    loaded.model.to(run.base.model.dtype)


def _observe_answers(model: Any, run: Run, bench: Bench, seen: Observed) -> None:
    answers = {name: bench.ask(model, name, run) for name in ("v1", "v2")}
    values = {name: [run.parse(r.text) for r in found.replies] for name, found in answers.items()}
    v2 = answers["v2"]
    for name, found in values.items():
        seen.outcomes[name] = classify_values(found, bench.attempts[name].reported_value)
    seen.outcomes["raw-text"] = classify_texts([reply.text for reply in v2.replies])
    finite = bool(np.isfinite(v2.first_log_probs.max(axis=1)).all())
    seen.outcomes["finite"] = "finite" if finite else "not finite"
    seen.outcomes["number-log-odds"] = bench.rank([r.number_log_odds for r in v2.replies])
    asked = bench.ask(model, "yes_no", run)
    seen.outcomes["yes-no"] = bench.rank([r.yes_no_log_odds for r in asked.replies])
    seen.outcomes["settings"] = _try_settings(model, run, bench)
    seen.features |= symptom_features(values, bench)
    if run.adapter is None:
        seen.outcomes |= {"effect": "none", "scale": "no effect"}
        return
    with model.disable_adapter():
        off = bench.ask(model, "v2", run)
    seen.outcomes["effect"] = effect = classify_effect(v2, off)
    seen.outcomes["scale"] = (
        "no effect" if effect == "none" else _try_scales(model, run, bench, as_is=values["v2"])
    )


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
    return "none" if kl <= NO_OP else "small" if kl < SMALL else "large"


def symptom_features(
    values: Mapping[str, Sequence[float]], bench: Bench
) -> dict[str, float | int | str | bool | None]:
    """The observed symptom in parts, as measured on the values of both attempts."""
    health = {name: describe(found, groups=["all"] * len(found)) for name, found in values.items()}
    parsed = {name: np.mean(list(map(counts_as_parsed, found))) for name, found in values.items()}
    return {
        "v1 parse rate": float(parsed["v1"]),
        "v1 distinct": health["v1"].distinct,
        "v1 value": health["v1"].top_value,
        "v2 parse rate": float(parsed["v2"]),
        "v2 distinct": health["v2"].distinct,
        "v2 value": health["v2"].top_value,
        "v2 AUC": None if bench.rows.labels is None else auc(bench.rows.labels, values["v2"]),
    }


def _try_settings(model: Any, run: Run, bench: Bench) -> str:
    """Generate two rows greedily at the attempts' two temperatures."""
    said = []
    for attempt in bench.attempts.values():
        for prompt in bench.prompts("v2", run)[:2]:
            ids = torch.tensor([prompt.token_ids], device=model.device)
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    temperature=attempt.decoding.temperature,
                    max_new_tokens=4,
                    pad_token_id=0,
                )
            said.append((prompt.token_ids, out[0].tolist()))
    return "unchanged" if len({repr(pair) for pair in said}) <= 2 else "changed"


def _try_scales(model: Any, run: Run, bench: Bench, *, as_is: Sequence[float]) -> str:
    """Whether the written values rank better with the adapter at an eighth, or eightfold."""
    if bench.rows.labels is None:
        return "no better"
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    found = {"no better": auc(bench.rows.labels, as_is) or 0.0}
    for name, factor in (("better at 1/8", 1 / 8), ("better at 8", 8.0)):
        _scale(layers, factor)
        scores = bench.ask(model, "v2", run)
        _scale(layers, 1 / factor)
        values = [run.parse(reply.text) for reply in scores.replies]
        found[name] = (auc(bench.rows.labels, values) or 0.0) - GAIN
    return max(found, key=lambda name: found[name])


def _scale(layers: Sequence[Any], factor: float) -> None:
    for layer in layers:
        for name in layer.active_adapters:
            layer.scale_layer(factor) if name in layer.scaling else None


def _inspect(run: Run, bench: Bench) -> str:
    """The id of the worst finding of the checker, or that it found nothing."""
    if run.adapter is None:
        return "no adapter"
    base = bench.materials.world.path(bench.materials.role)
    findings = inspect_adapter(str(run.adapter), str(base)).report.findings
    told = [finding.id for finding in findings if finding.severity != "info"]
    return told[0] if told else "nothing"


def _compare_prompts(run: Run, bench: Bench) -> str:
    if run.rewrite is None:
        return "whole"
    sent = [prompt.token_ids for prompt in bench.prompts("v2", run)]
    meant = [prompt.token_ids for prompt in bench.prompts("v2", Run(run.base, None))]
    if sent == meant:
        return "whole"
    is_cut = all(ids == whole[: len(ids)] for ids, whole in zip(sent, meant, strict=True))
    return "cut" if is_cut else "another markup"


def make_bench(session: Session, materials: Materials, *, rows: int, seeds: int) -> Bench:
    """The bench of one seed: generated rows of its own, or those of the run's file."""
    case, chosen = session.case, session.rows.head(rows)
    if session.rows.is_generated:
        chosen = generate_rows(rows, 30_000 + 100 * session.world.seed + materials.seed)
    # The sound adapter of the control is not the one that the causes are made from.
    other = f"{materials.kind}/numeric_{(materials.seed + 1) % seeds}"
    member = session.world.replays.get(other)
    reference = None if member is None or member.path is None else Path(member.path)
    return Bench(case, chosen, materials, reference, case.attempts)


def replay_causes(
    session: Session, *, kind: str, base: str, seeds: int, severities: int, rows: int
) -> tuple[list[Replay], dict[str, str]]:
    """Inject every cause on one kind of base; also say why a cause could not be, by its name."""
    found, absent = [], {}
    loaded = session.load(base)
    for seed in range(seeds):
        with TemporaryDirectory() as scratch:
            materials = Materials(session.world, base, loaded, kind, seed, Path(scratch))
            bench = make_bench(session, materials, rows=rows, seeds=seeds)
            for name, cause in CAUSES.items():
                for severity, value in list(cause.severities.items())[:severities]:
                    try:
                        run = cause.inject(materials, value)
                    except Unavailable as reason:
                        absent[name] = str(reason)
                        break
                    seen = observe(run, bench)
                    found.append(
                        Replay(
                            key=f"{name}.{kind}.{seed}.{severity}",
                            cause=name,
                            base=kind,
                            seed=seed,
                            severity=severity,
                            outcomes=seen.outcomes,
                            features=seen.features,
                        )
                    )
            session.say(f"replays on the {kind} base, seed {seed}: {len(found)} done")
    return found, absent
