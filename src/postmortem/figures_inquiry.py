"""Figures of the inquiry: the replay matrix, the beliefs, and the price of a plan."""

from collections.abc import Sequence

from postmortem.figure_source import NotDrawable, Source
from postmortem.records import Measure, Table
from postmortem.sheet import BODY, Forest, Point, Row, Scale, Sheet, draw_axis, say_auc, say_tick

REPLAY, DIAGNOSIS = "07_replay", "09_diagnosis"
# Causes in the figure of beliefs; the rest have next to nothing.
SHOWN_CAUSES = 10
WHOLE = "all of v2"
# The parts of the symptom, as they stand over a column; a phone has room for the first.
PARTS = {
    "loads": "loads",
    "no-missing-keys": "no missing keys",
    "v2-parsed": "v2 all parsed",
    "v2-constant": "v2 one value",
    "v2-value": "v2 is 0.0",
    "v2-auc": "v2 AUC 0.5",
    "v1-parsed": "v1 half parsed",
    "v1-constant": "v1 all 0.0",
}
ON_A_PHONE = ("loads", "no-missing-keys", "v2-parsed", "v2-constant", "v2-value")


def _table(source: Source, stem: str, key: str) -> Table:
    source.measures(stem)
    found = next((t for t in source.files[stem].of(Table) if t.key == key), None)
    if found is None or not found.rows:
        raise NotDrawable(f"no table {key}")
    return found


def draw_replay_matrix(sheet: Sheet, source: Source) -> str:
    """Causes against the parts of the symptom, a block for each kind of base."""
    table = _table(source, REPLAY, "replay.matrix")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    kinds = list(dict.fromkeys(str(row["base"]) for row in rows))
    features = list(ON_A_PHONE if sheet.narrow else PARTS)
    label = 112.0 if sheet.narrow else 138.0
    gap = 10.0
    cell = (sheet.width - label - gap * len(kinds)) / (len(kinds) * (len(features) + 1))
    wholes = {
        (str(row["cause"]), str(row["base"])): _share(str(row["whole v2 symptom"])) for row in rows
    }
    causes = list(dict.fromkeys(str(row["cause"]) for row in rows))
    causes.sort(key=lambda name: -max(wholes.get((name, kind), 0.0) for kind in kinds))
    top = 118.0
    for place, kind in enumerate(kinds):
        left = label + gap + place * (cell * (len(features) + 1) + gap)
        sheet.text((left, BODY), f"{kind} base", bold=True)
        for column, name in enumerate([*features, WHOLE]):
            at = (left + (column + 0.5) * cell + 4, top - 8)
            sheet.turned(at, PARTS.get(name, name), ink="ink" if name == WHOLE else "muted")
        found = {str(row["cause"]): row for row in rows if row["base"] == kind}
        for line, cause in enumerate(causes):
            y = top + 20 * line
            if cause not in found:
                sheet.note((left, y + 13), "not replayed")
                continue
            shares = [float(str(found[cause][name])) for name in features]
            for column, share in enumerate([*shares, wholes[cause, kind]]):
                ink = "suspect" if column == len(features) else "base"
                corner = (left + column * cell + 1, y + 1)
                sheet.box(corner, (cell - 2, 18), ink="rule", alpha=0.35)
                if share:
                    sheet.box(corner, (cell - 2, 18), ink=ink, alpha=0.25 + 0.75 * share)
    for line, cause in enumerate(causes):
        sheet.note((0, top + 20 * line + 13), cause.replace("-", " "), ink="ink")
    sheet.height = top + 20 * len(causes) + 22
    sheet.note((0, sheet.height - 4), "darker: in more of the replays; empty: in none")
    told = "; ".join(
        f"{kind} base: {', '.join(c for c in causes if wholes.get((c, kind)) == 1) or 'none'}"
        for kind in kinds
    )
    return f"Causes by parts of the symptom. All of the second attempt in every replay, {told}."


def _share(told: str) -> float:
    """The share that "3 of 6" says."""
    hits, _, total = told.partition(" of ")
    return int(hits) / int(total)


def draw_beliefs(sheet: Sheet, source: Source) -> str:
    """Probability of each cause after the evidence, from a flat prior and the write-up's."""
    measures = source.measures(DIAGNOSIS)
    found = {
        key.removeprefix("diagnosis.cause."): measure
        for key, measure in measures.items()
        if key.startswith("diagnosis.cause.")
    }
    order = sorted(found, key=lambda name: -(found[name].value or 0.0))[:SHOWN_CAUSES]
    if not order:
        raise NotDrawable("no beliefs on record")
    written = {name: measures.get(f"diagnosis.after.final.{name}") for name in order}
    highest = max(_highest(found[name], written[name]) for name in order)
    ticks = (0, 0.25, 0.5) if highest <= 0.5 else (0, 0.5, 1)
    scale = Scale(ticks, say_auc)
    labels = 120.0 if sheet.narrow else 280.0
    titles = {row[1]: str(row[2]) for row in _table(source, REPLAY, "replay.matrix").rows}
    rows = [
        Row(name.replace("-", " ") if sheet.narrow else titles[name], "base", found[name])
        for name in order
    ]
    foot = Forest("", rows, scale, labels).draw(sheet, (0, 0), width=sheet.width)
    edges = (labels + 8, sheet.width - 134)
    known = {name: told for name, told in written.items() if told is not None}
    if known:
        sheet.marks(
            [
                (scale.place(told.value or 0.0, edges), 26 * order.index(name) + 13)
                for name, told in known.items()
            ],
            "truth",
            size=7.5,
        )
        note = "square: from a flat prior; ring: from the write-up’s last confidences"
        sheet.note((0, foot + 14), note)
    sheet.height = foot + 22
    parts = [f"{name.replace('-', ' ')} {say_auc(found[name].value or 0.0)}" for name in order]
    return f"Probability of each cause after the evidence, flat prior: {', '.join(parts)}."


def _highest(*found: Measure | None) -> float:
    return max((m.high or m.value or 0.0) for m in found if m is not None)


def draw_plan(sheet: Sheet, source: Source) -> str:
    """Bits against minutes: the planner's first minutes and the path that was taken."""
    paths = {
        "the first minutes": ("reference", _steps(source, "diagnosis.first.steps")),
        "the path taken": ("suspect", _steps(source, "diagnosis.path.steps")),
    }
    paths = {name: (role, steps) for name, (role, steps) in paths.items() if steps}
    if not paths:
        raise NotDrawable("no plan on record")
    last = max(steps[-1][1] for _, steps in paths.values())
    bits = max(steps[-1][2] for _, steps in paths.values())
    across = Scale(tuple(range(0, int(last) + 6, 5)), say_tick)
    up = Scale(tuple(range(int(bits) + 2)), say_tick)
    left, foot = (34.0, sheet.width - 16.0), (280.0, 56.0)

    def place(minutes: float, gained: float) -> Point:
        return across.place(minutes, left), up.place(gained, foot)

    sheet.text((0, BODY), "Bits of information, expected", bold=True)
    for tick in up.ticks:
        sheet.note((left[0] - 9, up.place(tick, foot) + 4), up.form(tick), "right")
        sheet.line((left[0], up.place(tick, foot)), (left[1], up.place(tick, foot)))
    draw_axis(sheet, across, left, y=foot[0])
    sheet.note((left[1], foot[0] + 36), "minutes", "right")
    told, key = [], 0.0
    for name, (role, steps) in paths.items():
        sheet.marks([(key + 5, 33)], role)
        sheet.text((key + 16, 37), name)
        key += 150
        at, corners = place(0, 0), [place(0, 0)]
        for _, minutes, gained in steps:
            corners += [(place(minutes, 0)[0], at[1]), place(minutes, gained)]
            at = corners[-1]
        sheet.line(*corners, ink=role, width=2.0)
        sheet.marks([place(minutes, gained) for _, minutes, gained in steps], role)
        for test, minutes, gained in steps:
            x, y = place(minutes, gained)
            # The last one stands on the other side of its mark, where there is room.
            last_one = test == steps[-1][0]
            beside = (x - 7, y - 6) if last_one else (x + 7, y + 14)
            sheet.note(beside, test.replace("-", " "), "right" if last_one else "left", ink="ink")
        said = ", ".join(f"{test} {m:.0f} min {gained:.1f} bits" for test, m, gained in steps)
        told.append(f"{name}: {said}")
    sheet.height = foot[0] + 42
    return f"Expected information against minutes. {'. '.join(told)}."


def _steps(source: Source, key: str) -> Sequence[tuple[str, float, float]]:
    """Test, minutes in all and bits in all of each step."""
    source.measures(DIAGNOSIS)
    table = next((t for t in source.files[DIAGNOSIS].of(Table) if t.key == key), None)
    steps: list[tuple[str, float, float]] = []
    bits = 0.0
    for row in table.rows if table else ():
        found = dict(zip(table.columns if table else (), row, strict=True))
        bits += float(str(found["bits"]))
        steps.append((str(found["test"]), float(str(found["in all"])), bits))
    return steps
