"""Paper for the figures: CSS pixels, one mark and colour a role, SVG that serves any page.

A drawing is laid out on one empty matplotlib axes whose units are pixels, so that a text of 11 is
11 px wherever the SVG stands at its natural width. Colours are sentinels until the end, where each
becomes a CSS variable: one SVG serves the light and the dark page.
"""

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from postmortem.records import Measure

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
