"""Figures of the book: each one a function that draws records on matplotlib's axes.

A function makes the figure for a page or a phone and says its numbers in words; it raises
`NotDrawable` where the records do not hold what it shows.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba

from postmortem.book.canvas import (
    BODY,
    COLOUR,
    DARK,
    SMALL,
    Drawing,
    Drawn,
    FigureSource,
    Make,
    NotDrawable,
    clean,
    draw_each,
    draw_once,
    key,
    mark,
    note,
    panels,
)
from postmortem.case.schema import Case
from postmortem.experiments.records import STATES, Measure, Prediction, RecordFile, Table, Verdict
from postmortem.experiments.session import Session
from postmortem.models.changes import COPIES

if TYPE_CHECKING:
    from postmortem.experiments.ask import Answers

NumberFormat = Callable[[float], str]

FORENSICS, MISMATCH, SWAP, CONTROLS = "files", "shape_mismatch", "adapter_swap", "controls"
REPLAY, DIAGNOSIS, SUITE, ATTRIBUTION = "replay", "diagnosis", "suite", "attribution"
KEPT = "kept."  # before the profile's name in the name of a kept run's records
SYSTEMS = {"base": "base alone", "suspect": "suspect", "reference": "reference"}
ABSENT = "not available in this profile"
NO_LABELS = "the rows came without labels"
ONE_CLASS = f"{NO_LABELS}, or with one class only"


def say(value: float) -> str:
    """Two decimals with a true minus sign."""
    return f"{value:z.2f}".replace("-", "−")


def say_share(value: float) -> str:
    """A share in per cent; what is not all is not rounded up to all."""
    return f"{min(100 * value, 100.0 if value >= 1 else 99.9):.1f}"


def say_nats(value: float) -> str:
    """A divergence; one too small for three decimals is not written as none."""
    return f"{value:.0e}" if 0 < value < 0.0005 else f"{value:.3f}"


def say_measure(found: Measure | None, form: NumberFormat = say) -> str:
    """A value and its interval."""
    if found is None or found.value is None:
        return "not available"
    if found.low is None or found.high is None:
        return form(found.value)
    return f"{form(found.value)} [{form(found.low)}, {form(found.high)}]"


def role_of(system: str) -> str:
    """The role whose colour and mark a system takes; an adapter under test is the suspect."""
    role = system.removesuffix("_disabled").removesuffix("_adapter").removesuffix("_base")
    if role in ("base", "suspect", "reference", "donor"):
        return role
    return "base" if system.endswith("_base") else "suspect"


# Estimates


class Row(NamedTuple):
    """A row of a forest plot; without a role it is a heading."""

    label: str
    role: str = ""
    found: Measure | None = None


@dataclass(frozen=True)
class Scale:
    """How a forest plot writes its values, its axis where it is fixed, a line to read against."""

    form: NumberFormat = say
    limits: tuple[float, float] | None = None
    ticks: Sequence[str] = ()  # at equal steps from limit to limit
    line: tuple[float, str] | None = None


AUC = Scale(limits=(0, 1), ticks=("0", "0.5", "1"), line=(0.5, "chance"))
SHARES = Scale(say_share, limits=(0, 1), ticks=("0 %", "50 %", "100 %"))


def list_rows(
    measures: Mapping[str, Measure],
    names: Mapping[str, tuple[str, str]],
    key: str = "{}",
    *,
    every: bool = False,
) -> list[Row]:
    """A row for each name's measure, from its label and role; those without one where `every`."""
    rows = [Row(*told, measures.get(key.format(name))) for name, told in names.items()]
    return [row for row in rows if every or row.found]


def blocks(groups: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of each group that has any, below its heading."""
    return [row for name, rows in groups.items() if rows for row in (Row(name), *rows)]


def draw_forests(narrow: bool, parts: Mapping[str, tuple[Sequence[Row], Scale]]) -> Drawn:
    """Forest plots by their titles, side by side on a page, and their estimates in words."""
    heights = []
    for rows, _ in parts.values():
        lines = max(row.label.count("\n") for row in rows)
        heights.append((26 + 14 * lines) * len(rows))
    figure, axes = panels(narrow, heights, columns=1 if narrow else len(parts), around=76)
    told = []
    for ax, (title, (rows, scale)) in zip(axes, parts.items(), strict=True):
        forest(ax, rows, scale, title)
        shared = [row.label for row in rows] == [row.label for row in next(iter(parts.values()))[0]]
        ax.tick_params("y", labelleft=narrow or ax is axes[0] or not shared)
        words = [
            f"{row.label} {say_measure(row.found, scale.form)}" if row.role else f"{row.label}:"
            for row in rows
        ]
        told.append(f"{title}: {'; '.join(words).replace(':;', ':')}.")
    return figure, " ".join([*told, "With 95 % intervals."]).replace("\n", ", ")


def forest(axes: Axes, rows: Sequence[Row], scale: Scale, title: str) -> None:
    """Draw estimates with their intervals, one a row, named on the left and told on the right."""
    headings = [y for y, row in enumerate(rows) if not row.role]
    label_rows(axes, title, [row.label for row in rows], headings)
    for y, row in enumerate(rows):
        if row.role:
            axes.axhline(y, color=COLOUR["rule"], linewidth=1, zorder=0)
            _draw_estimate(axes, y, row, scale)
    axes.locator_params("x", nbins=4)
    if scale.limits:
        axes.set_xlim(scale.limits)
    if scale.ticks:
        axes.set_xticks(np.linspace(*axes.get_xlim(), len(scale.ticks)), scale.ticks)
    if scale.line:
        place, name = scale.line
        axes.axvline(place, color=COLOUR["muted"], linewidth=1, zorder=0.5)
        top = axes.get_xaxis_transform()
        note(axes, name, (place, 1), shift=(0, 5), coords=top, ha="center")


def _draw_estimate(axes: Axes, y: int, row: Row, scale: Scale) -> None:
    edge, found = axes.get_yaxis_transform(), row.found
    if found is None or found.value is None:
        note(axes, "not available", (1, y), shift=(14, -4), coords=edge)
        return
    ends = [found.value if end is None else end for end in (found.low, found.high)]
    low, value, high = np.clip([ends[0], found.value, ends[1]], *(scale.limits or (None, None)))
    # Taller than the mark, and outlined, so that an interval narrower than the mark is seen.
    band = axes.barh(y, high - low, 0.5, low, color=COLOUR[row.role], alpha=0.4, clip_on=False)
    band.patches[0].set(edgecolor=COLOUR[row.role], linewidth=1.5)
    axes.plot(value, y, **mark(row.role))
    said, _, interval = say_measure(found, scale.form).partition(" ")
    note(axes, said, (1, y), shift=(48, -4.5), coords=edge, ha="right", **DARK)
    note(axes, interval, (1, y), shift=(54, -4), coords=edge)


def label_rows(axes: Axes, title: str, labels: Sequence[str], headings: Sequence[int] = ()) -> None:
    """Name rows from top to bottom, left-aligned below a title; headings may reach into axes."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels, ha="left", fontsize=BODY, color=COLOUR["ink"])
    left = 0.0
    for y, text in enumerate(axes.get_yticklabels()):
        if y in headings:
            text.set_fontweight("bold")
        else:
            left = max(left, text.get_window_extent().width + 4)
    axes.tick_params("y", pad=left)
    note(axes, title, (0, 1), shift=(-left, 24), coords="axes fraction", weight="bold", **DARK)


def draw_stages(source: FigureSource, narrow: bool) -> Drawn:
    """Share of rows by parser stage, and what the strict parser reads, for each attempt."""
    parts = {}
    for name, attempt in source.case.attempts.items():
        measures, answers = source.measures(name), source.answers(name, attempt.prompt)
        if not answers:
            raise NotDrawable(f"no answers to the prompt {attempt.prompt} in {name}")
        role, before = role_of(answers[0].system), f"{name}.stage."
        stages = {key: (key.removeprefix(before), role) for key in measures if before in key}
        strict = {f"{name}.parsed_strict": ("whole answer", role)}
        groups = {"the parser as written": stages, "a strict parser": strict}
        rows = blocks({word: list_rows(measures, names) for word, names in groups.items()})
        parts[f"{clean(attempt.title, 24)} ({name}), % of rows"] = (rows, SHARES)
    return draw_forests(narrow, parts)


def draw_swap_auc(source: FigureSource, narrow: bool) -> Drawn:
    """How well each read-out of each system ranks the rows, against chance."""
    measures, groups = source.measures(SWAP), {}
    for name, title in SYSTEMS.items():
        reads = {
            f"swap.{name}.{source.prompt}.auc_decoded": ("written number", name),
            f"swap.{name}.{source.prompt}.auc_number": ("number log-odds", name),
            f"swap.{name}.yes_no.auc_yes_no": ("Yes–No log-odds", name),
        }
        groups[title] = list_rows(measures, reads, every=True)
    rows = blocks(groups)
    if not any(row.found for row in rows):
        raise NotDrawable(ONE_CLASS)
    return draw_forests(narrow, {"Area under the ROC curve": (rows, AUC)})


def draw_real_models(source: FigureSource, narrow: bool) -> Drawn:
    """How well each system of each kept run ranks the generated posts, by each read-out."""
    systems = {"base": "base alone", "suspect": "yes/no adapter", "reference": "numeric adapter"}
    stems = sorted(name for name in source.files if name.startswith(KEPT))
    groups = {}
    for stem in stems:
        for name, title in systems.items():
            reads = {
                f"yes_no.{name}.auc_yes_no": ("asked Yes or No", name),
                f"v2.{name}.auc_number": ("number, log-odds", name),
                f"v2.{name}.auc_decoded": ("number, written", name),
            }
            heading = f"{clean(stem.removeprefix(KEPT), 20)}, {title}"
            groups[heading] = list_rows(source.measures(stem), reads)
    rows = blocks(groups)
    if not rows:
        lack = "the rows of the runs on record have no labels of both classes"
        raise NotDrawable(lack if stems else "no run on a real model is on record")
    return draw_forests(narrow, {"Area under the ROC curve": (rows, AUC)})


def draw_suite(source: FigureSource, narrow: bool) -> Drawn:
    """How well the log-odds of each adapter rank the rows, by what the suite makes of it."""
    measures, groups = source.measures(SUITE), {}
    for word in ("kept", "cannot tell", "dropped"):
        table = source.table(SUITE, "suite.adapters")
        adapters = [str(row["adapter"]) for row in table if row["verdict"] == word]
        names = {name: (clean(name, 22), role_of(name)) for name in adapters}
        groups[word] = list_rows(measures, names, "suite.auc.{}")
    if not any(groups.values()):
        raise NotDrawable(f"adapters {ABSENT}, or {NO_LABELS}")
    names = {name: (name, "ink") for name in ("of the kept", "by the write-up", "of all")}
    groups["ensembles"] = list_rows(measures, names, "suite.auc.ensemble {}")
    base = list_rows(measures, {"base alone": ("base alone", "base")}, "suite.auc.{}")
    return draw_forests(narrow, {"AUC of the log-odds": ([*base, *blocks(groups)], AUC)})


def draw_attribution(source: FigureSource, narrow: bool) -> Drawn:
    """By how much an adapter and each of its controls lower the loss, base by base."""
    measures, before = source.measures(ATTRIBUTION), "membership.example."
    groups: dict[str, dict[str, tuple[str, str]]] = {}
    for name in measures:
        if name.startswith(before):
            base, _, adapter = name.removeprefix(before).rpartition(".")
            role = "suspect" if adapter == "the adapter" else "base"
            groups.setdefault(base, {})[name] = (adapter, role)
    rows = blocks({base: list_rows(measures, names) for base, names in groups.items()})
    if not rows:
        raise NotDrawable("no adapter was tried on several bases")
    found = [row.found for row in rows if row.found]
    least = min(measure.low or measure.value or 0.0 for measure in found)
    most = max(0.01, *(measure.high or measure.value or 0.0 for measure in found))
    # Harm beyond half the greatest gain stands at the edge of the scale, told by its number.
    limits = (max(min(least, 0.0), -most / 2), 1.05 * most)
    scale = Scale(limits=limits, line=(0.0, "adapter off"))
    return draw_forests(narrow, {"Gain in nat a token": (rows, scale)})


def draw_refits(source: FigureSource, narrow: bool) -> Drawn:
    """How far a healthy and a mismatched adapter move their base, and what changes in writing."""
    refits = {
        "healthy": ("reference\nfits its base", "reference"),
        "ignored": ("donor, ignored\nmisfits left out", "donor"),
        "truncated": ("donor, truncated\ncut to the base", "donor"),
        "padded": ("reference, padded\non the donor’s base", "reference"),
    }
    measures, line = source.measures(MISMATCH), (0.0, "no change")
    moved = list_rows(measures, refits, "mismatch.{}.kl", every=True)
    changed = list_rows(measures, refits, "mismatch.{}.flips", every=True)
    if not any(row.found for row in moved):
        raise NotDrawable(f"donor or reference {ABSENT}")
    parts = {
        "KL to its base alone, in nat": (moved, Scale(say_nats, line=line)),
        "Written values that change, %": (changed, replace(SHARES, line=line)),
    }
    return draw_forests(narrow, parts)


def draw_controls_auc(source: FigureSource, narrow: bool) -> Drawn:
    """How well each system ranks the rows: the base alone, and each adapter off and on."""
    measures, written, odds = source.measures(CONTROLS), {}, {}
    states = {state: (title, role_of(state)) for state, title in STATES.items()}
    for prompt, read in {"v1": "number", "v2": "number", "yes_no": "yes_no"}.items():
        heading, key = f"prompt {prompt.replace('_', '/')}", f"controls.{{}}.{prompt}.auc_"
        written[heading] = list_rows(measures, states, f"{key}decoded")
        odds[heading] = list_rows(measures, states, f"{key}{read}")
    if not any(written.values()):
        raise NotDrawable(ONE_CLASS)
    parts = {"AUC of what is written": written, "AUC of the log-odds": odds}
    return draw_forests(narrow, {title: (blocks(some), AUC) for title, some in parts.items()})


def draw_copies(source: FigureSource, narrow: bool) -> Drawn:
    """How far the suspect and its changed copies move the base, and how well each then ranks."""
    measures, prompt = source.measures(CONTROLS), source.case.compared_prompts[-1]
    base = {f"base.{prompt}": ("base alone", "base")}
    names = {f"suspect.{prompt}": ("suspect", "suspect")}
    names |= {name: (title, "donor") for name, title in COPIES.items()}
    moved = list_rows(measures, names, "controls.{}.shift")
    ranked = list_rows(measures, {**base, **names}, "controls.{}.auc")
    if not moved:
        raise NotDrawable("neither the suspect nor a changed copy of it has answered")
    parts = {"Change of the log-odds, in nat": (moved, Scale(line=(0.0, "no change")))}
    if len(ranked) > 1:
        parts["AUC of the log-odds"] = (ranked, AUC)
    return draw_forests(narrow, parts)


def draw_beliefs(source: FigureSource, narrow: bool) -> Drawn:
    """Probability of each cause after the evidence."""
    measures, before = source.measures(DIAGNOSIS), "diagnosis.cause."
    found = {k.removeprefix(before): m.value or 0.0 for k, m in measures.items() if before in k}
    # The first ten: the rest have next to nothing.
    order = sorted(found, key=lambda name: -found[name])[:10]
    if not order:
        raise NotDrawable("no beliefs on record")
    plain = {name: name.replace("-", " ") for name in order}
    titles = {row["cause"]: str(row["title"]) for row in source.table(REPLAY, "replay.matrix")}
    names = {n: (plain[n] if narrow else titles.get(n, plain[n]), "base") for n in order}
    rows = list_rows(measures, names, f"{before}{{}}")
    figure, _ = draw_forests(narrow, {"Probability after the evidence": (rows, Scale())})
    figure.axes[0].set_xlim(left=0)
    told = ", ".join(f"{plain[n]} {say_measure(measures[before + n])}" for n in order)
    return figure, f"Probability of each cause after the evidence: {told}."


# Values


def find_systems(source: FigureSource) -> dict[str, list[Prediction]]:
    """What each system of the case answered in the swap, to the prompt that figures show."""
    names = [name for name in SYSTEMS if getattr(source.case.systems, name)]
    found = {name: source.answers(SWAP, source.prompt, name) for name in names}
    if not any(found.values()):
        raise NotDrawable(f"no answers to the prompt {source.prompt} in {SWAP}")
    return found


def say_values(answers: Sequence[Prediction], source: FigureSource) -> str:
    """What a system wrote, in a few words."""
    if not answers:
        return ABSENT
    values = sorted({p.value for p in answers if p.value is not None})
    if not values:
        return "none could be read"
    told = f"{len(values)} values"
    if len(values) == 1:
        binary = source.case.prompt(source.prompt).contract in ("yes_no", "choice")
        word = "positive" if values[0] else "negative"
        told = f"all {word}" if binary else f"all {values[0]:.1f}"
    lost = sum(p.value is None for p in answers)
    return f"{told}, {lost} not read" if lost else told


class Band(NamedTuple):
    """What one system says of each row: the role whose mark it takes, the values, and words."""

    role: str
    values: Mapping[str, float | None]
    told: str


def draw_rows(source: FigureSource, narrow: bool) -> Drawn:
    """The first rows as columns; the truth, each run and each system as bands."""
    systems = find_systems(source)
    # As many as the incident had.
    shown = next(answers for answers in systems.values() if answers)[:10]
    truth: dict[str, float | None] = {p.row_id: p.label for p in shown}
    known = [label for label in truth.values() if label is not None]
    told = f"{sum(known):g} of {len(known)} are 1 (shaded)" if known else "no labels"
    bands = {"truth": Band("truth", truth, told)}
    runs = {f"{n} run": source.answers(n, a.prompt) for n, a in source.case.attempts.items()}
    for name, answers in {**runs, **{SYSTEMS[n]: some for n, some in systems.items()}}.items():
        some = [p for p in answers if p.row_id in truth]
        who = f"{clean(some[0].system, 12)}, " if some and name in runs else ""
        role = role_of(some[0].system) if some else "base"
        told = who + say_values(some, source)
        bands[name] = Band(role, {p.row_id: p.value for p in some}, told)
    figure, said = draw_bands(narrow, bands)
    return figure, f"The first {len(shown)} rows as columns, values from 0 to 1. {said}"


def draw_incident(source: FigureSource, narrow: bool) -> Drawn:
    """The incident's rows as columns: the truth, both attempts, and what real bases wrote on them.

    Of the rows of a file a kept run holds no values but those of a constant answer.
    """
    facts = source.case.forensics
    if facts is None:
        raise NotDrawable("no rows of the incident are on record")
    rows = facts.row_ids.values
    labels: list[float] = [float(label) for label in facts.labels.values]
    told = f"{sum(labels):g} of {len(rows)} are 1 (shaded)"
    bands = {"truth": Band("truth", dict(zip(rows, labels, strict=True)), told)}
    for number, (name, attempt) in enumerate(source.case.attempts.items(), 1):
        kept = name == facts.attempt
        values = facts.submitted.values if kept else [attempt.reported_value] * len(rows)
        told = f"all {values[0]}" if len(set(values)) == 1 else f"{len(set(values))} values"
        told = f"{told}, {'submitted' if kept else 'as recalled'}"
        bands[f"attempt {number}"] = Band("suspect", dict(zip(rows, values, strict=True)), told)
    for stem in sorted(name for name in source.files if name.startswith(KEPT)):
        profile, found = stem.removeprefix(KEPT), source.measures(stem)
        distinct, value = (found.get(f"test.v2.base.{name}") for name in ("distinct", "top_value"))
        if distinct and value and found["test.rows"].value == len(rows):
            one = distinct.value == 1
            told = f"all {value.value}" if one else f"{distinct.value:g} values"
            # Without the size, for which a phone has no room.
            whole = source.case.profile(profile).title.removesuffix("-Instruct")
            title = whole.rpartition("-")[0] or whole
            constant = dict.fromkeys(rows, value.value) if one else {}
            bands[title] = Band("base", constant, f"alone: {told}")
    figure, said = draw_bands(narrow, bands)
    return figure, f"The incident's {len(rows)} rows as columns, values from 0 to 1. {said}"


def draw_bands(narrow: bool, bands: Mapping[str, Band]) -> Drawn:
    """Bands over the rows of the first, which is the truth; what they show, in words."""
    truth = bands["truth"].values
    figure, axes = panels(narrow, [40] * len(bands), around=14, sharex=True)
    for ax, (name, (role, values, told)) in zip(axes, bands.items(), strict=True):
        ys = [values.get(row) for row in truth]
        left, lines = (-112, 17) if narrow else (-148, 24)
        note(ax, name, (0, 0.5), shift=(left, 3), coords="axes fraction", weight="bold", **DARK)
        if all(y is None for y in ys):
            note(ax, told, (0.5, 0.4), coords="axes fraction", ha="center")
        else:
            told = textwrap.fill(told, lines)
            note(ax, told, (0, 0.5), shift=(left, -2), coords="axes fraction", va="top")
            heights = [math.nan if y is None else min(max(y, 0), 1) for y in ys]
            ax.plot(heights, **mark(role, 8) | {"linestyle": "-"})
        for x, label in enumerate(truth.values()):
            if label == 1:
                ax.axvspan(x - 0.5, x + 0.5, color=COLOUR["rule"], alpha=0.35, linewidth=0)
        ax.axhline(0, color=COLOUR["rule"], linewidth=1, zorder=0)
        ax.set(ylim=(-0.2, 1.2), yticks=(0, 1), xlim=(-0.5, len(ys) - 0.5))
        ax.spines.bottom.set_visible(ax is axes[-1])
        ax.tick_params("x", length=0)
    # Row ids where they fit, else their places.
    ids = [clean(row, 40) for row in truth]
    fit = max(map(len, ids)) * 7 < (220 if narrow else 550) / len(ids)
    axes[-1].set_xticks(range(len(ids)), ids if fit else [str(n + 1) for n in range(len(ids))])
    axes[-1].set_xlabel("row" if fit else f"rows {clean(ids[0], 16)} to {clean(ids[-1], 16)}")
    return figure, " ".join(f"{name}: {band.told}." for name, band in bands.items())


class Strip(NamedTuple):
    """One quantity of one system: a title, what is said of it, and each value with its truth."""

    title: str
    told: str
    role: str
    unit: str
    pairs: Sequence[tuple[float, int | None]]


VALUE, ODDS = "value, nearest tenth", "log-odds, in nat"


def read_pairs(answers: Sequence[Prediction], field: str) -> list[tuple[float, int | None]]:
    """The values of a field that are known, each with the truth of its row."""
    pairs = [(getattr(p, field), p.label) for p in answers]
    return [(value, label) for value, label in pairs if value is not None]


def draw_strips(narrow: bool, strips: Sequence[Strip], *, columns: int = 1) -> Drawn:
    """How many rows have which value, truth 1 upwards and truth 0 down; one scale for a unit."""
    if not any(strip.pairs for strip in strips):
        lack = {VALUE: "no answer could be read", ODDS: "no log-odds are on record"}
        raise NotDrawable(lack[strips[0].unit])
    columns = 1 if narrow else columns
    height = 130 if columns == 1 else 190
    figure, axes = panels(narrow, [height] * len(strips), columns=columns, around=84)
    for unit in dict.fromkeys(strip.unit for strip in strips):
        group = [(ax, s) for ax, s in zip(axes, strips, strict=True) if s.unit == unit]
        edges = np.arange(-0.05, 1.1, 0.1)
        if unit == ODDS:
            edges = np.histogram_bin_edges([v for _, s in group for v, _ in s.pairs], 40)
        # Room for the counts that stand on the bars of values.
        room = 1.3 if unit == VALUE else 1.1
        top = room * max(_draw_counts(ax, strip, edges) for ax, strip in group)
        for ax, strip in group:
            ax.set(xlim=(edges[0], edges[-1]), ylim=(-top, top), yticks=[])
            ax.set_title(strip.title, pad=24 + 13 * strip.told.count("\n"))
            note(ax, strip.told, (0, 1), shift=(0, 9), coords="axes fraction")
            last = columns > 1 or ax is group[-1][0]
            ax.set_xlabel(unit if last else "")
            ax.tick_params("x", labelbottom=last)
    return figure, " ".join(f"{strip.title}: {strip.told}." for strip in strips)


def _draw_counts(axes: Axes, strip: Strip, edges: np.ndarray) -> int:
    """Draw how many values stand in each bin, and return the most."""
    sides = {"no labels": strip.pairs}
    if all(label in (0, 1) for _, label in strip.pairs):
        sides = {f"truth {truth}": [p for p in strip.pairs if p[1] == truth] for truth in (1, 0)}
    middles, most, role = (edges[:-1] + edges[1:]) / 2, 1, strip.role
    axes.axhline(0, color=COLOUR["muted"], linewidth=1)
    for sign, (name, pairs) in zip((1, -1), sides.items(), strict=False):
        height = (0, 0.5 + 0.25 * sign)
        note(axes, name, height, shift=(-6, -4), coords="axes fraction", ha="right")
        # What is beyond the scale stands at its edge.
        values = np.clip([value for value, _ in pairs], edges[0], edges[-1])
        counts = np.histogram(values, edges)[0]
        xs, seen = middles[counts > 0], counts[counts > 0]
        if not pairs:
            continue
        bars = axes.bar(xs, sign * seen, 0.7 * np.diff(edges)[0], color=COLOUR[role], alpha=0.4)
        axes.plot(xs, sign * seen, **mark(role, 5))
        if strip.unit == VALUE:
            axes.bar_label(bars, seen, padding=4, color=COLOUR["muted"], fontsize=SMALL)
        most = max(most, counts.max())
    return most


def draw_values(source: FigureSource, narrow: bool) -> Drawn:
    """How often each value is written, by system and truth."""
    strips = []
    for name, answers in find_systems(source).items():
        told, pairs = say_values(answers, source), read_pairs(answers, "value")
        strips.append(Strip(SYSTEMS[name], told, name, VALUE, pairs))
    figure, said = draw_strips(narrow, strips)
    return figure, f"Values counted by truth. {said}"


def draw_log_odds(source: FigureSource, narrow: bool) -> Drawn:
    """The log-odds of what is asked for, by system and truth, on one scale."""
    number = source.case.prompt(source.prompt).contract == "number"
    field, strips = "number_log_odds" if number else "yes_no_log_odds", []
    for name, answers in find_systems(source).items():
        auc = source.measures(SWAP).get(f"swap.{name}.{source.prompt}.auc")
        told = f"AUC {say_measure(auc)}" if auc else f"{len(answers)} rows"
        strips.append(Strip(SYSTEMS[name], told, name, ODDS, read_pairs(answers, field)))
    figure, said = draw_strips(narrow, strips)
    return figure, f"Log-odds of what is asked for, by truth. {said}"


def values_by_system(answers: Mapping[str, "Answers"]) -> Drawing:
    """How often each value is written, by system and truth; a notebook shows it as it is."""
    strips = []
    for name, some in answers.items():
        pairs = read_pairs(some.predictions, "value")
        strips.append(Strip(name, f"{len(pairs)} rows", role_of(name), VALUE, pairs))
    return draw_once("values", lambda narrow: draw_strips(narrow, strips))


def log_odds_by_system(answers: Mapping[str, "Answers"]) -> Drawing:
    """Log-odds of what the prompt asks for, by system and truth; a notebook shows it as it is."""
    strips = []
    for name, some in answers.items():
        field = "number_log_odds" if some.contract == "number" else "yes_no_log_odds"
        pairs = read_pairs(some.predictions, field)
        strips.append(Strip(name, f"{len(pairs)} rows", role_of(name), ODDS, pairs))
    return draw_once("log_odds", lambda narrow: draw_strips(narrow, strips))


def write_and_hold(
    answers: Sequence[Prediction], measures: Mapping[str, Measure], place: str
) -> list[Strip]:
    """What a base writes, and the log-odds behind it, by truth."""
    if any(p.label is None for p in answers):
        raise NotDrawable("the rows came without labels")
    strips = []
    for title, read, unit, field in (
        ("What it writes", "decoded", VALUE, "value"),
        ("What it knows", "number", ODDS, "number_log_odds"),
    ):
        told = f"AUC {say_measure(measures.get(f'{place}.auc_{read}'))}"
        strips.append(Strip(title, told, "base", unit, read_pairs(answers, field)))
    return strips


def draw_says_and_knows(source: FigureSource, narrow: bool) -> Drawn:
    """What the base writes, and what it holds."""
    answers = source.answers(SWAP, source.prompt, "base")
    if not answers:
        raise NotDrawable(f"the base has not answered to the prompt {source.prompt} in {SWAP}")
    place = f"swap.base.{source.prompt}"
    strips = write_and_hold(answers, source.measures(SWAP), place)
    figure, said = draw_strips(narrow, strips, columns=2)
    name = f"base alone, prompt {source.prompt}, {len(answers)} rows"
    key(figure, {"base": name})
    return figure, f"{name}, {len({p.value for p in answers})} written value(s). {said}"


def draw_kinds(source: FigureSource, narrow: bool) -> Drawn:
    """Three bases side by side: what each writes, and how its log-odds order the rows."""
    measures, prompt = source.measures(CONTROLS), source.prompt
    words = {v.key: v.verdict for v in source.files[CONTROLS].of(Verdict)}
    writes, holds, said = [], [], [f"Three bases under the prompt {prompt}, by truth."]
    for kind in ("speaking_base", "base", "ignorant_base"):
        answers, place = source.answers(CONTROLS, prompt, kind), f"controls.{kind}.{prompt}"
        if not answers:
            raise NotDrawable(f"a base that speaks, or one that does not know, {ABSENT}")
        name, word = SYSTEMS.get(kind, kind.replace("_", " ")), words[f"{place}.knowing"]
        wrote, held = write_and_hold(answers, measures, place)
        writes.append(wrote._replace(title=name, told=f"{word}\n{wrote.told}"))
        holds.append(held._replace(title=name))
        said.append(f"{name}, {word}: writes {wrote.told}, holds {held.told}.")
    figure, _ = draw_strips(narrow, [*writes, *holds], columns=3)
    return figure, " ".join(said)


# What a forest or strips do not show

WHOLE = "all of v2"
# The parts of the symptom, as they stand over a column.
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


def draw_replay_matrix(source: FigureSource, narrow: bool) -> Drawn:
    """Causes against the parts of the symptom, a block for each kind of base."""
    source.measures(REPLAY)
    frame = pd.DataFrame(source.table(REPLAY, "replay.matrix"))
    if frame.empty:
        raise NotDrawable("no table replay.matrix")
    hits = frame["whole v2 symptom"].str.split(" of ", expand=True).astype(int)
    frame[WHOLE] = hits[0] / hits[1]
    parts = [*list(PARTS)[: 5 if narrow else None], WHOLE]  # a phone has room for the first
    causes = frame.groupby("cause", sort=False)[WHOLE].max()
    causes = causes.sort_values(ascending=False, kind="stable").index
    kinds = frame["base"].nunique()
    heights = [20 * len(causes)] * kinds
    figure, axes = panels(narrow, heights, columns=kinds, around=150, sharey=True)
    said = []
    for ax, (kind, rows) in zip(axes, frame.groupby("base", sort=False), strict=True):
        cells = rows.set_index("cause")[parts].astype(float).reindex(causes)
        shades = np.where(cells > 0, 0.25 + 0.75 * cells, 0)
        ends = np.arange(len(parts) + 1)
        _fill_cells(ax, ends[:-1], shades[:, :-1], "base")
        _fill_cells(ax, ends[-2:], shades[:, -1:], "suspect")
        for y in np.flatnonzero(cells[WHOLE].isna()):
            note(ax, "not replayed", (0.2, y + 0.5), shift=(0, -4))
        names = [PARTS.get(part, part) for part in parts]
        ax.set_xticks(ends[:-1] + 0.5, names, rotation=90)
        ax.set_yticks(np.arange(len(causes)) + 0.5, [cause.replace("-", " ") for cause in causes])
        ax.set(title=f"{kind} base", facecolor=to_rgba(COLOUR["rule"], 0.35))
        ax.xaxis.tick_top()
        ax.tick_params(length=0, labelcolor=COLOUR["ink"])
        ax.spines.bottom.set_visible(False)
        whole = rows["cause"][rows[WHOLE] == 1]
        said.append(f"{kind} base: {', '.join(whole) or 'none'}")
    axes[0].invert_yaxis()
    axes[-1].set_xlabel("darker: in more of the replays; empty: in none")
    told = "Causes by parts of the symptom. All of the second attempt in every replay"
    return figure, f"{told}, {'; '.join(said)}."


def _fill_cells(axes: Axes, ends: np.ndarray, shades: np.ndarray, role: str) -> None:
    """Fill cells with a role's colour, as strongly as a shade from 0 to 1 says."""
    fading = LinearSegmentedColormap.from_list(role, [to_rgba(COLOUR[role], a) for a in (0, 1)])
    cells = axes.pcolormesh(ends, np.arange(len(shades) + 1), shades, cmap=fading, vmin=0, vmax=1)
    cells.set(edgecolor=COLOUR["paper"], linewidth=2)


def draw_row_time(source: FigureSource, narrow: bool) -> Drawn:
    """Time of each row against its prompt's tokens, up to the limit, and what reading leaves."""
    measures = source.measures(FORENSICS)
    table = source.table(FORENSICS, "forensics.row_table")
    rows = [(float(row["tokens"] or 0), float(row["seconds"] or 0)) for row in table]
    slope = measures.get("forensics.timing.per_token")
    rest = measures.get("forensics.timing.beside_reading")
    if not rows or slope is None or rest is None:
        raise NotDrawable("no log on record that times at least five rows")
    (warm, slow), *later = rows
    limit = float(measures["forensics.prompt_limit"].value or 0)
    tokens, seconds = zip(*later, strict=True)
    top, last = 1.15 * max(seconds), max(limit, *tokens)
    figure, (axes,) = panels(narrow, [320])
    start, low, high = (value or 0.0 for value in (rest.value, rest.low, rest.high))
    axes.plot(
        [0, max(tokens)],
        [start, start + max(tokens) * (slope.value or 0) / 1000],
        color=COLOUR["suspect"],
    )
    axes.bar(0, high - low, last / 60, low, color=COLOUR["suspect"], alpha=0.4, clip_on=False)
    axes.plot(0, start, **mark("suspect", 6))
    axes.plot(tokens, seconds, **mark("suspect", 8.5))
    axes.plot(warm, top, **mark("truth", 8.5))
    axes.axvline(limit, color=COLOUR["ink"], linewidth=1.4)
    first = f"first row: {slow:.1f} s, above the scale"
    note(axes, first, (warm, top), shift=(-10, -4), ha="right")
    said = f"{say_measure(rest, lambda seconds: f'{1000 * seconds:.0f}')} ms"
    dark = {"color": COLOUR["ink"]}
    note(axes, f"beside reading: {said}", (0, start), shift=(14, -22), **dark)
    note(axes, f"limit {limit:g}", (limit, top), shift=(-6, -18), ha="right", **dark)
    axes.set(xlim=(0, 1.1 * last), ylim=(0, top), xlabel="tokens in the prompt")
    axes.set_title("Seconds a row", pad=10)
    axes.spines.left.set_visible(True)
    told = "; ".join(f"{tokens:g} tokens {seconds:.2f} s" for tokens, seconds in later)
    return figure, (
        f"Seconds a row against tokens in its prompt, limit {limit:g}. First row, {warm:g} tokens: "
        f"{slow:.1f} s. Then {told}. Beside reading, {said} are left."
    )


def draw_shapes(source: FigureSource, narrow: bool) -> Drawn:
    """LoRA pairs of two projections on the base and in the donor's adapter, to scale."""
    source.measures(MISMATCH)
    tables = [t.key for t in source.files[MISMATCH].of(Table) if t.key.endswith(".shapes")]
    rows = source.table(MISMATCH, tables[0]) if tables else []
    sizes: dict[str, list[int]] = {}
    for row in rows:
        tensor = ".".join(str(row["tensor"]).split(".")[-2:])
        for role, column in (("base", "on the base"), ("donor", "in the adapter")):
            sizes[f"{role} {tensor}"] = [int(length) for length in str(row[column]).split("×")]
    modules = [name for name in ("q_proj", "v_proj") if f"base {name}.lora_B" in sizes]
    known = source.case.true_size
    if not modules or known is None:
        raise NotDrawable(f"no table of shapes in {MISMATCH}")
    # A record's key names the donor in small letters.
    slug, donors = tables[0].split(".")[1], [name.rpartition("/")[2] for name in known.donors]
    donor = next((name for name in donors if name.lower().replace(".", "_") == slug), slug)
    names = {"base": known.base.rpartition("/")[2], "donor": f"adapter for {donor}"}
    outs = [max(sizes[f"{role} {m}.lora_B"][0] for role in ("base", "donor")) for m in modules]
    heights = [340 * out / max(outs) + 40 for out in outs]
    figure, axes = panels(narrow, heights, columns=1 if narrow else 2, around=44)
    key(figure, names)
    fitting = sum(row["fits"] == "yes" for row in rows)
    said, told = [], [f"{fitting} of the {len(rows)} LoRA tensors of a layer fit"]
    for ax, module in zip(axes, modules, strict=True):
        for role, away in (("donor", -0.08 * max(outs)), ("base", -0.035 * max(outs))):
            (rank, into), (out, _) = (sizes[f"{role} {module}.lora_{part}"] for part in "AB")
            ax.fill_between([0, into], 0, out, color=COLOUR[role], alpha=0.14, linewidth=0)
            ax.hlines(away, 0, into, color=COLOUR[role], linewidth=6)
            ax.vlines(away, 0, out, color=COLOUR[role], linewidth=6)
            note(ax, f"lora_A {rank}×{into}", (into, away), shift=(6, -4), color=COLOUR["ink"])
            note(ax, f"lora_B {out}×{rank}", (0, out), shift=(5, -14), color=COLOUR["ink"])
            said.append(f"{module} {out}×{into} of the {names[role]}")
        if out != into:
            told.append(f"{module} is not square: {into} in, {out} out")
        ax.set(xlim=(-0.1 * max(outs), max(outs)), aspect="equal", anchor="NW", title=module)
        ax.set(xticks=[], yticks=[])
        ax.invert_yaxis()
        ax.spines.bottom.set_visible(False)
    told.append(f"Lengths to one scale; the rank, {rank}, is not")
    figure.supxlabel("\n".join(told), size=BODY, x=0, ha="left")
    return figure, f"Out × in: {', '.join(said)}. {'. '.join(told)}."


# What an incident's pages show, and what those of a case without attempts show.
FIGURES: dict[str, Make] = {
    "incident": draw_incident,
    "hero": draw_rows,
    "stages": draw_stages,
    "says_and_knows": draw_says_and_knows,
    "shapes": draw_shapes,
    "refits": draw_refits,
    "swap_values": draw_values,
    "swap_auc": draw_swap_auc,
    "controls_auc": draw_controls_auc,
    "controls": draw_copies,
    "kinds": draw_kinds,
    "real_models": draw_real_models,
    "suite": draw_suite,
    "membership": draw_attribution,
    "row_time": draw_row_time,
    "replay_matrix": draw_replay_matrix,
    "beliefs": draw_beliefs,
}
FIGURES_OWN: dict[str, Make] = {
    "rows": draw_rows,
    "values": draw_values,
    "log_odds": draw_log_odds,
    "controls": draw_copies,
}


def figures_of(case: Case) -> dict[str, Make]:
    """The figures on the pages of a case, by name."""
    return FIGURES if case.attempts else FIGURES_OWN


def draw_all(files: Mapping[str, RecordFile], case: Case) -> tuple[list[Drawing], dict[str, str]]:
    """Draw each figure that these records allow; say of each other one why not, by its name."""
    return draw_each(figures_of(case), FigureSource(files, case))


def show_figures(session: Session, *names: str) -> None:
    """Show those of the figures that the case has, drawn from what the notebook has recorded.

    Of one that these records do not allow the reason is printed.
    """
    file = RecordFile.model_construct(records=tuple(session.records))
    chosen = {name: make for name, make in figures_of(session.case).items() if name in names}
    drawings, missing = draw_each(chosen, FigureSource({session.name: file}, session.case))
    for drawing in drawings:
        display(drawing)
    for name, reason in missing.items():
        print(f"no figure {name}: {reason}")
