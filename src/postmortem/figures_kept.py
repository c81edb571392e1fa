"""Figure of the runs on real models that are kept with the project."""

from postmortem.figure_source import NotDrawable, Source
from postmortem.sheet import Forest, Row, Scale, Sheet, say_auc, say_measure

# Where a figure finds a kept record among the record files: this and the profile's name.
KEPT = "kept."
READS = {
    "asked Yes or No": "yes_no.{}.auc_yes_no",
    "number, log-odds": "v2.{}.auc_number",
    "number, written": "v2.{}.auc_decoded",
}
SYSTEMS = {"base": "base alone", "suspect": "yes/no adapter", "reference": "numeric adapter"}


def draw_real_models(sheet: Sheet, source: Source) -> str:
    """How well each system of each kept run ranks the generated posts, by each read-out."""
    rows: list[Row] = []
    stems = sorted(name for name in source.files if name.startswith(KEPT))
    for stem in stems:
        measures = source.measures(stem)
        for system, title in SYSTEMS.items():
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
