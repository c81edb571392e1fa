"""What the pages of a case of one's own read beside its records: its file, its rows, its run."""

import hashlib
from pathlib import Path

from postmortem.case import Case
from postmortem.corpus import Rows
from postmortem.records import Measure
from postmortem.values import Values, add_table

ROLES = ("base", "suspect", "reference")
# What each contract asks for, in words.
ASKS = {
    "number": "a number from 0 to 1",
    "yes_no": "one of two answers",
    "choice": "one of two answers",
    "class": "a class",
}
MODULE = "module "
ZERO = ("controls.zero_b.is_base", False)
# Explanations that any case can be held against: the recorded verdict on each, and whether it
# speaks for the explanation as it stands or by being refuted.
HYPOTHESES = (
    ("The files do not fit the base, or lack something", "files.suspect.fit", False),
    ("The adapter does nothing", "asked.suspect.moves_base", False),
    ("The base alone answers one and the same value", "asked.base.constant", True),
    ("The suspect knows, and does not say", "asked.suspect.knowing", True),
    ("The suspect never learnt the task", "asked.suspect.ranks_better", False),
    ("Its scale is too large", "controls.eighth.ranks_better", True),
    ("Its scale is too small", "controls.eightfold.ranks_better", True),
    ("Its sign is turned", "controls.flipped.ranks_better", True),
    ("Its layers stand in another order", "controls.turned.ranks_better", True),
    ("The loading is at fault: with lora_B zero the base answers otherwise", *ZERO),
)
OPPOSITE = {"holds": "refuted", "refuted": "holds"}
# What a model does with what it knows, as a verdict on its knowing and not saying.
KNOWING = {
    "knows and does not say": "holds",
    "says what it knows": "refuted",
    "does not know": "refuted",
}


def add_own_values(values: Values, case: Case, *, rows: Rows) -> None:
    """Add the case's texts and tables, and leave out what no case of one's own has."""
    asked, labels = case.prompt(case.asked), rows.labels
    values["texts"] |= {
        "case.title": case.title,
        "case.symptom": case.symptom,
        "case.asked": case.asked,
        "case.template": asked.template,
        "case.asks": ASKS[asked.contract],
        # The pages of such a case quote no run that is kept with the project.
        "recorded": "",
    }
    positive = None if labels is None else int(labels.sum())
    reason = "" if labels is not None else "the rows came without labels"
    counted = Measure(key="-", value=positive, unit="rows", reason=reason)
    values["measures"]["rows.positive"] = counted.model_dump()
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
        [judge_hypothesis(values, *hypothesis) for hypothesis in HYPOTHESES],
    )
    members = values["tables"]["world.members"]
    members["rows"] = [row for row in members["rows"] if row[0] in ROLES]
    _sum_up_modules(values)


def judge_hypothesis(
    values: Values, title: str, key: str, as_it_stands: bool
) -> tuple[str, str, str]:
    """An explanation with this run's verdict on it and the reason; `key` names the record."""
    found = values["verdicts"].get(key)
    if found is None:
        return title, "not available", "no notebook of this case asks for it"
    word = KNOWING.get(found["verdict"], found["verdict"])
    return title, word if as_it_stands else OPPOSITE.get(word, word), found["because"]


def _short_name(name: str) -> str:
    """A name as it may stand on a page: of a folder its last part, which is no one's home."""
    return Path(name).name if Path(name).is_absolute() else name


def _sum_up_modules(values: Values) -> None:
    """One line for the library: its modules are named in the records."""
    rows = values["tables"]["run.inputs"]["rows"]
    modules = [row for row in rows if str(row[0]).startswith(MODULE)]
    others = [row for row in rows if row not in modules]
    digest = hashlib.sha256(repr(sorted(modules)).encode()).hexdigest()[:16]
    library = [f"the library's {len(modules)} modules behind them", digest]
    values["tables"]["run.inputs"]["rows"] = [*others, library]
