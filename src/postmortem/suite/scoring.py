"""Scoring the adapters of a suite: the base is loaded once, and each result is on disk at once."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from postmortem.case.files import write_text
from postmortem.case.prompts import encode_rows, lead_of, parse_as_written, parse_strict
from postmortem.case.rows import Rows
from postmortem.case.schema import PromptTemplate
from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import ModelError, PostmortemError, printable
from postmortem.experiments.metrics import (
    Estimate,
    auc_estimate,
    auc_gain_estimate,
    describe,
    kl_divergence,
)
from postmortem.models.loading import LoadedBase, attached, footprint, load_base
from postmortem.models.scoring import YES_NO, Reply, Scores, score
from postmortem.suite.suite import (
    CHUNKS,
    PlannedAdapter,
    PromptReading,
    Scored,
    SuitePlan,
    read_result,
    result_path,
)

# Weights in float32 do not determine more decimals of a log-odds, in nats.
DECIMALS = 6
# A broken adapter can bring thousands of missing keys along, each in its message.
SHOWN = 240
BATCH_TOKENS = 8192


class Scorer:
    """A base on which one adapter after another is asked the same prompts.

    `load` loads the base; it is called again where an adapter has changed the base's own weights,
    since what follows must not depend on what came before.
    """

    def __init__(
        self,
        load: Callable[[], LoadedBase],
        *,
        folder: str | Path,
        rows: Rows,
        prompts: Mapping[str, PromptTemplate],
        max_new_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        self.load, self.folder, self.rows, self.templates = load, folder, rows, prompts
        self.max_new_tokens = max_new_tokens
        self.base = load()
        self.footprint = footprint(self.base.model)
        self.prompts = {
            name: encode_rows(
                template, rows, tokenizer=self.base.tokenizer, limit=max_prompt_tokens
            )
            for name, template in prompts.items()
        }
        self.base_scores = self._ask(self.base.model)

    def score_base(self, *, digest: str = "", run: str = "") -> Scored:
        """The base alone as a result, under the name ""."""
        readings = self._read(self.base_scores)
        return Scored(name="", digest=digest, run=run, status="ok", readings=readings)

    def score(self, name: str, folder: str | Path, *, digest: str = "", run: str = "") -> Scored:
        """One adapter as a result; whatever is wrong with it, this returns."""
        parts = {"name": name, "digest": digest, "run": run, **self._inspect(folder)}
        try:
            with attached(self.base, folder) as loaded:
                scores = self._ask(loaded.model)
            warnings = [printable(" ".join(w.split()), SHOWN) for w in loaded.warnings[:3]]
            readings = self._read(scores)
            return Scored(status="ok", warnings=warnings, readings=readings, **parts)
        # An adapter is somebody else's file: no way in which it can fail may stop the others.
        except Exception as error:
            return Scored(status="failed", message=_describe(error), **parts)
        finally:
            if footprint(self.base.model) != self.footprint:
                self.base = self.load()
                self.footprint = footprint(self.base.model)

    def _inspect(self, folder: str | Path) -> dict[str, Any]:
        try:
            report = inspect_adapter(str(folder), str(self.folder)).report
        except Exception as error:  # as above
            return {"checker": f"not checkable: {_describe(error)}"}
        return {
            "checker": report.verdict,
            "findings": [finding.id for finding in report.findings],
            "errors": [f.id for f in report.findings if f.severity == "error"],
        }

    def _ask(self, model: Any) -> dict[str, Scores]:
        return {
            name: score(
                model,
                self.base.tokenizer,
                prompts=self.prompts[name],
                lead=lead_of(template),
                max_new_tokens=self.max_new_tokens,
                batch_tokens=BATCH_TOKENS,
            )
            for name, template in self.templates.items()
        }

    def _read(self, scores: Mapping[str, Scores]) -> dict[str, PromptReading]:
        return {
            name: read_scores(
                scores[name],
                self.base_scores[name],
                contract=template.contract,
                rows=self.rows,
            )
            for name, template in self.templates.items()
        }


def read_scores(scores: Scores, base: Scores, *, contract: str, rows: Rows) -> PromptReading:
    """What an adapter's answers to one prompt show beside those of the base alone."""
    values = [parse_as_written(reply.text).value for reply in scores.replies]
    health = describe(values, groups=rows.groups, labels=rows.labels)
    odds, before = _log_odds(scores, contract), _log_odds(base, contract)
    auc = gain = Estimate(None, None, None, len(values))
    if rows.labels is not None and np.isfinite(odds).all():
        auc = auc_estimate(rows.labels, odds)
        gain = auc_gain_estimate(rows.labels, odds, before)
    return PromptReading(
        mean=health.mean,
        std=health.std,
        minimum=health.minimum,
        maximum=health.maximum,
        distinct=health.distinct,
        tied_pairs=health.tied_pairs,
        parsed=float(np.mean([_answers(reply, contract) for reply in scores.replies])),
        auc_written=health.auc,
        auc=auc,
        gain=gain,
        effect=_effect(scores, base, contract=contract),
        log_odds=[float(o) if np.isfinite(o) else None for o in odds],
    )


def score_chunk(
    plan: SuitePlan,
    out: Path,
    number: str,
    *,
    mark: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Score the adapters of a chunk that have no result yet, each on disk at once; then mark it.

    The mark stands beside the others, unless another place is given for it.
    """
    chunk = plan.chunks[number]
    missing = [entry for entry in chunk if read_result(plan, entry, out) is None]
    if missing or read_result(plan, plan.alone, out) is None:
        scorer = open_scorer(plan)
        _write(plan, plan.alone, out, scorer.score_base(digest=plan.base_digest, run=plan.run))
        for entry in missing:
            scored = scorer.score(entry.name, entry.folder, digest=entry.digest, run=plan.run)
            _write(plan, entry, out, scored)
    report(f"chunk {number}: {len(missing)} of {len(chunk)} adapters scored")
    write_text(mark or out / CHUNKS / f"{number}.done", f"{plan.run}\n")


def _write(plan: SuitePlan, entry: PlannedAdapter, out: Path, scored: Scored) -> None:
    write_text(result_path(plan, entry, out), scored.model_dump_json() + "\n")


def open_scorer(plan: SuitePlan) -> Scorer:
    """The scorer of a plan, its base loaded."""
    suite = plan.suite
    return Scorer(
        partial(load_base, plan.base, device=suite.device, dtype=suite.dtype),
        folder=plan.base,
        rows=plan.rows,
        prompts=plan.prompts,
        max_new_tokens=suite.max_new_tokens,
        max_prompt_tokens=suite.max_prompt_tokens,
    )


def _log_odds(scores: Scores, contract: str) -> np.ndarray:
    """The log-odds of what the prompt asks for, (rows,)."""
    name = "yes_no_log_odds" if contract == "yes_no" else "number_log_odds"
    return np.array([getattr(reply, name) for reply in scores.replies]).round(DECIMALS)


def _answers(reply: Reply, contract: str) -> bool:
    """Whether the text is what was asked for and nothing else."""
    if contract == "yes_no":
        return reply.text.strip() in YES_NO
    return parse_strict(reply.text).value is not None


def _effect(scores: Scores, base: Scores, *, contract: str) -> float | None:
    """KL to the base of the answer in nats, the mean over rows; None where it is not finite."""
    p, q = (
        s.first_log_probs if contract == "yes_no" else log_softmax(s.number_log_probs, axis=1)
        for s in (scores, base)
    )
    with np.errstate(invalid="ignore"):
        effect = float(kl_divergence(p, q).mean())
    return round(effect, DECIMALS + 2) if np.isfinite(effect) else None


def _describe(error: Exception) -> str:
    """What went wrong, without the folder, which may differ between two equal runs."""
    if isinstance(error, ModelError):
        text = f"expected {error.expected}; found {error.found}"
    elif isinstance(error, PostmortemError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return printable(" ".join(text.split()), SHOWN)
