"""Figures of the book, one inline SVG each."""

import io
import json
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from postmortem.case.files import write_text
from postmortem.case.schema import Case, Hypothesis
from postmortem.experiments.records import STATES, Measure, Prediction, RecordFile, Table, Verdict

Point = tuple[float, float]
BODY, SMALL = 13.0, 11.0  # sizes of text in px

# Name of a CSS variable and what stands in where a page does not set it (Okabe-Ito).
FALLBACK = {
    "ink": "#1a1a1a",
    "muted": "#6b7280",
    "rule": "#d4d4d8",
    "paper": "#ffffff",
    "truth": "#000000",
    "base": "#7a7a7a",
    "suspect": "#d55e00",
    "reference": "#009e73",
    "donor": "#8e5ea8",
}
SENTINEL = {name: f"#f0{index:02x}0d" for index, name in enumerate(FALLBACK)}
VARIABLE = {SENTINEL[name]: f"var(--pm-{name},{colour})" for name, colour in FALLBACK.items()}
MARK = {"truth": "o", "base": "s", "suspect": "^", "reference": "o", "donor": "D"}
NUMBER = re.compile(r"[\d\s.,−%\[\]]+")


def clean(text: object, limit: int = 60) -> str:
    """Untrusted text on one line without unprintable characters, cut with an ellipsis."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


class Sheet:
    """A sheet of paper in CSS pixels, origin at the top left; its height is set when known."""

    def __init__(self, width: int) -> None:
        self.width, self.height, self.narrow = width, 100.0, width < 500
        self._figure = Figure(figsize=(1, 1), dpi=72)
        self._figure.patch.set_visible(False)
        FigureCanvasSVG(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.axis("off")

    @property
    def panel(self) -> float:
        """Width of a panel: half a page, or all of a phone."""
        return self.width if self.narrow else self.width / 2 - 16

    def beside(self, foot: float, *, top: float) -> Point:
        """Corner of the second panel: to the right on a page, below on a phone."""
        return (0.0, foot + 20) if self.narrow else (self.width / 2 + 16, top)

    def text(self, at: Point, text: str, anchor: str = "left", *, bold: bool = False) -> None:
        """Write one line with its baseline at a point."""
        self._write(at, text, anchor, size=BODY, ink="ink", weight=700 if bold else 400)

    def note(self, at: Point, text: str, anchor: str = "left", *, ink: str = "muted") -> None:
        """Write a small line, in the lighter tone unless told otherwise."""
        self._write(at, text, anchor, size=SMALL, ink=ink, weight=400)

    def turned(self, at: Point, text: str, *, ink: str = "muted") -> None:
        """Write a small line upwards from a point."""
        self._write(at, text, "left", size=SMALL, ink=ink, weight=400, angle=90)

    def line(self, start: Point, *points: Point, ink: str = "rule", width: float = 1.0) -> None:
        """Draw a line through points."""
        xs, ys = zip(start, *points, strict=True)
        self._axes.plot(xs, ys, color=SENTINEL[ink], linewidth=width, clip_on=False)

    def marks(self, points: Iterable[Point], role: str, *, size: float = 8.0) -> None:
        """Set a role's mark at points: the truth as a ring, the others filled."""
        xs, ys = zip(*points, strict=True)
        ring, shape, ink = role == "truth", MARK.get(role, "o"), SENTINEL[role]
        # Squares and diamonds look larger than a circle of their width.
        (marks,) = self._axes.plot(xs, ys, shape, markersize=size * (0.86 if shape in "sD" else 1))
        marks.set(markerfacecolor=SENTINEL["paper"] if ring else ink, markeredgecolor=ink)
        marks.set(markeredgewidth=1.6 if ring else 0, clip_on=False)

    def box(self, corner: Point, size: Point, *, ink: str, alpha: float = 1) -> None:
        """Fill a rectangle from its top left corner."""
        box = Rectangle(corner, *size, facecolor=SENTINEL[ink], edgecolor="none", alpha=alpha)
        self._axes.add_patch(box).set_clip_on(False)

    def svg(self) -> str:
        """The sheet as matplotlib writes it."""
        self._figure.set_size_inches(self.width / 72, self.height / 72)
        self._axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        stream = io.StringIO()
        with warnings.catch_warnings():
            # The page's font draws the text; whether matplotlib's own has the glyph is no matter.
            warnings.filterwarnings("ignore", r"Glyph .* missing from")
            self._figure.savefig(stream, format="svg", metadata={"Date": None})
        return stream.getvalue()

    def _write(
        self,
        at: Point,
        text: str,
        anchor: str,
        *,
        size: float,
        ink: str,
        weight: int,
        angle: int = 0,
    ) -> None:
        # Alignments other than the baseline would depend on a font that the page replaces.
        line = self._axes.text(*at, text, fontsize=size, fontweight=weight, va="baseline")
        line.set(ha=anchor, color=SENTINEL[ink], clip_on=False)
        line.set(rotation=angle, rotation_mode="anchor")


def dress_svg(text: str, alt: str, *, width: int) -> str:
    """matplotlib's SVG made fit for a page: themed, described, and without what leaks into it."""
    root = ET.fromstring(text)
    for holder in list(root.iter()):
        for child in list(holder):
            # The <style> that matplotlib writes would restyle every element of the page.
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                holder.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    for element in root.iter():
        _dress_element(element, used)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "class": "pm-figure",
        "viewBox": root.attrib["viewBox"],
        "width": "100%",
        "style": f"max-width:{width}px;stroke-linejoin:round",
        "role": "img",
        "aria-label": alt,
    }
    return ET.tostring(root, encoding="unicode") + "\n"


def _dress_element(element: ET.Element, used: set[str]) -> None:
    """Plain names, colours as variables, the page's font, and no id that nothing refers to."""
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag != "text":
        element.text = None
    plain = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if plain.get("id") not in used:
        plain.pop("id", None)
    if style := plain.get("style"):
        style = re.sub(r"font-family:[^;]*;?\s*", "", style).replace("weight: 700", "weight: 600")
        if NUMBER.fullmatch(element.text or ""):
            style += ";font-variant-numeric:tabular-nums"
        plain["style"] = re.sub(r"#f0..0d", lambda found: VARIABLE[found[0]], style)
    element.attrib = plain


def say_number(value: float) -> str:
    """A value with one decimal, or two where it has them."""
    return f"{value:.2f}".removesuffix("0")


def say_auc(value: float) -> str:
    """An area under the curve."""
    return f"{value:.2f}"


def say_nats(value: float) -> str:
    """A divergence; one too small for three decimals is not written as none."""
    return f"{value:.0e}" if 0 < value < 0.0005 else f"{value:.3f}"


def say_share(value: float) -> str:
    """A share in per cent; what is not all is not rounded up to all."""
    return f"{min(100 * value, 100.0 if value >= 1 else 99.9):.1f}"


def say_tick(value: float) -> str:
    """A tick of an axis."""
    return f"{value:g}".replace("-", "−")


def say_interval(found: Measure, form: Callable[[float], str]) -> str:
    """The 95 % interval in brackets, or nothing."""
    known = found.low is not None and found.high is not None
    return f"[{form(found.low or 0.0)}, {form(found.high or 0.0)}]" if known else ""


def say_measure(found: Measure | None, form: Callable[[float], str]) -> str:
    """A value and its interval."""
    if found is None or found.value is None:
        return "not available"
    return f"{form(found.value)} {say_interval(found, form)}".strip()


@dataclass(frozen=True)
class Scale:
    """A horizontal scale: its ticks, how to write value and tick, a line to read against."""

    ticks: Sequence[float]
    form: Callable[[float], str]
    tick: Callable[[float], str] = say_tick
    line: tuple[float, str] | None = None

    def place(self, value: float, edges: Point) -> float:
        """Where a value stands between two edges, never outside them."""
        low, high = self.ticks[0], self.ticks[-1]
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return edges[0] + share * (edges[1] - edges[0])


SHARES = Scale((0, 0.5, 1), say_share, lambda share: f"{100 * share:g} %")
TENTHS = Scale((0, 0.2, 0.4, 0.6, 0.8, 1), say_number)
HALVES = Scale((0, 0.5, 1), say_number)


def draw_axis(sheet: Sheet, scale: Scale, edges: Point, *, y: float) -> None:
    """Draw a scale at the foot of a panel."""
    sheet.line((edges[0], y), (edges[1], y), ink="muted")
    for tick in scale.ticks:
        x = scale.place(tick, edges)
        sheet.line((x, y), (x, y + 4), ink="muted")
        sheet.note((x, y + 17), scale.tick(tick), "center")


@dataclass(frozen=True)
class Row:
    """A row of a forest plot; without a role it is a heading."""

    label: str
    role: str = ""
    found: Measure | None = None
    note: str = ""

    @property
    def height(self) -> float:
        """Its height on the sheet."""
        return 38 if self.note and self.label else 26


@dataclass(frozen=True)
class Forest:
    """Estimates with their intervals, one a row, labelled on the left and told on the right."""

    title: str
    rows: Sequence[Row]
    scale: Scale
    labels: float

    def draw(self, sheet: Sheet, corner: Point, *, width: float) -> float:
        """Draw it from a corner and return its foot."""
        (x, y), scale = corner, self.scale
        edges = (x + self.labels + 8, x + width - 134)
        if self.title:
            sheet.text((x, y + BODY), self.title, bold=True)
            y += 26
        y += 18 if scale.line else 0
        foot = y + sum(row.height for row in self.rows)
        if scale.line:
            at = scale.place(scale.line[0], edges)
            sheet.note((at, y - 6), scale.line[1], "center")
            sheet.line((at, y), (at, foot), ink="muted")
        for row in self.rows:
            middle = y + row.height / 2
            if self.labels > 40:
                _label_row(sheet, (x, middle), row)
            if row.role:
                _draw_row(sheet, row, scale, edges=edges, y=middle)
            y += row.height
        draw_axis(sheet, scale, edges, y=foot + 2)
        return foot + 24


def _label_row(sheet: Sheet, at: Point, row: Row) -> None:
    x, middle = at
    drop = -2 if row.height > 26 else 4.5
    sheet.text((x, middle + drop), row.label, bold=not row.role)
    sheet.note((x, middle + (13 if row.height > 26 else 4)), row.note)


def _draw_row(sheet: Sheet, row: Row, scale: Scale, *, edges: Point, y: float) -> None:
    found, end = row.found, edges[1] + 48
    sheet.line((edges[0], y), (edges[1], y))
    if found is None or found.value is None:
        sheet.note((end + 6, y + 4), "not available")
        return
    if found.low is not None and found.high is not None:
        low, high = (scale.place(edge, edges) for edge in (found.low, found.high))
        # Taller than the mark, so that an interval narrower than it is seen as well.
        size = (max(high - low, 2.0), 13.0)
        sheet.box(((low + high - size[0]) / 2, y - 6.5), size, ink=row.role, alpha=0.4)
    sheet.marks([(scale.place(found.value, edges), y)], row.role, size=7.5)
    sheet.text((end, y + 4.5), scale.form(found.value), "right")
    sheet.note((end + 6, y + 4), say_interval(found, scale.form))


@dataclass(frozen=True)
class Lane:
    """The values of one class, to be stacked up from a line or down from it."""

    name: str
    values: Sequence[float]
    up: bool


def split_by_truth(pairs: Iterable[tuple[float, int | None]]) -> list[Lane]:
    """Two lanes, truth 1 up and truth 0 down; one lane where there are no labels."""
    pairs = list(pairs)
    if not all(label in (0, 1) for _, label in pairs):
        return [Lane("no labels", [value for value, _ in pairs], True)]
    return [
        Lane(f"truth {truth}", [value for value, label in pairs if label == truth], truth == 1)
        for truth in (1, 0)
    ]


@dataclass(frozen=True)
class Bins:
    """A scale in equal steps between two edges, and how dots are packed into a step."""

    scale: Scale
    edges: Point
    steps: int
    height: float
    pitch: float = 2.0
    rows_a_dot: int = 1

    @property
    def room(self) -> float:
        """Width of a step."""
        return (self.edges[1] - self.edges[0]) / self.steps

    def count(self, values: Iterable[float]) -> list[tuple[float, int]]:
        """How many values fall to each step, by its place on the sheet."""
        shares = (self.scale.place(value, (0.0, 1.0)) for value in values)
        counts = Counter(math.floor(share * self.steps + 0.5) for share in shares)
        return [(self.edges[0] + self.room * step, n) for step, n in sorted(counts.items())]

    def packed(self, lanes: Iterable[Lane]) -> "Bins":
        """The same bins with the largest dots that fit; a dot stands for more rows at need."""
        most = max((n for lane in lanes for _, n in self.count(lane.values)), default=1)
        for rows in (1, 2, 5, 10, 20, 50, 100, 1000, 10**4):
            for pitch in (8.0, 7.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0):
                fit = max(int((self.room - 2) // pitch), 1) * int(self.height // pitch)
                if fit * rows >= most:
                    return replace(self, pitch=pitch, rows_a_dot=rows)._trim(most)
        return self

    def _trim(self, most: int) -> "Bins":
        """No higher than the highest stack, nor lower than the name of a lane."""
        highest = self.stack(most)[-1][1] + self.pitch / 2
        return replace(self, height=max(highest, 24.0))

    def stack(self, count: int) -> list[Point]:
        """Where the dots of a step stand, from its middle and its line."""
        dots, deep = math.ceil(count / self.rows_a_dot), int(self.height // self.pitch)
        wide = math.ceil(dots / deep)
        return [
            ((i % wide - (wide - 1) / 2) * self.pitch, (i // wide + 0.5) * self.pitch)
            for i in range(dots)
        ]

    def tell(self) -> str:
        """What a dot stands for."""
        return "a dot is a row" if self.rows_a_dot == 1 else f"a dot: up to {self.rows_a_dot} rows"


@dataclass(frozen=True)
class Strip:
    """One quantity of one system as dots, split by truth."""

    title: str
    told: str
    role: str
    lanes: Sequence[Lane]
    bins: Bins
    unit: str = ""
    counted: bool = False

    def draw(self, sheet: Sheet, corner: Point) -> float:
        """Draw it from a corner, its scale below where it has a unit, and return its foot."""
        (x, top), room = corner, 14.0 if self.counted else 0.0
        bins = replace(self.bins, edges=(self.bins.edges[0] + x, self.bins.edges[1] + x))
        edge = bins.edges[1] + 10
        sheet.text((x, top + BODY), self.title, bold=True)
        sheet.text((edge, top + BODY), self.told, "right")
        if any(lane.values for lane in self.lanes):
            y = top + 26 + room + bins.height
            sheet.line((x, y), (edge, y), ink="muted")
            for lane in self.lanes:
                sheet.note((x, y + (-7 if lane.up else 15)), lane.name)
                self._stack(sheet, lane, bins, y=y)
            top = y + (bins.height + room if len(self.lanes) > 1 else 0) - 18
        if not self.unit:
            return top + 24
        draw_axis(sheet, bins.scale, bins.edges, y=top + 26)
        sheet.note((edge, top + 60), self.unit, "right")
        return top + 66

    def _stack(self, sheet: Sheet, lane: Lane, bins: Bins, *, y: float) -> None:
        sign = -1 if lane.up else 1
        for x, count in bins.count(lane.values):
            dots = bins.stack(count)
            points = [(x + along, y + sign * (rise + 2)) for along, rise in dots]
            sheet.marks(points, self.role, size=bins.pitch * 0.86)
            if self.counted:
                end = y + sign * (dots[-1][1] + bins.pitch / 2 + 5)
                sheet.note((x, end + (0 if lane.up else 9)), str(count), "center")


class NotDrawable(Exception):
    """These records do not hold what a figure shows; the message says what is absent."""


@dataclass(frozen=True)
class Source:
    """What the figures draw from: record files by notebook, and the case."""

    files: Mapping[str, RecordFile]
    case: Case

    def answers(self, stem: str, prompt: str, system: str = "") -> list[Prediction]:
        """The predictions of one system on a prompt, the first system's without a name."""
        found = self.files[stem].of(Prediction) if stem in self.files else []
        asked = [p for p in found if p.prompt == prompt]
        name = system or (asked[0].system if asked else "")
        return [p for p in asked if p.system == name]

    def measures(self, stem: str) -> dict[str, Measure]:
        """A notebook's measures that have a value, by key."""
        if stem not in self.files:
            raise NotDrawable(f"no records of the notebook {stem}")
        return {m.key: m for m in self.files[stem].of(Measure) if m.value is not None}


REPLAY, DIAGNOSIS = "replay", "diagnosis"
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


# Where a figure finds a kept record among the record files: this and the profile's name.
KEPT = "kept."
READS = {
    "asked Yes or No": "yes_no.{}.auc_yes_no",
    "number, log-odds": "v2.{}.auc_number",
    "number, written": "v2.{}.auc_decoded",
}
KEPT_SYSTEMS = {"base": "base alone", "suspect": "yes/no adapter", "reference": "numeric adapter"}


def draw_real_models(sheet: Sheet, source: Source) -> str:
    """How well each system of each kept run ranks the generated posts, by each read-out."""
    rows: list[Row] = []
    stems = sorted(name for name in source.files if name.startswith(KEPT))
    for stem in stems:
        measures = source.measures(stem)
        for system, title in KEPT_SYSTEMS.items():
            found = {read: measures.get(key.format(system)) for read, key in READS.items()}
            if any(found.values()):
                rows.append(Row(f"{stem.removeprefix(KEPT)}, {title}"))
                rows += [Row(read, system, measure) for read, measure in found.items()]
    if not rows:
        lack = "the rows of the runs on record have no labels of both classes"
        raise NotDrawable(lack if stems else "no run on a real model is on record")
    scale = Scale((0, 0.5, 1), say_auc, line=(0.5, "chance"))
    labels = 106.0 if sheet.narrow else 150.0
    foot = Forest("", rows, scale, labels).draw(sheet, (0, 0), width=sheet.width)
    sheet.note(
        ((labels + 8 + sheet.width - 134) / 2, foot + 12), "area under the ROC curve", "center"
    )
    sheet.height = foot + 18
    told = [
        f"{row.label} {say_measure(row.found, scale.form)};" if row.role else f"{row.label}:"
        for row in rows
    ]
    return " ".join(["Area under the ROC curve with 95 % intervals.", *told])


ATTRIBUTION, PREFIX = "attribution", "membership.example."
ROLES = {"the adapter": "suspect"}
# Harm beyond this share of the greatest gain stands at the edge of the scale, told by its number.
HARM = 0.5


def draw_attribution(sheet: Sheet, source: Source) -> str:
    """By how much an adapter and each of its controls lower the loss, base by base."""
    found = {
        key.removeprefix(PREFIX): measure
        for key, measure in source.measures(ATTRIBUTION).items()
        if key.startswith(PREFIX)
    }
    if not found:
        raise NotDrawable("no adapter was tried on several bases")
    groups: dict[str, dict[str, Measure]] = {}
    for key, measure in found.items():
        base, _, name = key.rpartition(".")
        groups.setdefault(base, {})[name] = measure
    rows: list[Row] = []
    for base, gains in groups.items():
        rows += [Row(base), *(Row(n, ROLES.get(n, "base"), m) for n, m in gains.items())]
    highest = max(measure.high or measure.value or 0.0 for measure in found.values())
    lowest = min(measure.low or measure.value or 0.0 for measure in found.values())
    top = max(highest, 0.01)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(max(min(lowest, 0), -HARM * top), top)
    scale = Scale([float(tick) for tick in ticks], say_gain, line=(0.0, "adapter off"))
    labels = 126.0 if sheet.narrow else 150.0
    forest = Forest("Gain in nat a token", rows, scale, labels)
    sheet.height = forest.draw(sheet, (0, 2), width=sheet.width)
    parts = [
        f"{row.label}:" if not row.role else f"{row.label} {say_measure(row.found, say_gain)};"
        for row in rows
    ]
    return " ".join([f"{forest.title}, with 95 % intervals.", *parts])


def say_gain(value: float) -> str:
    """A gain with two decimals and a true minus sign."""
    return f"{value:z.2f}".replace("-", "−")


WIDE, NARROW = 720, 350
SHOWN = 10  # the rows shown one by one: as many as the incident had
V1, V2, MISMATCH, SWAP = "v1", "v2", "shape_mismatch", "adapter_swap"
CONTROLS, SUITE = "controls", "suite"
ENSEMBLES = ("ensemble of the kept", "ensemble by the write-up", "ensemble of all")
SYSTEMS = {"base": "base alone", "suspect": "suspect", "reference": "reference"}
ABSENT = "not available in this profile"
FORENSICS = "files"
NOT_CHANCES = "Chances of rivals sum to at most 100 %: these are not probabilities."
LOG_ODDS = "number_log_odds"
NO_LABELS = "the rows came without labels"
GUTTER = 24.0  # between columns
SETTINGS = {"svg.fonttype": "none", "text.parse_math": False}
# Draws a figure on a sheet and returns its text for those who do not see it.
Draw = Callable[[Sheet, Source], str]


@dataclass(frozen=True)
class Drawing:
    """A figure: its text for those who do not see it, and the SVG for a page and a phone."""

    name: str
    alt: str
    wide: str
    narrow: str


def draw_all(
    files: Mapping[str, RecordFile], case: Case, figures: Mapping[str, Draw] | None = None
) -> tuple[list[Drawing], dict[str, str]]:
    """Draw each figure that these records allow; say of each other one why not, by its name."""
    source, drawings, reasons = Source(files, case), [], {}
    for name, draw in (FIGURES if figures is None else figures).items():
        try:
            drawings.append(_draw_figure(name, draw, source))
        except NotDrawable as reason:
            reasons[name] = str(reason)
    return drawings, reasons


def _draw_figure(name: str, draw: Draw, source: Source) -> Drawing:
    texts, alt = {}, ""
    for width in (WIDE, NARROW):
        # Ids are hashes of what they name and the salt: they differ between figures of one page.
        settings = {**SETTINGS, "svg.hashsalt": f"{name}{width}"}
        with matplotlib.style.context(["default", settings]):
            sheet = Sheet(width)
            alt = draw(sheet, source)
            texts[width] = dress_svg(sheet.svg(), alt, width=width)
    return Drawing(name, alt, texts[WIDE], texts[NARROW])


def save_drawings(
    drawings: Iterable[Drawing], reasons: Mapping[str, str], folder: str | Path
) -> None:
    """Write each drawing's two files, and the alternative texts and reasons beside them."""
    folder, alts = Path(folder), {}
    for drawing in drawings:
        write_text(folder / f"{drawing.name}.wide.svg", drawing.wide)
        write_text(folder / f"{drawing.name}.narrow.svg", drawing.narrow)
        alts[drawing.name] = drawing.alt
    text = json.dumps({"alt": alts, "missing": dict(reasons)}, indent=2, ensure_ascii=False)
    write_text(folder / "figures.json", text + "\n")


def role_of(system: str) -> str:
    """The role whose colour and mark a system takes; an adapter under test is the suspect."""
    role = system.removesuffix("_disabled").removesuffix("_adapter").removesuffix("_base")
    if role in ("base", "suspect", "reference", "donor"):
        return role
    return "base" if system.endswith("_base") else "suspect"


def round_ticks(low: float, high: float) -> list[float]:
    """Round ticks that cover a range, also an empty one."""
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    return [float(tick) for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)]


@dataclass(frozen=True)
class Band:
    """One system's values on the hero's rows; none at all where it is not available."""

    name: str
    role: str
    values: Sequence[float | None]
    told: str


def draw_hero(sheet: Sheet, source: Source) -> str:
    """The first rows as columns; truth, both runs, base, suspect and reference as bands."""
    shown = source.answers(SWAP, "v2")[:SHOWN]
    if not shown:
        raise NotDrawable(f"no answers to the prompt v2 in {SWAP}")
    return draw_columns(sheet, shown, _make_bands(source, shown))


def draw_columns(sheet: Sheet, shown: Sequence[Prediction], bands: Sequence[Band]) -> str:
    """Rows as columns, shaded where the truth is 1, each band's values one below the other."""
    left, pitch = (112.0, 60.0) if sheet.narrow else (148.0, 50.0)
    step, foot = (sheet.width - 2 - left) / len(shown), 4 + pitch * len(bands)
    xs = [left + step * (index + 0.5) for index in range(len(shown))]
    for x, row in zip(xs, shown, strict=True):
        if row.label == 1:
            sheet.box((x - step / 2, 0), (step, foot), ink="rule", alpha=0.35)
    for index, band in enumerate(bands):
        draw_band(sheet, band, xs, left=left, top=14 + index * pitch)
    sheet.height = label_columns(sheet, [row.row_id for row in shown], xs, y=foot + 16)
    told = " ".join(f"{band.name}: {band.told}." for band in bands)
    return f"The first {len(shown)} rows as columns, values from 0 to 1. {told}"


def _make_bands(source: Source, shown: Sequence[Prediction]) -> list[Band]:
    labels = [row.label for row in shown]
    known = [label for label in labels if label is not None]
    told = f"{sum(known)} of {len(known)} are 1 (shaded)" if known else "no labels"
    runs = [("v1 run", V1, "v1", ""), ("v2 run", V2, "v2", "")]
    swaps = [(name, SWAP, "v2", system) for system, name in SYSTEMS.items()]
    return [
        Band("truth", "truth", labels if known else [], told),
        *(_make_band(name, source.answers(*key), shown) for name, *key in runs + swaps),
    ]


def _make_band(name: str, answers: Sequence[Prediction], shown: Sequence[Prediction]) -> Band:
    by_row = {p.row_id: p.value for p in answers}
    values = [by_row.get(row.row_id) for row in shown]
    found = sorted({value for value in values if value is not None})
    if not found:
        return Band(name, "base", [], ABSENT)
    who = f"{clean(answers[0].system, 12)}, " if name.endswith("run") else ""
    told = f"{len(found)} values" if len(found) > 1 else f"all {say_number(found[0])}"
    return Band(name, role_of(answers[0].system), values, who + told)


def draw_band(sheet: Sheet, band: Band, xs: Sequence[float], *, left: float, top: float) -> None:
    """Draw a system's values as a line over the columns, named on the left."""
    foot, height = top + 36, 36
    sheet.text((0, top + 17), band.name, bold=True)
    if not band.values:
        sheet.note(((left + sheet.width) / 2, top + 22), band.told, "center")
        return
    for index, line in enumerate(textwrap.wrap(band.told, 17 if sheet.narrow else 24)):
        sheet.note((0, top + 32 + 13 * index), line)
    sheet.line((left, foot), (sheet.width - 2, foot))
    for value in (0, 1):
        sheet.note((left - 6, foot - value * height + 4), str(value), "right")
    points = [
        (x, foot - min(max(value, 0.0), 1.0) * height)
        for x, value in zip(xs, band.values, strict=True)
        if value is not None
    ]
    sheet.line(*points, ink=band.role, width=1.3)
    sheet.marks(points, band.role, size=8.5)


def label_columns(sheet: Sheet, ids: Sequence[str], xs: Sequence[float], *, y: float) -> float:
    """Row ids under their columns where they fit, else their places and the ids' range."""
    names, step = [clean(name, 40) for name in ids], 2 * (sheet.width - 2 - xs[-1])
    fit = max(map(len, names)) * 6.8 < step - 4
    for index, (x, name) in enumerate(zip(xs, names, strict=True), 1):
        sheet.note((x, y), name if fit else str(index), "center")
    if fit:
        sheet.note((0, y), "row")
        return y + 8
    ends = [clean(name, 16) for name in (names[0], names[-1])]
    sheet.note((sheet.width - 2, y + 17), f"rows {ends[0]} to {ends[1]}", "right")
    return y + 24


def draw_stages(sheet: Sheet, source: Source) -> str:
    """Share of rows by parser stage, and what the strict parser reads, for both attempts."""
    corner, told, foot = (0.0, 2.0), "Share of rows in per cent.", 0.0
    for stem, name in ((V1, "v1"), (V2, "v2")):
        rows = _list_stages(source, stem, name)
        attempt = source.case.attempts.get(name)
        title = f"{clean(attempt.title, 40)} ({name})" if attempt else name
        foot = Forest(title, rows, SHARES, 92).draw(sheet, corner, width=sheet.panel)
        corner, told = sheet.beside(foot, top=2.0), f"{told} {title}: {_tell_rows(rows, SHARES)}."
    sheet.height = foot
    return told


def _list_stages(source: Source, stem: str, name: str) -> list[Row]:
    measures, answers, prefix = source.measures(stem), source.answers(stem, name), f"{name}.stage."
    if not answers:
        raise NotDrawable(f"no answers to the prompt {name} in {stem}")
    role = role_of(answers[0].system)
    stages = [key for key in measures if key.startswith(prefix)]
    return [
        Row("", note="the parser as written"),
        *(Row(key.removeprefix(prefix), role, measures[key]) for key in stages),
        Row("", note="a strict parser"),
        Row("whole answer", role, measures.get(f"{name}.parsed_strict")),
    ]


def _tell_rows(rows: Sequence[Row], scale: Scale) -> str:
    told = [f"{row.label} {say_measure(row.found, scale.form)}" for row in rows if row.role]
    return "; ".join(told)


def draw_says_and_knows(sheet: Sheet, source: Source) -> str:
    """What a system writes, and the log-odds behind it, by truth."""
    stem, key, answers = _find_speaker(source)
    if any(p.label is None for p in answers):
        raise NotDrawable(NO_LABELS)
    measures, system = source.measures(stem), answers[0].system
    odds = [p.number_log_odds for p in answers if p.number_log_odds is not None]
    says = Bins(TENTHS, (58, sheet.panel - 10), 10, height=84)
    knows = Bins(Scale(round_ticks(min(odds), max(odds)), say_number), says.edges, 24, height=84)
    strips = [
        _make_strip("What it writes", answers, "value", says, measures.get(f"{key}.auc_decoded")),
        _make_strip("What it knows", answers, LOG_ODDS, knows, measures.get(f"{key}.auc_number")),
    ]
    name = f"{SYSTEMS.get(system, clean(system, 20))}, prompt v2, {len(answers)} rows"
    _key(sheet, (0, 0), role_of(system), name)
    height, corner = max(strip.bins.height for strip in strips), (0.0, 32.0)
    for strip in strips:
        level = replace(strip, bins=replace(strip.bins, height=height))
        sheet.height = level.draw(sheet, corner)
        corner = sheet.beside(sheet.height, top=32.0)
    told = [f"{strip.title}: {strip.told}." for strip in strips]
    distinct = len({p.value for p in answers})
    return f"{name}, {distinct} written value(s). {' '.join(told)}"


def _make_strip(
    title: str, answers: Sequence[Prediction], field: str, bins: Bins, found: Measure | None
) -> Strip:
    lanes = split_by_truth((getattr(p, field), p.label) for p in answers)
    packed = bins.packed(lanes)
    unit = "log-odds of the number" if field == LOG_ODDS else "number written"
    told, unit = f"AUC {say_measure(found, say_auc)}", f"{unit}; {packed.tell()}"
    return Strip(title, told, role_of(answers[0].system), lanes, packed, unit)


def _find_speaker(source: Source) -> tuple[str, str, list[Prediction]]:
    """The base where the swap has it, else the system of the second run."""
    if answers := source.answers(SWAP, "v2", "base"):
        return SWAP, "swap.base.v2", answers
    if answers := source.answers(V2, "v2"):
        return V2, "v2", answers
    raise NotDrawable("no answers to the prompt v2")


def draw_swap_values(sheet: Sheet, source: Source) -> str:
    """How often each number is written, by system and truth."""
    answers = {system: source.answers(SWAP, "v2", system) for system in SYSTEMS}
    if not any(answers.values()):
        raise NotDrawable(f"no answers to the prompt v2 in {SWAP}")
    lanes = {
        key: split_by_truth((p.value, p.label) for p in some if p.value is not None)
        for key, some in answers.items()
    }
    edges = (84.0 if sheet.narrow else 100.0, sheet.width - 12.0)
    bins = Bins(TENTHS, edges, 10, height=54.0 if sheet.narrow else 44.0)
    bins = bins.packed(lane for some in lanes.values() for lane in some)
    unit = f"number written, nearest tenth; {bins.tell()}"
    foot, told = 2.0, "Written numbers, counted by truth."
    for system, name in SYSTEMS.items():
        found = {p.value for p in answers[system]}
        words = "one value" if len(found) == 1 else f"{len(found)} values" if found else ABSENT
        last = unit if system == "reference" else ""
        strip = Strip(name, words, role_of(system), lanes[system], bins, last, counted=True)
        foot, told = strip.draw(sheet, (0.0, foot)) + 14, f"{told} {name}: {words}."
    sheet.height = foot - 12
    return told


def draw_swap_auc(sheet: Sheet, source: Source) -> str:
    """How well each read-out of each system ranks the rows, against chance."""
    measures, rows = source.measures(SWAP), []
    reads = {"written number": "v2.auc_decoded", "number log-odds": "v2.auc_number"}
    reads["Yes–No log-odds"] = "yes_no.auc_yes_no"
    for system, name in SYSTEMS.items():
        found = {read: measures.get(f"swap.{system}.{key}") for read, key in reads.items()}
        rows += [Row(name), *(Row(read, system, m) for read, m in found.items())]
    if not any(row.found for row in rows):
        raise NotDrawable(f"{NO_LABELS}, or with one class only")
    scale = Scale((0, 0.5, 1), say_auc, line=(0.5, "chance"))
    labels = 106.0 if sheet.narrow else 150.0
    foot = Forest("", rows, scale, labels).draw(sheet, (0, 0), width=sheet.width)
    middle = (labels + 8 + sheet.width - 134) / 2
    sheet.note((middle, foot + 12), "area under the ROC curve", "center")
    sheet.height = foot + 18
    parts = [
        f"{SYSTEMS[s]}: {_tell_rows([r for r in rows if r.role == s], scale)}." for s in SYSTEMS
    ]
    return " ".join(["Area under the ROC curve with 95 % intervals.", *parts])


REFITS = (
    ("healthy", "reference", "reference", "fits its base"),
    ("ignored", "donor", "donor, ignored", "misfits left out"),
    ("truncated", "donor", "donor, truncated", "cut to the base"),
    ("padded", "reference", "reference, padded", "on the donor’s base"),
)


def draw_refits(sheet: Sheet, source: Source) -> str:
    """How far a healthy and a mismatched adapter move their base, and what changes in writing."""
    measures = source.measures(MISMATCH)

    def list_rows(effect: str) -> list[Row]:
        found = {key: measures.get(f"mismatch.{key}.{effect}") for key, *_ in REFITS}
        return [Row(label, role, found[key], note) for key, role, label, note in REFITS]

    moved, changed = list_rows("kl"), list_rows("flips")
    if not any(row.found for row in moved):
        raise NotDrawable(f"donor or reference {ABSENT}")
    highest = max(row.found.high or row.found.value or 0.0 for row in moved if row.found)
    nats = Scale(round_ticks(0, max(highest, 0.01)), say_nats, line=(0, "no change"))
    shares = replace(SHARES, line=(0, "no change"))
    kl = Forest("KL to its base alone, in nat", moved, nats, 118)
    flips = Forest("Written values that change", changed, shares, 118 if sheet.narrow else 26)
    width = sheet.width if sheet.narrow else 400.0
    foot = kl.draw(sheet, (0, 2), width=width)
    corner = (0.0, foot + 20) if sheet.narrow else (width + 14, 2.0)
    sheet.height = flips.draw(sheet, corner, width=sheet.width - corner[0])
    told = [f"{part.title}: {_tell_rows(part.rows, part.scale)}." for part in (kl, flips)]
    return " ".join(told)


def draw_controls_auc(sheet: Sheet, source: Source) -> str:
    """How well each system ranks the rows: the base alone, and each adapter off and on."""
    measures = source.measures(CONTROLS)

    def list_rows(prompt: str, read: str) -> list[Row]:
        found = {state: measures.get(f"controls.{state}.{prompt}.{read}") for state in STATES}
        rows = [Row(STATES[state], role_of(state), m) for state, m in found.items() if m]
        return [Row(f"prompt {prompt.replace('_', '/')}"), *rows] if rows else []

    prompts = {"v1": "auc_number", "v2": "auc_number", "yes_no": "auc_yes_no"}
    written = [row for prompt in prompts for row in list_rows(prompt, "auc_decoded")]
    odds = [row for prompt, read in prompts.items() for row in list_rows(prompt, read)]
    if not written:
        raise NotDrawable(f"{NO_LABELS}, or with one class only")
    scale = Scale((0, 0.5, 1), say_auc, line=(0.5, "chance"))
    parts = [
        Forest("AUC of what is written", written, scale, 104),
        Forest("AUC of the log-odds", odds, scale, 104 if sheet.narrow else 26),
    ]
    width = sheet.width if sheet.narrow else 394.0
    foot = parts[0].draw(sheet, (0, 2), width=width)
    corner = (0.0, foot + 20) if sheet.narrow else (width + 14, 2.0)
    sheet.height = parts[1].draw(sheet, corner, width=sheet.width - corner[0])
    told = [f"{part.title}: {tell_blocks(part.rows, scale)}." for part in parts]
    return " ".join([*told, "With 95 % intervals."])


def tell_blocks(rows: Sequence[Row], scale: Scale) -> str:
    """Rows in words, each block after its heading."""
    told = [
        f"{row.label} {say_measure(row.found, scale.form)}" if row.role else f"{row.label}:"
        for row in rows
    ]
    return "; ".join(told).replace(":;", ":")


def draw_suite(sheet: Sheet, source: Source) -> str:
    """How well the log-odds of each adapter rank the rows, by what the suite makes of it."""
    measures, groups = source.measures(SUITE), list_suite(source)
    rows = [Row("base alone", "base", measures.get("suite.auc.base alone"))]
    for word, names in groups.items():
        found = [(name, measures.get(f"suite.auc.{name}")) for name in names]
        shown = [Row(clean(name, 22), role_of(name), m) for name, m in found if m]
        rows += [Row(word), *shown] if shown else []
    if len(rows) < 2:
        raise NotDrawable(f"adapters {ABSENT}, or {NO_LABELS}")
    ensembles = [name for name in ENSEMBLES if f"suite.auc.{name}" in measures]
    rows += [Row("ensembles")] if ensembles else []
    rows += [
        Row(name.removeprefix("ensemble "), "ink", measures[f"suite.auc.{name}"])
        for name in ensembles
    ]
    scale = Scale((0, 0.5, 1), say_auc, line=(0.5, "chance"))
    forest = Forest("AUC of the log-odds", rows, scale, 132)
    sheet.height = forest.draw(sheet, (0, 2), width=sheet.width)
    return f"{forest.title}, with 95 % intervals: {tell_blocks(rows, scale)}."


def list_suite(source: Source) -> dict[str, list[str]]:
    """The names of the suite's adapters by their verdict, in the order of the table."""
    tables = source.files[SUITE].of(Table)
    found = next((t for t in tables if t.key == "suite.adapters"), None)
    if found is None or "verdict" not in found.columns:
        return {}
    at = found.columns.index("verdict")
    words = ("kept", "cannot tell", "dropped")
    return {word: [str(row[0]) for row in found.rows if row[at] == word] for word in words}


KINDS = {"speaking_base": "speaking base", "base": "base alone", "ignorant_base": "ignorant base"}


def draw_kinds(sheet: Sheet, source: Source) -> str:
    """Three bases side by side: what each writes, and how its log-odds order the rows."""
    measures = source.measures(CONTROLS)
    answers = {kind: source.answers(CONTROLS, "v2", kind) for kind in KINDS}
    if not all(answers.values()):
        raise NotDrawable(f"a base that says what it knows, or one that does not know, {ABSENT}")
    if any(p.label is None for found in answers.values() for p in found):
        raise NotDrawable(NO_LABELS)
    words = {v.key: v.verdict for v in source.files[CONTROLS].of(Verdict)}
    width = sheet.width if sheet.narrow else (sheet.width - 2 * GUTTER) / len(KINDS)
    fields = {"Writes": "value", "Log-odds": LOG_ODDS}
    bins = {field: _share_bins(answers.values(), field, width=width) for field in fields.values()}
    (left, top), told = (0.0, 0.0), []
    for kind, found in answers.items():
        key = f"controls.{kind}.v2"
        _key(sheet, (left, top), "base", KINDS[kind])
        sheet.note((left + 16, top + 30), words[f"{key}.knowing"])
        y, said = top + 44, []
        for (title, field), read in zip(fields.items(), ("decoded", "number"), strict=True):
            lanes = split_by_truth((getattr(p, field), p.label) for p in found)
            said.append(f"AUC {say_measure(measures.get(f'{key}.auc_{read}'), say_auc)}")
            unit = f"{'log-odds' if field == LOG_ODDS else 'number'}; {bins[field].tell()}"
            strip = Strip(title, said[-1], "base", lanes, bins[field], unit)
            y = strip.draw(sheet, (left, y)) + 12
        told.append(f"{KINDS[kind]}, {words[f'{key}.knowing']}: writes {said[0]}, holds {said[1]}.")
        sheet.height = y - 10
        left, top = (0.0, y + 10) if sheet.narrow else (left + width + GUTTER, 0.0)
    return " ".join(["Three bases under the prompt v2, by truth.", *told])


def _share_bins(answers: Iterable[Sequence[Prediction]], field: str, *, width: float) -> Bins:
    """One scale and one packing for several systems, so that their heights compare."""
    groups = [[(getattr(p, field), p.label) for p in found] for found in answers]
    values = [value for pairs in groups for value, _ in pairs]
    scale = HALVES if field == "value" else Scale(round_ticks(min(values), max(values)), say_number)
    bins = Bins(scale, (52.0, width - 12), 10 if field == "value" else 20, height=72)
    return bins.packed(lane for pairs in groups for lane in split_by_truth(pairs))


@dataclass(frozen=True)
class Module:
    """Sizes of one projection's LoRA pair, (out, in), on the base and in the donor's adapter."""

    name: str
    rank: int
    base: tuple[int, int]
    donor: tuple[int, int]


def read_modules(table: Table, names: Sequence[str]) -> list[Module]:
    """The sizes of the named projections from a table of tensor shapes."""
    shapes = {
        ".".join(str(row[0]).split(".")[-2:]): (_read_shape(row[1]), _read_shape(row[2]))
        for row in table.rows
    }
    modules = []
    for name in names:
        downs, ups = shapes.get(f"{name}.lora_A"), shapes.get(f"{name}.lora_B")
        if downs and ups:
            base, donor = ((up[0], down[1]) for down, up in zip(downs, ups, strict=True))
            modules.append(Module(name, downs[0][0], base, donor))
    return modules


def _read_shape(cell: object) -> tuple[int, int]:
    rows, columns = str(cell).split("×")
    return int(rows), int(columns)


def draw_shapes(sheet: Sheet, source: Source) -> str:
    """LoRA pairs of two projections on the base and in the donor's adapter, to scale."""
    source.measures(MISMATCH)
    tables = [t for t in source.files[MISMATCH].of(Table) if t.key.endswith(".shapes")]
    modules = read_modules(tables[0], ("q_proj", "v_proj")) if tables else []
    if not modules:
        raise NotDrawable(f"no table of shapes in {MISMATCH}")
    base, donor = _name_sizes(source.case, tables[0].key.split(".")[1])
    unit = 348 / max(max(*m.base, *m.donor) for m in modules)
    _key(sheet, (0.0, 0.0), "base", base)
    _key(sheet, (0.0, 22.0) if sheet.narrow else (376.0, 0.0), "donor", f"adapter for {donor}")
    top = 56.0 if sheet.narrow else 36.0
    corner, feet = (0.0, top), []
    for module in modules:
        feet.append(_draw_module(sheet, corner, module, unit=unit))
        corner = sheet.beside(feet[-1], top=top)
    told = _tell_fit(tables[0], modules)
    x, y = (0.0, feet[-1] + 26) if sheet.narrow else (376.0, feet[-1] + 50)
    for index, line in enumerate(told):
        sheet.text((x, y + 19 * index), line, bold=index == 0)
    sheet.height = max(feet[0], y + 19 * len(told) - 8)
    sizes = [f"{m.name} {m.base[0]}×{m.base[1]} and {m.donor[0]}×{m.donor[1]}" for m in modules]
    return f"{base} and an adapter for {donor}, out × in: {', '.join(sizes)}. {'. '.join(told)}."


def _key(sheet: Sheet, corner: Point, role: str, text: str) -> None:
    sheet.marks([(corner[0] + 5, corner[1] + 9)], role, size=9)
    sheet.text((corner[0] + 16, corner[1] + 13.5), text)


def _tell_fit(table: Table, modules: Sequence[Module]) -> list[str]:
    fitting = sum(row[-1] == "yes" for row in table.rows)
    oblong = [m for m in modules if m.base[0] != m.base[1]]
    return [
        f"{fitting} of the {len(table.rows)} LoRA tensors of a layer fit",
        *(f"{m.name} is not square: {m.base[1]} in, {m.base[0]} out" for m in oblong),
        f"Lengths to one scale; the rank, {modules[0].rank}, is not",
    ]


def _name_sizes(case: Case, slug: str) -> tuple[str, str]:
    """Names of the base and of the donor that a record's key stands for."""
    size = case.true_size
    names = [name.rpartition("/")[2] for name in size.donors] if size else []
    donor = next((n for n in names if n.lower().replace(".", "_") == slug), slug)
    return clean(size.base.rpartition("/")[2] if size else "base", 30), clean(donor, 30)


def _draw_module(sheet: Sheet, corner: Point, module: Module, *, unit: float) -> float:
    """Draw lora_A along the top and lora_B down the side of the weight that they add to."""
    x, y, thick = *corner, 6.0
    sheet.text((x, y + BODY), module.name, bold=True)
    left, top = x + 36, y + 58
    for away, role, (out, into) in ((28, "donor", module.donor), (12, "base", module.base)):
        width, height = into * unit, out * unit
        sheet.box((left, top), (width, height), ink=role, alpha=0.14)
        sheet.box((left, top - away), (width, thick), ink=role)
        sheet.box((left - away, top), (thick, height), ink=role)
        label = f"lora_A {module.rank}×{into}"
        sheet.note((left + width + 6, top - away + 7), label, ink="ink")
        sheet.note((left + 5, top + height + 14), f"lora_B {out}×{module.rank}", ink="ink")
    return top + max(module.base[0], module.donor[0]) * unit + 20


def draw_confidences(sheet: Sheet, source: Source) -> str:
    """The write-up's confidences, first and last, with the sums that no chances of rivals have."""
    held = [h for h in source.case.hypotheses if h.initial is not None or h.final is not None]
    if not held:
        raise NotDrawable("no hypothesis of the case has a confidence")
    ends = {"initial": 92.0, "final": 258.0 if sheet.narrow else 384.0}
    highest = max(max(h.initial or 0, h.final or 0) for h in held) or 1.0
    places = {h.id: [214 - 178 * (s or 0) / highest for s in (h.initial, h.final)] for h in held}
    for h in held:
        shares = zip(ends.values(), places[h.id], (h.initial, h.final), strict=True)
        points = [(x, y) for x, y, share in shares if share is not None]
        sheet.line(*points, ink="ink", width=1.6)
        sheet.marks(points, "ink", size=7)
    for side, (name, x) in enumerate(ends.items()):
        _label_end(sheet, held, name, x=x, places={id_: ys[side] for id_, ys in places.items()})
    sums = [sum(getattr(h, name) or 0 for h in held) for name in ends]
    sheet.height = 262.0
    for h in held if sheet.narrow else []:
        sheet.note((0, sheet.height + 10), f"{h.id}  {clean(h.title, 54)}")
        sheet.height += 17
    lines = textwrap.wrap(NOT_CHANCES, sheet.width // 7) if max(sums) > 100 else []
    for line in lines:
        sheet.text((0, sheet.height + 20), line)
        sheet.height += 19
    sheet.height += 6
    told = ", ".join(f"{h.id} {h.initial or 0:g} to {h.final or 0:g}" for h in held)
    return f"Confidences in per cent: {told}. They sum to {sums[0]:g}, then to {sums[1]:g}."


def _label_end(
    sheet: Sheet, held: Sequence[Hypothesis], name: str, *, x: float, places: Mapping[str, float]
) -> None:
    """Label one end of the slopes, pushed apart where labels would overlap, and sum it up."""
    right, last = name == "final", -math.inf
    anchor, at, titled = *(("left", x + 12) if right else ("right", x - 12)), right
    titled = right and not sheet.narrow
    known = [h for h in held if getattr(h, name) is not None]
    for h in sorted(known, key=lambda h: places[h.id]):
        last = max(places[h.id], last + (34 if titled else 18))
        share = f"{getattr(h, name):g} %"
        sheet.text((at, last + 4.5), f"{share}  {h.id}" if right else f"{h.id}  {share}", anchor)
        if titled:
            sheet.note((at, last + 19), clean(h.title, 56))
    total = sum(getattr(h, name) for h in known)
    sheet.note((at, 12), name, anchor)
    sheet.line((at, 236), (at + (76 if right else -76), 236), ink="muted")
    sheet.text((at, 254), f"sum {total:g} %", anchor, bold=True)


def draw_row_time(sheet: Sheet, source: Source) -> str:
    """Time of each row against its prompt's tokens, up to the limit, and what reading leaves."""
    measures, rows = source.measures(FORENSICS), _list_row_times(source)
    slope = measures.get("forensics.timing.per_token")
    rest = measures.get("forensics.timing.beside_reading")
    if not rows or slope is None or rest is None:
        raise NotDrawable("no log on record that times at least five rows")
    limit = float(measures["forensics.prompt_limit"].value or 0)
    (warm, slow), *later = rows
    across = Scale(round_ticks(0, max(limit, *(tokens for tokens, _ in rows))), say_tick)
    up = Scale(round_ticks(0, max(seconds for _, seconds in later)), say_number)
    left, foot = (36.0, sheet.width - 14.0), (282.0, 36.0)

    def place(tokens: float, seconds: float) -> Point:
        return across.place(tokens, left), up.place(seconds, foot)

    sheet.text((0, BODY), "Seconds a row", bold=True)
    for tick in up.ticks:
        sheet.note((left[0] - 9, up.place(tick, foot) + 4), up.form(tick), "right")
        sheet.line((left[0] - 4, up.place(tick, foot)), place(0, tick), ink="muted")
    sheet.line(place(0, 0), place(0, up.ticks[-1]), ink="muted")
    draw_axis(sheet, across, left, y=foot[0])
    sheet.note((left[1], foot[0] + 36), "tokens in the prompt", "right")
    sheet.line((place(limit, 0)[0], 30), place(limit, 0), ink="ink", width=1.4)
    sheet.note((place(limit, 0)[0] - 6, 28), f"limit {limit:g}", "right", ink="ink")
    _draw_trend(sheet, place, slope=slope, rest=rest, end=max(tokens for tokens, _ in later))
    sheet.marks([place(*row) for row in later], "suspect", size=8.5)
    sheet.marks([place(warm, up.ticks[-1])], "truth", size=8.5)
    note = f"first row: {slow:.1f} s, above the scale"
    sheet.note((place(warm, 0)[0] - 10, foot[1] + 4), note, "right")
    sheet.height = foot[0] + 42
    told = "; ".join(f"{tokens:g} tokens {seconds:.2f} s" for tokens, seconds in later)
    return (
        f"Seconds a row against tokens in its prompt, limit {limit:g}. First row, {warm:g} tokens: "
        f"{slow:.1f} s. Then {told}. Beside reading, {_say_rest(rest)} are left."
    )


def _list_row_times(source: Source) -> list[tuple[float, float]]:
    tables = source.files[FORENSICS].of(Table)
    found = next((t for t in tables if t.key == "forensics.row_table"), None)
    if found is None:
        return []
    places = [found.columns.index(name) for name in ("tokens", "seconds")]
    return [(float(row[places[0]] or 0), float(row[places[1]] or 0)) for row in found.rows]


def _draw_trend(
    sheet: Sheet,
    place: Callable[[float, float], Point],
    *,
    slope: Measure,
    rest: Measure,
    end: float,
) -> None:
    """Draw the fitted line from no tokens on, and the interval of where it starts."""
    start = rest.value or 0.0
    sheet.line(
        place(0, start), place(end, start + end * (slope.value or 0.0) / 1000), ink="suspect"
    )
    x, y = place(0, start)
    low, high = (place(0, edge or 0.0)[1] for edge in (rest.low, rest.high))
    sheet.box((x - 4, high), (8, low - high), ink="suspect", alpha=0.4)
    sheet.marks([(x, y)], "suspect", size=6)
    sheet.note((x + 16, y + 22), f"beside reading: {_say_rest(rest)}", ink="ink")


def _say_rest(rest: Measure) -> str:
    return f"{say_measure(rest, lambda seconds: f'{1000 * seconds:.0f}')} ms"


FIGURES: dict[str, Draw] = {
    "hero": draw_hero,
    "stages": draw_stages,
    "says_and_knows": draw_says_and_knows,
    "shapes": draw_shapes,
    "refits": draw_refits,
    "swap_values": draw_swap_values,
    "swap_auc": draw_swap_auc,
    "controls_auc": draw_controls_auc,
    "kinds": draw_kinds,
    "real_models": draw_real_models,
    "suite": draw_suite,
    "membership": draw_attribution,
    "confidences": draw_confidences,
    "row_time": draw_row_time,
    "replay_matrix": draw_replay_matrix,
    "beliefs": draw_beliefs,
    "plan": draw_plan,
}
