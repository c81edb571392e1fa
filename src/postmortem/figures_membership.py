"""Figure of membership: one adapter and its controls on bases trained apart."""

from matplotlib.ticker import MaxNLocator

from postmortem.figure_source import NotDrawable, Source
from postmortem.records import Measure
from postmortem.sheet import Forest, Row, Scale, Sheet, say_measure

MEMBERSHIP, PREFIX = "attribution", "membership.example."
ROLES = {"the adapter": "suspect"}
# Harm beyond this share of the greatest gain stands at the edge of the scale, told by its number.
HARM = 0.5


def draw_membership(sheet: Sheet, source: Source) -> str:
    """By how much an adapter and each of its controls lower the loss, base by base."""
    found = {
        key.removeprefix(PREFIX): measure
        for key, measure in source.measures(MEMBERSHIP).items()
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
