"""From ordinary matplotlib figures to SVGs that a page inlines: one style, one palette, two widths.

A length in points is one in CSS pixels: a figure has 72 dots an inch.
"""

import io
import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from postmortem.case.files import write_text
from postmortem.case.schema import Case
from postmortem.experiments.records import Cell, Measure, Prediction, RecordFile, Table

WIDE, NARROW = 720, 350  # px: a page and a phone
BODY, SMALL = 13, 11  # px

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
# matplotlib draws in colours that nobody would choose; in the SVG the variables replace them.
COLOUR = {name: f"#f0{index:02x}0d" for index, name in enumerate(FALLBACK)}
VARIABLE = {COLOUR[name]: f"var(--pm-{name},{colour})" for name, colour in FALLBACK.items()}
DARK = {"size": BODY, "color": COLOUR["ink"]}
SHAPE = {"base": "s", "suspect": "^", "donor": "D"}
NUMBER = re.compile(r"[\d\s.,−%\[\]]+")

STYLE = {
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": COLOUR["ink"],
    "font.size": BODY,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOUR["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": BODY,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": SMALL,
    "axes.labelcolor": COLOUR["muted"],
    "xaxis.labellocation": "right",
    "xtick.color": COLOUR["muted"],
    "xtick.labelsize": SMALL,
    "ytick.color": COLOUR["muted"],
    "ytick.labelsize": SMALL,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
}


class NotDrawable(Exception):
    """These records do not hold what a figure shows; the message says what is absent."""


@dataclass(frozen=True)
class FigureSource:
    """What the figures draw from: record files by notebook, and the case."""

    files: Mapping[str, RecordFile]
    case: Case

    @property
    def prompt(self) -> str:
        """The prompt that figures show: of the last attempt, or the first where there is none."""
        asked = [attempt.prompt for attempt in self.case.attempts.values()]
        return asked[-1] if asked else self.case.asked

    def answers(self, stem: str, prompt: str, system: str = "") -> list[Prediction]:
        """The predictions of one system on a prompt, the first system's without a name."""
        found = self.files[stem].of(Prediction) if stem in self.files else []
        asked = [p for p in found if p.prompt == prompt]
        name = system or (asked[0].system if asked else "")
        return [p for p in asked if p.system == name]

    def measures(self, stem: str) -> dict[str, Measure]:
        """A notebook's measures that have a value, by key; `NotDrawable` without its records."""
        if stem not in self.files:
            raise NotDrawable(f"no records of the notebook {stem}")
        return {m.key: m for m in self.files[stem].of(Measure) if m.value is not None}

    def table(self, stem: str, key: str) -> list[dict[str, Cell]]:
        """The rows of a table by column, none where the notebook has recorded no such table."""
        tables = self.files[stem].of(Table) if stem in self.files else []
        found = [table for table in tables if table.key == key]
        return [dict(zip(t.columns, row, strict=True)) for t in found for row in t.rows]


# A figure, and its text for those who do not see it.
Drawn = tuple[Figure, str]
# Makes a figure for a page or, where the second argument is true, for a phone.
Make = Callable[[FigureSource, bool], Drawn]


@dataclass(frozen=True)
class Drawing:
    """A figure: its text for those who do not see it, and the SVG for a page and a phone."""

    name: str
    alt: str
    wide: str
    narrow: str

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        return self.wide


def draw_each(
    figures: Mapping[str, Make], source: FigureSource
) -> tuple[list[Drawing], dict[str, str]]:
    """Draw each figure that the records allow; say of each other one why not, by its name."""
    drawings, reasons = [], {}
    for name, make in figures.items():
        try:
            drawings.append(draw_once(name, partial(make, source)))
        except NotDrawable as reason:
            reasons[name] = str(reason)
    return drawings, reasons


def draw_once(name: str, make: Callable[[bool], Drawn]) -> Drawing:
    """Draw a figure for a page and for a phone; `make` is told whether it is to be narrow."""
    (alt, wide), (_, narrow) = (_draw(name, make, narrow=narrow) for narrow in (False, True))
    return Drawing(name, alt, wide, narrow)


def _draw(name: str, make: Callable[[bool], Drawn], *, narrow: bool) -> tuple[str, str]:
    # Ids are hashes of what they name and the salt: they differ between figures of one page.
    salt = {"svg.hashsalt": f"{name} {narrow}"}
    with matplotlib.style.context(["default", STYLE, salt]), warnings.catch_warnings():
        # The page's font draws the text; whether matplotlib's own has the glyph is no matter.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure, alt = make(narrow)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    alt = clean(alt, len(alt))
    return alt, dress_svg(stream.getvalue(), alt, width=NARROW if narrow else WIDE)


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


def clean(text: object, limit: int = 60) -> str:
    """Untrusted text on one line without unprintable characters, cut with an ellipsis."""
    line = "".join(c if c.isprintable() else " " for c in str(text)).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def dress_svg(text: str, alt: str, *, width: int) -> str:
    """matplotlib's SVG made fit for a page: themed, described, and without what leaks into it."""
    root = ET.fromstring("\n".join(clean(line, len(line)) for line in text.splitlines()))
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


def panels(
    narrow: bool, heights: Sequence[float], *, columns: int = 1, around: float = 0, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of axes of these heights in px, row by row; `around` each row is room for text."""
    rows = [max(heights[start : start + columns]) for start in range(0, len(heights), columns)]
    size = ((NARROW if narrow else WIDE) / 72, (sum(rows) + around * len(rows)) / 72)
    figure, grid = Figure(size), {"height_ratios": rows}
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=grid, **shared)
    return figure, list(axes.flat)


def mark(role: str, size: float = 7.5) -> dict[str, Any]:
    """How a role's mark is plotted: the truth as a ring, the others filled."""
    ring, shape = role == "truth", SHAPE.get(role, "o")
    return {
        "color": COLOUR[role],
        "linestyle": "",
        "marker": shape,
        # Squares and diamonds look larger than a circle of their width.
        "markersize": size * (0.86 if shape in "sD" else 1),
        "markerfacecolor": COLOUR["paper" if ring else role],
        "markeredgewidth": 1.6 if ring else 0,
        "clip_on": False,
    }


def note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    *,
    shift: tuple[float, float] = (0, 0),
    coords: Any = "data",
    **look: Any,
) -> None:
    """Write a small line at a point, shifted by px, also beyond the edge of the axes."""
    look = {"size": SMALL, "color": COLOUR["muted"], "annotation_clip": False, **look}
    axes.annotate(text, at, shift, coords, "offset points", **look)


def key(figure: Figure, names: Mapping[str, str]) -> None:
    """Name the roles whose marks a figure shows, above it."""
    lines = [Line2D([], [], **mark(role)) for role in names]
    columns = 1 if figure.get_figwidth() < WIDE / 72 else len(names)
    figure.legend(lines, list(names.values()), loc="outside upper left", ncols=columns)
