"""Which base an adapter belongs to, by what it does to the loss of texts on each candidate."""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from postmortem.checker.checks import inspect_adapter
from postmortem.checker.errors import DataError, ModelError, printable
from postmortem.experiments.metrics import Estimate, mean_estimate, say_estimate
from postmortem.models.changes import each_control
from postmortem.models.loading import LoadedBase, attached, check_adapter_folder, load_base
from postmortem.models.scoring import batches, with_budget

Answer = Literal["one", "cannot separate", "none"]
Tell = Callable[[str], None]
# Findings that make an adapter unusable whatever the base, and those under which it does nothing.
UNUSABLE = {
    "non-finite",
    "corrupt-weights",
    "missing-weights",
    "unsafe-pickle",
    "config-invalid",
    "integer-dtype",
    "empty-tensor",
}
INERT = {"untrained", "scale-zero"}
# Numbers of a batch's log-probabilities: 512 MiB of float32.
LOGITS = 1 << 27
# What cross-entropy counts as no loss, whatever stands there.
IGNORED = -100
OFF = "adapter off"
PARTED = (
    "the candidates' tokenizers part the texts differently: each is held against itself, and "
    "gains are per token of its own"
)
# What is said of an adapter on a candidate, by `Candidate.stands`.
STANDS = {True: "beats its controls", False: "does not beat them", None: "open"}


@dataclass(frozen=True)
class AttributionLimits:
    """What the answer is decided by, chosen on calibration siblings alone (`tools.siblings`).

    `gain`: nats a token by which an adapter must beat each control, with the whole interval; with
    the whole interval below it, it does not. Of the calibration's adapters on their own bases next
    to all had intervals above it, on bases apart from their own next to none.

    `share`: the part of its gain by which it must beat its best control. Where texts surprise a
    base a lot, any update lowers its loss. Those that passed the first limit did so by a half of
    the gain and more on their own bases, and by little more than a quarter on others; this stands
    between the two.

    `trace`: another candidate whose gain lies wholly below this share of the leader's is out. A
    light fine-tune keeps more than half of it, and a base trained apart next to nothing.

    `room`: where a base alone reads with less loss, in nats a token, hardly a gain can show.

    `rotations`: random controls, of which the luckiest is the one to beat. On another base an
    adapter is one more random update: it beats three such by luck one time in four.

    `texts`: with fewer a bootstrap interval is too short. `tokens`: what is read of a text, and of
    its prompt.
    """

    gain: float = 0.03
    share: float = 0.4
    trace: float = 0.25
    room: float = 0.1
    rotations: int = 8
    texts: int = 16
    tokens: int = 512


LIMITS = AttributionLimits()


class UnfitError(ModelError):
    """An adapter does not load on a base, or what they answer together is not finite."""


@dataclass(frozen=True)
class Segment:
    """A text whose tokens are scored; what stands before it as `prompt` is read and not scored."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class CandidateLoss:
    """One candidate: negative log-likelihood of each text, nats a token, float64, (texts,).

    `off` without the adapter, `on` with it, `controls` with each altered copy of it. `counts` are
    the scored tokens of each text, and `encoding` the digest of all token ids.
    """

    name: str
    off: np.ndarray
    on: np.ndarray
    controls: Mapping[str, np.ndarray]
    counts: np.ndarray
    encoding: str = ""

    @property
    def gains(self) -> np.ndarray:
        """By how much the adapter lowers the negative log-likelihood of each text."""
        return self.off - self.on

    def only(self, texts: np.ndarray) -> "CandidateLoss":
        """The same of some of the texts, a mask of shape (texts,)."""
        return replace(
            self,
            off=self.off[texts],
            on=self.on[texts],
            controls={title: losses[texts] for title, losses in self.controls.items()},
            counts=self.counts[texts],
        )


@dataclass(frozen=True)
class Candidate:
    """A candidate as the adapter does there against its own controls; all in nats a token.

    `gain` is by how much the adapter lowers the loss there and `over_control` by how much its loss
    lies below that of the best `control`. `stands` is True where it beats every control, False
    where it is shown not to, None where an interval leaves that open. `level` is the loss with it.
    """

    name: str
    gain: Estimate
    control: str
    over_control: Estimate
    stands: bool | None
    level: float


@dataclass(frozen=True)
class Attribution:
    """The answer, the candidates that remain, and why.

    `left_out` says of each candidate that could not be tried what does not fit.
    """

    adapter: str
    answer: Answer
    remain: tuple[str, ...]
    because: str
    judged: tuple[Candidate, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    texts: int = 0
    tokens: int = 0


def attribute_adapter(
    adapter: str | Path,
    candidates: Mapping[str, str] | Mapping[str, Path],
    *,
    segments: Sequence[Segment],
    device: str = "auto",
    dtype: str = "auto",
    tell: Tell = lambda line: None,
) -> Attribution:
    """Which of several bases an adapter folder belongs to, by what it does to the texts on each.

    `candidates` are model folders or hub ids by the names that they are to have; one is in memory
    at a time. Raises `ModelError` for fewer than two of them, for an adapter that is unusable on
    any base and for a base that cannot be loaded, and `DataError` for too few texts with a token
    to score.
    """
    if len(set(map(str, candidates.values()))) < 2:
        raise ModelError(
            "candidates",
            expected="at least two different bases to choose between",
            found=", ".join(candidates) or "none",
            remedy="`postmortem check ADAPTER --base BASE` judges one base.",
        )
    check_adapter_folder(adapter)
    # All of them before the first is loaded: a misspelt name should not cost the others' minutes.
    misfits = {name: find_misfit(adapter, source) for name, source in candidates.items()}
    readings: list[CandidateLoss] = []
    for name, source in candidates.items():
        if misfits[name]:
            continue
        tell(f"{name}: reading {len(segments)} texts")
        try:
            # In no variable here, so that the next one is loaded into the room that it leaves.
            reading = read_candidate(
                adapter,
                load_base(source, device=device, dtype=dtype),
                name=name,
                segments=segments,
                tell=tell,
            )
            readings.append(reading)
        except UnfitError as error:
            misfits[name] = error.found
        gc.collect()
    return conclude(str(adapter), readings, {name: why for name, why in misfits.items() if why})


def find_misfit(adapter: str | Path, base: str | Path) -> str:
    """Why the adapter's files do not fit this base, by the checker; empty where they do.

    Raises `ModelError` where the adapter itself is unusable, whatever the base.
    """
    findings = inspect_adapter(str(adapter), str(base)).report.findings
    errors = [finding for finding in findings if finding.severity == "error"]
    for finding in errors:
        if finding.id in UNUSABLE:
            raise ModelError(
                adapter,
                expected="an adapter whose weights can be used",
                found=f"{finding.id}, {finding.evidence}",
                remedy=finding.remedy,
            )
    return next((f"{f.id}, {f.evidence}" for f in errors if f.id not in INERT), "")


def conclude(
    adapter: str, readings: Sequence[CandidateLoss], left_out: Mapping[str, str]
) -> Attribution:
    """The answer from the readings of the candidates that the adapter fits.

    Raises `DataError` where too few texts hold a token to score.
    """
    if not readings:
        because = "it could be tried on none of the candidates, for the reasons given"
        return Attribution(adapter, "none", (), because, (), left_out)
    scored = np.all([reading.counts > 0 for reading in readings], axis=0)
    texts = int(scored.sum())
    if texts < LIMITS.texts:
        raise DataError(
            "the texts",
            expected=f"at least {LIMITS.texts} of two tokens or more",
            found=str(texts),
            remedy="Give longer texts, or more of them.",
        )
    readings = [reading.only(scored) for reading in readings]
    candidates = tuple(map(compare_with_controls, readings))
    answer, remain = decide(readings, candidates)
    return Attribution(
        adapter,
        answer,
        remain,
        because=_because(answer, remain, candidates),
        judged=candidates,
        left_out=left_out,
        notes=() if len({reading.encoding for reading in readings}) == 1 else (PARTED,),
        texts=texts,
        tokens=int(readings[0].counts.sum()),
    )


def compare_with_controls(reading: CandidateLoss) -> Candidate:
    """Hold an adapter against its controls on one base, text by text."""
    # The plainest control is the base alone.
    losses = {OFF: reading.off, **reading.controls}
    leads = {title: mean_estimate(loss - reading.on) for title, loss in losses.items()}
    best = min(leads, key=lambda title: _known(leads[title].value))
    stands: bool | None = None
    if any(_known(lead.high) < LIMITS.gain for lead in leads.values()):
        stands = False
    elif all(_known(lead.low) > LIMITS.gain for lead in leads.values()):
        stands = is_above(losses[best] - reading.on - LIMITS.share * reading.gains) or None
    level = float(reading.on.mean())
    return Candidate(reading.name, leads[OFF], best, leads[best], stands, level)


def is_above(values: np.ndarray, least: float = 0.0) -> bool:
    """Whether the interval of the mean lies wholly above the least value."""
    return _known(mean_estimate(values).low) > least


def _known(end: float | None) -> float:
    """A number of an estimate that rests on at least one text."""
    assert end is not None
    return end


def decide(
    readings: Sequence[CandidateLoss], candidates: Sequence[Candidate]
) -> tuple[Answer, tuple[str, ...]]:
    """The answer and the candidates that remain, in their order.

    A candidate is out where it is shown not to beat a control, unless its base knew the texts
    already, or where the one with the greatest gain beats it. Nothing is named that has not beaten
    its own controls.
    """
    alive = [
        (reading, candidate)
        for reading, candidate in zip(readings, candidates, strict=True)
        if candidate.stands is not False or knew_texts(reading, readings)
    ]
    standing = [(_known(one.gain.value), reading) for reading, one in alive if one.stands]
    if not standing:
        return ("cannot separate" if alive else "none"), tuple(one.name for _, one in alive)
    _, leader = max(standing, key=itemgetter(0))
    remain = tuple(
        reading.name for reading, _ in alive if reading is leader or not beats(leader, reading)
    )
    return ("one" if len(remain) == 1 else "cannot separate"), remain


def knew_texts(one: CandidateLoss, readings: Sequence[CandidateLoss]) -> bool:
    """Whether a base alone reads the texts nearly without loss, or better than all others ever do.

    Such a base leaves an adapter nothing to gain, its own one too, so that no gain says nothing.
    Where the adapter does harm, it speaks against the base all the same.
    """
    if np.array_equal(one.on, one.off) or is_above(-one.gains):
        return False
    if float(one.off.mean()) < LIMITS.room:
        return True
    others = [other for other in readings if other is not one]
    return bool(others) and all(
        other.encoding == one.encoding and is_above(reached - one.off, LIMITS.gain)
        for other in others
        for reached in (other.on, other.off)
    )


def beats(leader: CandidateLoss, other: CandidateLoss) -> bool:
    """Whether one candidate rules another out, by paired intervals over the texts.

    Either the other's gain is a trace of the leader's, or the leader has both the greater gain and
    the lower loss. The gain alone does not decide between a base and its fine-tune: one that has
    forgotten the texts has more to gain from the same adapter, and yet ends above its own base. Of
    a base that reads the texts better alone than the leader with the adapter, a trace says nothing.
    """
    # Tokens of two tokenizers are not the same unit, so losses compare only within one.
    alike = leader.encoding == other.encoding
    if is_above(LIMITS.trace * leader.gains - other.gains):
        knew_more = alike and is_above(leader.on - other.off, LIMITS.gain)
        return not knew_more or is_above(-other.gains)
    return alike and is_above(leader.gains - other.gains) and is_above(other.on - leader.on)


def _because(answer: Answer, remain: Sequence[str], candidates: Sequence[Candidate]) -> str:
    if answer == "one":
        one = next(candidate for candidate in candidates if candidate.name == remain[0])
        return (
            f"the adapter gains {format_gain(one.gain)} nat a token there and beats its best "
            f"control, {one.control}, by {format_gain(one.over_control)}; no other candidate "
            "comes near"
        )
    if answer == "none":
        best = max(candidates, key=lambda candidate: _known(candidate.over_control.value))
        return (
            "on no candidate does the adapter beat its controls with these texts; nearest is "
            f"{best.name}, {format_gain(best.over_control)} nat a token over {best.control}"
        )
    standing = ", ".join(candidate.name for candidate in candidates if candidate.stands)
    if standing:
        return (
            f"the adapter beats its controls on {standing}, and these texts do not rule out the "
            "others that are named"
        )
    return (
        "it is shown to beat its controls on none, and these texts do not rule the named ones out"
    )


def read_texts(path: str | Path) -> tuple[Segment, ...]:
    """Read the texts of a file in UTF-8.

    Plain text is one text a paragraph where blank lines part it, else one a line. JSONL
    (`.jsonl`) has `text` and perhaps `prompt` in each line. Raises `DataError` for a missing or
    unreadable file and for too few texts.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8").strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(path, expected="a text file in UTF-8", found=reason) from None
    if path.suffix == ".jsonl":
        read = _read_jsonl(path, content)
    else:
        parts = content.split("\n\n" if "\n\n" in content else "\n")
        read = (Segment(part.strip("\n")) for part in parts)
    segments = tuple(segment for segment in read if segment.text.strip())
    if len(segments) < LIMITS.texts:
        raise DataError(
            path,
            expected=f"at least {LIMITS.texts} texts, one a line or a paragraph",
            found=str(len(segments)),
            remedy="Give more text of the kind that the adapter was trained on.",
        )
    return segments


def _read_jsonl(path: Path, content: str) -> Iterator[Segment]:
    line_type = TypeAdapter(Segment)
    # Only "\n" ends a line: a text may hold what splitlines() splits at.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield line_type.validate_json(line)
        except ValidationError:
            raise DataError(
                f"{path}, line {number}",
                expected="a JSON object with `text`, and perhaps `prompt`, as strings",
                found=line[:60],
            ) from None


def read_candidate(
    adapter: str | Path,
    base: LoadedBase,
    *,
    name: str,
    segments: Sequence[Segment],
    tell: Tell = lambda line: None,
) -> CandidateLoss:
    """Score the texts on one candidate: without the adapter, with it, and with each control.

    A file that brings base weights along changes the loaded base for good. Raises `UnfitError`
    where the adapter does not load, and where a loss is not finite.
    """
    rows, starts = encode_segments(segments, base.tokenizer)

    def measure(title: str, model: Any) -> np.ndarray:
        losses = mean_losses(model, rows, starts, tell=tell)
        if not np.isfinite(losses).all():
            raise UnfitError(name, found=f"its losses are not finite, {title}")
        return losses

    off = measure(OFF, base.model)
    with ExitStack() as stack:
        try:
            model = stack.enter_context(attached(base, adapter)).model
        except ModelError as error:
            raise UnfitError(name, found=" ".join(error.found.split())[:200]) from None
        on = measure("adapter on", model)
        controls = {
            title: measure(title, model)
            for title in each_control(model, rotations=LIMITS.rotations)
        }
    counts = np.array([len(row) - start for row, start in zip(rows, starts, strict=True)])
    encoding = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return CandidateLoss(name, off, on, controls, np.maximum(counts, 0), encoding)


def encode_segments(
    segments: Sequence[Segment], tokenizer: Any
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each text after its prompt, and where the scored part of it begins."""
    rows, starts = [], []
    for segment in segments:
        before = tokenizer(segment.prompt)["input_ids"] if segment.prompt else []
        ids = tokenizer(segment.text, add_special_tokens=not segment.prompt)["input_ids"]
        before = before[-LIMITS.tokens :]
        rows.append([*before, *ids[: LIMITS.tokens]])
        # Nothing comes before the first token, so nothing predicts it.
        starts.append(max(len(before), 1))
    return rows, starts


def mean_losses(
    model: Any,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    tell: Tell = lambda line: None,
) -> np.ndarray:
    """Mean negative log-likelihood of each row's tokens from its start on, nats, float64.

    A row without a scored token is 0.
    """
    losses = np.zeros(len(rows))
    scored = [index for index, row in enumerate(rows) if len(row) > starts[index]]

    def work(budget: int) -> None:
        for places in batches([len(rows[index]) for index in scored], budget):
            batch = [scored[place] for place in places]
            losses[batch] = _batch_losses(
                model, [rows[index] for index in batch], [starts[index] for index in batch]
            )

    with_budget(
        work,
        budget=max(LOGITS // int(model.config.get_text_config().vocab_size), 1),
        least=max(map(len, rows)),
        tell=lambda tokens: tell(f"memory ran out; from here on batches of {tokens} tokens"),
    )
    return losses


@torch.inference_mode()
def _batch_losses(model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> np.ndarray:
    """Padding stands right, where no scored token can see it."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    places = torch.arange(ids.shape[1])
    is_text = places < torch.tensor([[len(row)] for row in rows])
    targets = ids.where(is_text & (places >= torch.tensor(starts)[:, None]), IGNORED)[:, 1:]
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=is_text.long().to(device)).logits
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten().to(device),
        ignore_index=IGNORED,
        reduction="none",
    )
    total = losses.double().view(targets.shape).sum(1).cpu()
    return (total / (targets != IGNORED).sum(1)).numpy()


def format_gain(gain: Estimate) -> str:
    """A gain with its interval, signed."""
    return say_estimate(gain, "+z.3f")


def format_answer(attribution: Attribution) -> str:
    """The answer in words."""
    names = ", ".join(attribution.remain)
    if attribution.answer == "none":
        return "none of these"
    return names if attribution.answer == "one" else f"cannot separate: {names}"


def format_attribution(attribution: Attribution) -> str:
    """The answer first, then each candidate, and what could not be tried."""
    lines = [printable(format_answer(attribution), 2000), printable(attribution.because, 500)]
    if attribution.judged:
        counted = f"{attribution.texts} texts, {attribution.tokens:,} tokens"
        lines += ["", f"{counted}; nat a token, with 95 % intervals"]
    for one in attribution.judged:
        lines.append(
            f"  {printable(one.name)}: gain {format_gain(one.gain)}, over {one.control} "
            f"{format_gain(one.over_control)}: {STANDS[one.stands]}"
        )
    for name, why in attribution.left_out.items():
        lines.append(f"  {printable(name)}: left out, {printable(why, 240)}")
    return "\n".join([*lines, *(f"note: {note}" for note in attribution.notes)])


def format_attribution_json(attribution: Attribution) -> str:
    """The answer as JSON: answer, remain, because, judged, left_out, notes, counts."""
    return json.dumps(asdict(attribution), indent=2, ensure_ascii=False)
