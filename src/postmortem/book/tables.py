"""What a case says of itself, as texts, counts, verdicts and tables for the pages."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from postmortem.case.schema import Case, ClaimVerdict, Item, StatedHypothesis
from postmortem.checker.errors import RecordError
from postmortem.experiments.records import Measure, Values, add_table

# The columns of each table of items, by its key; `column=field` where the field has another name.
TABLES = {
    "timeline": "when what=text grade source",
    "observations": "kind statement=text what_we_see=finding grade",
    "evidence": "title statement=text reading what_it_bears=finding grade",
    "quotes": "line=text at=when shows=finding",
    "claims": "id section claim=text verdict because grade decided_by would_change "
    "this_run_asks this_run",
    "lessons": "kind title lesson=text amended=finding",
    "practice.detection": "when check=text would_show=finding grade",
    "practice.factors": "what=text grade",
    "practice.went_well": "what=text grade",
    "practice.lucky": "what=text grade",
    "practice.actions": "action=text status decided_by this_run_asks this_run",
    "hypotheses": "id hypothesis=title statement initial final",
    "standing": "id hypothesis=title verdict because grade decided_by",
    "verdicts": "id hypothesis=title on_the_record=verdict grade this_run_asks this_run",
}
# What tests only what the incident left; any other test is of models of ours.
OF_THE_RECORD = "forensics."
# The fields that a sentence quotes, by key.
TEXTS = {
    "evidence": {"evidence.{id}": "text", "evidence.{id}.bears": "finding"},
    "quotes": {"quote.{id}": "text"},
    "claims": {"claim.{id}.would_change": "would_change"},
    "hypotheses": {"hypothesis.{id}.decided_by": "decided_by"},
    "practice.impact": {"practice.impact": "text"},
    "practice.trigger": {"practice.trigger": "text"},
}


def add_case_values(values: Values, case: Case) -> None:
    """Add the case's own texts, counts, verdicts and tables.

    Raises `RecordError` where the case asks for a verdict that no notebook recorded.
    """
    items: dict[str, Sequence[Item | StatedHypothesis]] = {**case.sections}
    items |= dict.fromkeys(("hypotheses", "standing", "verdicts"), case.hypotheses)
    sections = {
        name: [_fields(name, item, values["verdicts"]) for item in listed]
        for name, listed in items.items()
    }
    for key, spec in TABLES.items():
        columns = _columns(spec)
        rows = [[item[field] for field in columns.values()] for item in sections[key]]
        add_table(values, f"case.{key}", columns, rows)
    for name, texts in TEXTS.items():
        for item in sections[name]:
            for key, field in texts.items():
                values["texts"][f"case.{key}".format(**item)] = item[field]
    values["texts"]["case.context"] = case.context
    for name, prompt in case.prompts.items():
        parts = [prompt.system, prompt.template]
        values["texts"][f"case.prompt.{name}"] = "\n\n".join(part for part in parts if part)
    _add_systems(values, case)
    states = Counter(item["status"] for item in sections["practice.actions"])
    held = Counter(item["verdict"] for item in sections["hypotheses"])
    _add_counts(values, case, states=states, held=held)
    # Added last: a test of the case must be answered by a run, not by the case itself.
    for kind, section in (("claim", "claims"), ("hypothesis", "hypotheses")):
        for item in sections[section]:
            said = {name: item[name] for name in ("verdict", "because")}
            values["verdicts"][f"case.{kind}.{item['id']}"] = said


def _columns(spec: str) -> dict[str, str]:
    """The field of each column by the column's name."""
    pairs = [column.partition("=") for column in spec.split()]
    return {name.replace("_", " "): field or name for name, _, field in pairs}


def _fields(
    section: str, item: Item | StatedHypothesis, verdicts: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """An item's fields; what its test asks and this run answers, and whether that closes it.

    A run on other models than the incident's closes nothing.
    """
    found: dict[str, Any] = {name: _whole(value) for name, value in item}
    found |= {"this_run_asks": "", "this_run": "", "status": "open"}
    if isinstance(item, StatedHypothesis):
        weighed = _word(section, item, verdicts=verdicts, key=f"diagnosis.hypothesis.{item.id}")
        found |= {"verdict": weighed}
    if item.test is None:
        return found
    word = _word(section, item, verdicts=verdicts, key=item.test.verdict)
    found |= {"this_run_asks": item.test.asks, "this_run": word}
    closed = word == "holds" and item.test.verdict.startswith(OF_THE_RECORD)
    return found | ({"status": "closed"} if closed else {})


def _word(
    section: str,
    item: Item | StatedHypothesis,
    *,
    verdicts: Mapping[str, Mapping[str, str]],
    key: str,
) -> str:
    if key not in verdicts:
        raise RecordError(
            f"verdict {key!r}, which `{section}` of the case names for {item.id}",
            expected="a record of it",
            found="none in any notebook",
        )
    return verdicts[key]["verdict"]


def _whole(value: Any) -> Any:
    """A whole number without its point, which a page would show; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _add_counts(
    values: Values, case: Case, *, states: Mapping[str, int], held: Mapping[str, int]
) -> None:
    said = Counter(claim.verdict for claim in case.claims)
    initial = [h.initial for h in case.hypotheses if h.initial is not None]
    final = [h.final for h in case.hypotheses if h.final is not None]
    limits = case.adapter_filter
    counts = {
        "claims": len(case.claims),
        "claims_stand": said["stands"],
        "claims_part": said["stands in part"],
        "claims_refuted": said["refuted"],
        "claims_unchecked": said["cannot be checked"],
        "claims_tested": sum(claim.test is not None for claim in case.claims),
        "hypotheses": len(case.hypotheses),
        "hypotheses_weighed": len(initial),
        "hypotheses_refuted": held["refuted"],
        "hypotheses_open": held["cannot tell"],
        "initial_sum": sum(initial),
        "final_sum": sum(final),
        "favourite_initial": max(initial, default=0),
        "favourite_final": max(final, default=0),
        "filter_std": limits.std_above if limits else None,
        "filter_maximum": limits.maximum_above if limits else None,
        "actions": len(case.practice.actions) if case.practice else None,
        "actions_closed": states["closed"],
        "actions_open": states["open"],
    }
    for key, value in counts.items():
        values["measures"][f"case.{key}"] = number(value, reason="the case does not say")
    words = get_args(ClaimVerdict)
    told = Counter((claim.section, claim.verdict) for claim in case.claims)
    add_table(
        values,
        "case.sections",
        ("section", *words),
        [
            (section, *(told[section, word] for word in words))
            for section in dict.fromkeys(claim.section for claim in case.claims)
        ],
    )


def _add_systems(values: Values, case: Case) -> None:
    systems = case.systems.model_dump(exclude_none=True)
    add_table(
        values,
        "case.systems",
        ("role", "name", "declared", "grade", "note"),
        [(role, s["name"], _declared(s), s["grade"], s["note"]) for role, s in systems.items()],
    )


def _declared(system: Mapping[str, Any]) -> str:
    config = system["config"]
    parts = [f"rank {config['r']}"] if "r" in config else []
    parts += [f"alpha {config['lora_alpha']}"] if "lora_alpha" in config else []
    parts += [", ".join(map(str, config.get("target_modules", [])))]
    if "declared_megabytes" in system:
        parts.append(f"about {system['declared_megabytes']:g} MB")
    return "; ".join(part for part in parts if part)


def number(value: float | None, *, unit: str = "", reason: str = "") -> dict[str, Any]:
    """A measure that is published beside those on record; the reason counts where it has none."""
    why = reason if value is None else ""
    return Measure(key="-", value=value, unit=unit, reason=why).model_dump()


ROLES = ("base", "suspect", "reference")
# What each contract asks for, in words.
ASKS = {
    "number": "a number from 0 to 1",
    "yes_no": "one of two answers",
    "choice": "one of two answers",
    "class": "a class",
}
# Explanations that any case can be held against, by the statement that speaks for each.
EXPLANATIONS = {
    "The files do not fit the base, or lack something": "not files.suspect.fit",
    "The adapter does nothing": "not asked.suspect.moves_the_base",
    "The base alone answers one and the same value": "asked.base.constant",
    "The suspect knows, and does not say": "asked.suspect.knowing",
    "The suspect never learnt the task": "not asked.suspect.ranks_better",
    "Its scale is too large": "controls.eighth.ranks_better",
    "Its scale is too small": "controls.eightfold.ranks_better",
    "Its sign is turned": "controls.flipped.ranks_better",
    "Its layers stand in another order": "controls.shifted.ranks_better",
    "The loading is at fault: with lora_B zero the base answers otherwise": (
        "not controls.zero_b.is_base"
    ),
}
# What a model does with what it knows, as a verdict on its knowing and not saying.
KNOWING = {
    "knows and does not say": "holds",
    "says what it knows": "refuted",
    "does not know": "refuted",
}
OPPOSITE = {"holds": "refuted", "refuted": "holds"}


def add_any_case(values: Values, case: Case) -> None:
    """Add the texts and tables that any case has, whatever it says of itself."""
    values["texts"] |= {
        "case.symptom": case.symptom,
        "case.asked": case.asked,
        # The pages of such a case quote no run that is kept with the project.
        "recorded": "",
    }
    add_asked(values, case.asked)
    systems = case.systems.model_dump(include=set(ROLES), exclude_none=True)
    add_table(
        values,
        "case.systems",
        ("role", "name"),
        [(role, _short_name(systems[role]["name"])) for role in ROLES if role in systems],
    )
    add_table(
        values,
        "case.prompts",
        ("prompt", "asks for", "answers", "template"),
        [
            (
                name,
                ASKS[prompt.contract],
                " or ".join(prompt.answers) if prompt.contract in ("yes_no", "choice") else "–",
                prompt.template,
            )
            for name, prompt in case.prompts.items()
        ],
    )
    add_table(
        values,
        "case.hypotheses",
        ("explanation", "this run", "because"),
        [
            (explanation, *judge(values["verdicts"], statement))
            for explanation, statement in EXPLANATIONS.items()
        ],
    )
    members = values["tables"]["world.members"]
    members["rows"] = [row for row in members["rows"] if row[0] in ROLES]


def add_asked(values: Values, prompt: str) -> None:
    """What is on record of the swap under a prompt, by keys that need not name it."""
    place = re.compile(rf"swap\.(.+)\.{re.escape(prompt)}\.(\w+)")
    for kind in ("measures", "verdicts"):
        for key, value in list(values[kind].items()):
            if found := place.fullmatch(key):
                values[kind][f"asked.{found[1]}.{found[2]}"] = value
    first = values["tables"].get(f"swap.{prompt}.first_rows")
    if first is not None:
        values["tables"]["asked.first_rows"] = first


def judge(verdicts: Mapping[str, Mapping[str, str]], statement: str) -> tuple[str, str]:
    """This run's verdict on a statement, `not KEY` turned round, and the reason."""
    key = statement.removeprefix("not ")
    found = verdicts.get(key)
    if found is None:
        return "not available", "no notebook of this case asks for it"
    word = KNOWING.get(found["verdict"], found["verdict"])
    return word if key == statement else OPPOSITE.get(word, word), found["because"]


def _short_name(name: str) -> str:
    """A name as it may stand on a page: of a folder its last part, which is no one's home."""
    return Path(name).name if Path(name).is_absolute() else name
