"""Figures of a case of one's own: what each system writes, holds, and rests on."""

from collections.abc import Mapping, Sequence

from IPython.display import HTML, display

from postmortem.book.figures import (
    FIGURES,
    SHOWN,
    TENTHS,
    Band,
    Bins,
    Draw,
    Forest,
    NotDrawable,
    Row,
    Scale,
    Sheet,
    Source,
    Strip,
    draw_all,
    draw_columns,
    role_of,
    round_ticks,
    say_auc,
    say_measure,
    say_number,
    say_tick,
    split_by_truth,
    tell_blocks,
)
from postmortem.case.schema import Contract
from postmortem.experiments.records import Measure, Prediction, RecordFile
from postmortem.experiments.session import Session
from postmortem.models.changes import COPIES

ANSWERS, ADAPTERS = "adapter_swap", "controls"
SYSTEMS = {"base": "base alone", "suspect": "suspect", "reference": "reference"}
# Switched off, the suspect is the base once more: a verdict says so, a picture need not.
DRAWN = ("base", "suspect", "reference")


def _answers(source: Source) -> dict[str, list[Prediction]]:
    """The predictions of each drawn system on the prompt that the case asks first."""
    found = {name: source.answers(ANSWERS, source.case.asked, name) for name in DRAWN}
    if not any(found.values()):
        raise NotDrawable("no system has answered")
    return {name: some for name, some in found.items() if some or name == "suspect"}


def _words(found: Sequence[Prediction], contract: Contract) -> str:
    """What a system wrote, in a few words."""
    if not found:
        return "no answers"
    values = {p.strict_value for p in found}
    lost = sum(p.strict_value is None for p in found)
    known = sorted(value for value in values if value is not None)
    if not known:
        return "none could be read"
    told = f"all {say_number(known[0])}" if len(known) == 1 else f"{len(known)} values"
    if contract in ("yes_no", "choice") and len(known) == 1:
        told = f"all {'negative' if known[0] == 0 else 'positive'}"
    return f"{told}, {lost} not read" if lost else told


def draw_rows(sheet: Sheet, source: Source) -> str:
    """The first rows as columns: the truth, and each system's value as a band."""
    found = _answers(source)
    shown = next(some for some in found.values() if some)[:SHOWN]
    labels = [row.label for row in shown]
    known = [label for label in labels if label is not None]
    contract = source.case.prompt(source.case.asked).contract
    bands = [Band("truth", "truth", labels, f"{sum(known)} of {len(known)} are 1")] if known else []
    for name, some in found.items():
        values = {p.row_id: p.strict_value for p in some}
        ours = [values.get(row.row_id) for row in shown] if some else []
        read = any(value is not None for value in ours)
        told = _words(some[:SHOWN], contract)
        bands.append(Band(SYSTEMS[name], role_of(name), ours if read else [], told))
    return draw_columns(sheet, shown, bands)


def draw_values(sheet: Sheet, source: Source) -> str:
    """How often each value is written, by system and truth."""
    found = _answers(source)
    contract = source.case.prompt(source.case.asked).contract
    pairs = {
        name: [(p.strict_value, p.label) for p in some if p.strict_value is not None]
        for name, some in found.items()
    }
    if not any(pairs.values()):
        raise NotDrawable("no answer could be read")
    lanes = {name: split_by_truth(some) for name, some in pairs.items()}
    edges = (84.0 if sheet.narrow else 100.0, sheet.width - 12.0)
    bins = Bins(TENTHS, edges, 10, height=54.0 if sheet.narrow else 44.0)
    bins = bins.packed(lane for some in lanes.values() for lane in some)
    unit = f"value, nearest tenth; {bins.tell()}"
    foot, told, last = 2.0, "Values counted by truth.", list(found)[-1]
    for name, some in found.items():
        words = _words(some, contract)
        strip = Strip(
            *(SYSTEMS[name], words, role_of(name), lanes[name], bins),
            unit if name == last else "",
            counted=True,
        )
        foot, told = strip.draw(sheet, (0.0, foot)) + 14, f"{told} {SYSTEMS[name]}: {words}."
    sheet.height = foot - 12
    return told


def draw_log_odds(sheet: Sheet, source: Source) -> str:
    """The log-odds of what is asked for, by system and truth, on one scale."""
    found = {name: some for name, some in _answers(source).items() if some}
    contract = source.case.prompt(source.case.asked).contract
    field = "number_log_odds" if contract == "number" else "yes_no_log_odds"
    pairs = {
        name: [(getattr(p, field), p.label) for p in some if getattr(p, field) is not None]
        for name, some in found.items()
    }
    odds = [value for some in pairs.values() for value, _ in some]
    if not odds:
        raise NotDrawable("no log-odds are on record")
    measures = source.measures(ANSWERS)
    scale = Scale(round_ticks(min(odds), max(odds)), say_number)
    edges = (84.0 if sheet.narrow else 100.0, sheet.width - 12.0)
    bins = Bins(scale, edges, 24 if sheet.narrow else 48, height=60.0)
    lanes = {name: split_by_truth(some) for name, some in pairs.items()}
    bins = bins.packed(lane for some in lanes.values() for lane in some)
    foot, told, last = 2.0, "Log-odds of what is asked for, by truth.", list(found)[-1]
    for name in found:
        ranked = measures.get(f"swap.{name}.{source.case.asked}.auc")
        words = f"AUC {say_measure(ranked, say_auc)}" if ranked else ""
        unit = f"log-odds, in nat; {bins.tell()}" if name == last else ""
        strip = Strip(SYSTEMS[name], words, role_of(name), lanes[name], bins, unit)
        foot = strip.draw(sheet, (0.0, foot)) + 14
        told = f"{told} {SYSTEMS[name]}: {words or f'{len(pairs[name])} rows'}."
    sheet.height = foot - 12
    return told


def draw_controls(sheet: Sheet, source: Source) -> str:
    """How far the suspect and its changed copies move the base, and how well each then ranks."""
    measures = source.measures(ADAPTERS)
    titles = {"suspect": "suspect", **COPIES}

    def place(name: str) -> str:
        return f"suspect.{source.case.compared_prompts[-1]}" if name == "suspect" else name

    def list_rows(measure: str) -> list[Row]:
        return [
            Row(title, "suspect" if name == "suspect" else "donor", found)
            for name, title in titles.items()
            for found in [measures.get(f"controls.{place(name)}.{measure}")]
            if found
        ]

    moved, ranked = list_rows("shift"), list_rows("auc")
    if not moved:
        raise NotDrawable("neither the suspect nor a changed copy of it has answered")
    ends = [end or 0.0 for row in moved if row.found for end in (row.found.low, row.found.high)]
    ticks = round_ticks(min(*ends, 0.0), max(*ends, 0.0))
    nats = Scale(ticks, lambda v: f"{v:.2f}".replace("-", "−"), say_tick, line=(0, "no change"))
    parts = [Forest("Change of the log-odds, in nat", moved, nats, 104)]
    if ranked:
        asked = Row("base alone", "base", _base_auc(source))
        rows = [asked, *ranked] if asked.found else ranked
        aucs = Scale((0, 0.5, 1), say_auc, line=(0.5, "chance"))
        parts.append(Forest("AUC of the log-odds", rows, aucs, 104))
    width = sheet.width if sheet.narrow else sheet.panel
    foot, corner = 0.0, (0.0, 2.0)
    for part in parts:
        foot = max(foot, part.draw(sheet, corner, width=width))
        corner = sheet.beside(foot, top=2.0)
    sheet.height = foot
    told = [f"{part.title}: {tell_blocks(part.rows, part.scale)}." for part in parts]
    return " ".join([*told, "With 95 % intervals."])


def _base_auc(source: Source) -> Measure | None:
    key = f"swap.base.{source.case.asked}.auc"
    return source.measures(ANSWERS).get(key) if ANSWERS in source.files else None


FIGURES_OWN: Mapping[str, Draw] = {
    "rows": draw_rows,
    "values": draw_values,
    "log_odds": draw_log_odds,
    "controls": draw_controls,
}


def show_figures(session: Session, *names: str) -> None:
    """Show figures in a notebook as the pages will: drawn from what it has recorded.

    Of one that these records do not allow the reason is printed.
    """
    file = RecordFile.model_construct(records=tuple(session.records))
    chosen = {name: draw for name, draw in {**FIGURES, **FIGURES_OWN}.items() if name in names}
    drawings, missing = draw_all({session.name: file}, session.case, chosen)
    for drawing in drawings:
        display(HTML(drawing.wide))
    for name, reason in missing.items():
        print(f"no figure {name}: {reason}")
