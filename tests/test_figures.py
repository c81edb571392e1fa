import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from postmortem.book.figures import (
    FALLBACK,
    FIGURES,
    PARTS,
    Bins,
    Drawing,
    Lane,
    Scale,
    clean,
    draw_all,
    role_of,
    save_drawings,
    say_nats,
    say_share,
)
from postmortem.case.schema import Case
from postmortem.experiments.records import (
    Measure,
    Prediction,
    Provenance,
    Record,
    RecordFile,
    Table,
    Verdict,
)

STEMS = ("v1", "v2", "shape_mismatch", "adapter_swap", "controls")
KINDS = ("base", "speaking_base", "ignorant_base")
STATES = ("base", "suspect_disabled", "suspect", "reference_disabled", "reference")
EVIL = 'a<b>&"$x_1$ ]]>\u202e\x00#f0000d'
SHAPES = (
    ("self_attn.q_proj.lora_A", "4×32", "4×48", "no"),
    ("self_attn.q_proj.lora_B", "32×4", "64×4", "no"),
    ("self_attn.v_proj.lora_A", "4×32", "4×48", "no"),
    ("self_attn.v_proj.lora_B", "8×4", "16×4", "no"),
)


def make_case(**changes: Any) -> Case:
    """A small case with three confidences."""
    system = {"title": "a", "name": "a", "grade": "log", "source": "a log"}
    hypothesis = {"statement": "s", "verdict": "refuted", "because": "b", "grade": "log"}
    confidences = [("A1", 80.0, 85.0), ("B", 60.0, 40.0), ("P", 40.0, 15.0), ("C", None, None)]
    data: dict[str, Any] = {
        "case_version": 1,
        "name": "small",
        "title": "t",
        "symptom": "s",
        "context": "c",
        "systems": {"base": system, "suspect": system},
        "true_size": {"base": "Qwen/Base-1B", "donors": ["Qwen/Donor-4B"], "target_modules": []},
        "prompts": {},
        "attempts": {},
        "hypotheses": [
            {"id": id_, "title": f"Cause {id_}", "decided_by": "d", "initial": a, "final": b}
            | hypothesis
            for id_, a, b in confidences
        ],
        "profiles": {},
    }
    return Case.model_validate(data | changes)


def answer(system: str, prompt: str, *, row: int, label: int | None, value: float) -> Prediction:
    """One prediction; its log-odds follow the label."""
    return Prediction(
        system=system,
        prompt=prompt,
        row_id=str(2029 + row),
        group="rule",
        label=label,
        text=str(value),
        token_ids=(1,),
        prompt_tokens=9,
        full_prompt_tokens=9,
        finished=True,
        value=value,
        stage="float",
        strict_value=value,
        expected_value=value,
        number_log_odds=-3.0 + (label or 0) + 0.01 * row,
        yes_no_log_odds=0.0,
    )


def answers(system: str, prompt: str, *, rows: int) -> list[Record]:
    """A system on alternating labels: 0.0 throughout, or the label where it is the reference."""
    return [
        answer(
            system,
            prompt,
            row=i,
            label=i % 2,
            value=0.1 + 0.8 * (i % 2) if system == "reference" else 0.0,
        )
        for i in range(rows)
    ]


def interval(key: str, value: float) -> Measure:
    """A measure with an interval around it."""
    return Measure(key=key, value=value, low=value * 0.9, high=min(1.0, value * 1.1), n=12)


CONTROL_FIGURES = ("controls_auc", "kinds")
INQUIRY_FIGURES = ("replay_matrix", "beliefs", "plan")


def make_matrix() -> Table:
    """The replay matrix of two causes on two kinds of base."""
    rows = [
        (kind, cause, f"the {cause} cause", 4, *([share] * len(PARTS)), f"{share * 4:.0f} of 4")
        for kind in ("silent", "speaking")
        for cause, share in (("zero-b", 1.0), ("scale-up", 0.5))
    ]
    columns = ("base", "cause", "title", "replays", *PARTS, "whole v2 symptom")
    return Table(key="replay.matrix", columns=columns, rows=tuple(rows))


def make_beliefs() -> list[Record]:
    """Beliefs in two causes, and two plans."""
    columns = ("test", "what is done", "bits", "minutes", "in all", "leading answer right")
    steps = (("inspect", "look", 1.5, 1.0, 1.0, 0.5), ("v2", "ask", 0.5, 5.0, 6.0, 0.6))
    return [
        *(interval(f"diagnosis.cause.{cause}", 0.4) for cause in ("zero-b", "scale-up")),
        *(interval(f"diagnosis.after.final.{cause}", 0.2) for cause in ("zero-b", "scale-up")),
        *(
            Table(key=f"diagnosis.{plan}.steps", columns=columns, rows=steps)
            for plan in ("first", "path")
        ),
    ]


def make_kept() -> list[Record]:
    """A kept run of a base and one adapter."""
    reads = ("yes_no.{}.auc_yes_no", "v2.{}.auc_number", "v2.{}.auc_decoded")
    return [interval(read.format(name), 0.6) for name in ("base", "suspect") for read in reads]


def make_suite() -> list[Record]:
    """A suite of three adapters, one of which has no AUC, and an ensemble."""
    rows = (("suspect", "dropped"), ("reference", "kept"), ("donor adapter", "dropped"))
    names = ("base alone", "suspect", "reference", "ensemble of the kept")
    return [
        Table(key="suite.adapters", columns=("adapter", "verdict"), rows=rows),
        *(interval(f"suite.auc.{name}", 0.7) for name in names),
    ]


def make_attribution() -> list[Record]:
    """An adapter and one control on two bases."""
    names = ("the adapter", "layers permuted")
    return [
        interval(f"membership.example.base {place}.{name}", value)
        for place, value in ((1, 0.8), (2, -0.3))
        for name in names
    ]


def make_records(rows: int) -> dict[str, list[Record]]:
    """Records of the notebooks that have figures, a few rows each."""
    runs = {
        stem: [
            *answers("suspect", prompt, rows=rows),
            *(interval(f"{prompt}.stage.{s}", 0.5) for s in ("float", "pattern")),
            interval(f"{prompt}.parsed_strict", 0.4),
            *(interval(f"{prompt}.auc_{read}", 0.5) for read in ("decoded", "number")),
        ]
        for stem, prompt in (("v1", "v1"), ("v2", "v2"))
    }
    systems = ("base", "suspect", "reference")
    swap = [record for system in systems for record in answers(system, "v2", rows=rows)]
    reads = ("v2.auc_decoded", "v2.auc_number", "yes_no.auc_yes_no")
    refits = ("healthy", "ignored", "truncated", "padded")
    timing = ("row", "tokens", "seconds")
    knowing = {"verdict": "does not know", "because": "b"}
    ranking = ("auc_decoded", "auc_number", "auc_yes_no")
    asked = [f"{state}.{prompt}" for state in STATES for prompt in ("v1", "v2", "yes_no")]
    asked += [f"{kind}.v2" for kind in KINDS[1:]]
    columns = ("tensor", "on the base", "in the adapter", "fits")
    return runs | {
        "shape_mismatch": [
            Table(key="mismatch.donor-4b.shapes", columns=columns, rows=SHAPES),
            *(interval(f"mismatch.{r}.{e}", 0.5) for r in refits for e in ("kl", "flips")),
        ],
        "adapter_swap": [
            *swap,
            *(interval(f"swap.{system}.{read}", 0.7) for system in systems for read in reads),
        ],
        "files": [
            Table(
                key="forensics.row_table",
                columns=timing,
                rows=(("1", 370, 0.9), *((str(n), 280 + 30 * n, 0.2 + 0.01 * n) for n in range(8))),
            ),
            Measure(key="forensics.prompt_limit", value=512),
            interval("forensics.timing.per_token", 0.5),
            interval("forensics.timing.beside_reading", 0.08),
        ],
        "replay": [make_matrix()],
        "suite": make_suite(),
        "attribution": make_attribution(),
        "kept.smollm2": make_kept(),
        "diagnosis": make_beliefs(),
        "controls": [
            *(record for kind in KINDS for record in answers(kind, "v2", rows=rows)),
            *(interval(f"controls.{key}.{read}", 0.6) for key in asked for read in ranking),
            *(Verdict(key=f"controls.{kind}.v2.knowing", **knowing) for kind in KINDS),
        ],
    }


def make_files(
    rows: int = 12, *, change: Callable[[Record], Record | None] = lambda record: record
) -> dict[str, RecordFile]:
    """Record files as a run leaves them, each record changed or, for None, left out."""
    files = {}
    for stem, records in make_records(rows).items():
        kept = tuple(new for record in records if (new := change(record)) is not None)
        provenance = Provenance(
            notebook=stem,
            case="small",
            profile="p",
            parameters={},
            digests={},
            versions={},
            device="cpu",
            dtype="float32",
            seed=0,
        )
        files[stem] = RecordFile(
            path=Path(stem), provenance=provenance, records=kept, digest="0" * 16
        )
    return files


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    """All figures of complete records."""
    drawn, reasons = draw_all(make_files(), make_case())
    assert reasons == {}
    return drawn


def texts_of(svg: str) -> str:
    """All text of a drawing."""
    return " ".join(ET.fromstring(svg).itertext())


def pick(drawn: Sequence[Drawing], name: str) -> Drawing:
    """The drawing of that name."""
    return next(drawing for drawing in drawn if drawing.name == name)


def without_label(record: Record) -> Record:
    """A record as of a run on rows without labels."""
    if isinstance(record, Prediction):
        return record.model_copy(update={"label": None})
    if isinstance(record, Measure) and "auc" in record.key:
        return record.model_copy(update={"value": None, "low": None, "high": None})
    return record


def without_adapters(record: Record) -> Record | None:
    """A record as of a run that had the base alone."""
    if isinstance(record, Prediction) and record.system != "base":
        return None
    if isinstance(record, Measure) and record.key.startswith("suite."):
        return None
    if isinstance(record, Measure) and re.search(r"suspect|reference|mismatch", record.key):
        return record.model_copy(update={"value": None, "low": None, "high": None})
    return record


def test_every_figure_is_drawn_in_both_widths(drawings: list[Drawing]) -> None:
    """Complete records give every figure of the book, for a page and for a phone."""
    assert [drawing.name for drawing in drawings] == list(FIGURES)
    for drawing in drawings:
        assert 'viewBox="0 0 720' in drawing.wide
        assert 'viewBox="0 0 350' in drawing.narrow


def test_equal_records_give_equal_bytes(drawings: list[Drawing]) -> None:
    """Drawing is deterministic."""
    assert draw_all(make_files(), make_case())[0] == drawings


def test_ids_do_not_collide_on_one_page(drawings: list[Drawing]) -> None:
    """No two SVGs of one page share an id, and every reference finds its target."""
    svgs = [svg for drawing in drawings for svg in (drawing.wide, drawing.narrow)]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in svgs]
    assert len(set().union(*ids)) == sum(map(len, ids))
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) <= own


def test_svg_leaks_nothing_into_the_page(drawings: list[Drawing]) -> None:
    """An inlined SVG brings no prolog, style sheet, script, metadata, date or outside address."""
    for drawing in drawings:
        for svg in (drawing.wide, drawing.narrow):
            assert svg.startswith("<svg ")
            assert not re.search(r"<(\?xml|!DOCTYPE|style|script|metadata|image)", svg)
            assert set(re.findall(r"https?://[^\"\s]+", svg)) == {"http://www.w3.org/2000/svg"}


def test_colours_are_variables_only(drawings: list[Drawing]) -> None:
    """Every colour is a CSS variable with its fallback, so that one SVG serves both themes."""
    allowed = {f"var(--pm-{name},{colour})" for name, colour in FALLBACK.items()}
    for drawing in drawings:
        root = ET.fromstring(drawing.wide)
        styles = "".join(element.get("style", "") for element in root.iter())
        assert set(re.findall(r"var\([^)]*\)", styles)) <= allowed
        assert "#" not in re.sub(r"var\([^)]*\)|url\([^)]*\)", "", styles)


def test_text_stays_text_in_the_font_of_the_page(drawings: list[Drawing]) -> None:
    """Text is text of at least 11 px, and its font is left to the page."""
    for drawing in drawings:
        for svg in (drawing.wide, drawing.narrow):
            sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
            assert len(sizes) == svg.count("<text")
            assert min(sizes) >= 11
            assert "font-family" not in svg


def test_roles_keep_their_colour(drawings: list[Drawing]) -> None:
    """The hero shows truth, base, suspect and reference in the colours of their roles."""
    for role in ("truth", "base", "suspect", "reference"):
        assert f"var(--pm-{role}," in pick(drawings, "hero").wide


def test_alternative_text_holds_the_numbers(drawings: list[Drawing]) -> None:
    """The alternative text says what the figure shows, and labels the SVG."""
    alt = pick(drawings, "hero").alt
    assert "truth: 5 of 10 are 1" in alt
    assert "base alone: all 0.0" in alt
    for drawing in drawings:
        assert ET.fromstring(drawing.wide).get("aria-label") == drawing.alt


def test_untrusted_text_is_escaped() -> None:
    """Row ids and titles reach the page as text: no markup, no mathtext, no control characters."""

    def rename(record: Record) -> Record:
        if isinstance(record, Prediction):
            return record.model_copy(update={"row_id": EVIL + record.row_id, "system": EVIL})
        return record

    hypotheses = make_case().model_dump()["hypotheses"]
    hypotheses[0]["title"] = EVIL
    attempt = {"title": EVIL, "prompt": "v1", "decoding": {"max_new_tokens": 1}}
    attempt |= {"reported_parse_rate": 1.0, "reported_value": 0.0, "rows": 1}
    attempt |= {"grade": "log", "source": "s"}
    case = make_case(hypotheses=hypotheses, attempts={"v1": attempt})
    drawn, _ = draw_all(make_files(change=rename), case)
    for drawing in drawn:
        for svg in (drawing.wide, drawing.narrow):
            assert "<b>" not in svg
            assert "\u202e" not in texts_of(svg)
    assert 'a<b>&"$x_1$ ]]>' in texts_of(pick(drawn, "hero").narrow)
    assert "#f0000d" in texts_of(pick(drawn, "stages").wide)


def test_a_suite_is_drawn_by_verdict(drawings: list[Drawing]) -> None:
    """Adapters stand under what the suite made of them; one without an AUC is left out."""
    alt = pick(drawings, "suite").alt
    told = [alt.index(f"; {part}") for part in ("kept: reference", "dropped: suspect", "ensembles")]
    assert told == sorted(told)
    assert "donor" not in alt


def test_an_adapter_stands_beside_its_controls_on_each_base(drawings: list[Drawing]) -> None:
    """The figure of attribution has a block for each base, the adapter before its controls."""
    alt = pick(drawings, "membership").alt
    told = [alt.index(part) for part in ("base 1:", "the adapter", "layers permuted", "base 2:")]
    assert told == sorted(told)
    assert "−0.30" in alt


def test_absent_roles_are_said() -> None:
    """A system that is not available keeps its band, with the words; its figures say why not."""
    drawn, reasons = draw_all(make_files(change=without_adapters), make_case())
    assert texts_of(pick(drawn, "hero").wide).count("not available in this profile") == 4
    assert reasons.keys() == {"stages", "refits", "kinds", "suite"}
    assert "not available in this profile" in reasons["refits"]
    assert "not available in this profile" in reasons["kinds"]
    assert "base alone" in pick(drawn, "controls_auc").alt
    assert "suspect" not in pick(drawn, "controls_auc").alt


def test_missing_labels_are_said() -> None:
    """Without labels the hero says so, and what needs them is left out with that reason."""
    drawn, reasons = draw_all(make_files(change=without_label), make_case())
    assert "no labels" in texts_of(pick(drawn, "hero").wide)
    assert "no labels" in texts_of(pick(drawn, "swap_values").wide)
    assert reasons.keys() == {
        *("says_and_knows", "swap_auc", "controls_auc", "kinds", "suite", "real_models")
    }
    assert "without labels" in reasons["says_and_knows"]


def test_missing_files_are_said() -> None:
    """Without any records only the case's own figure is drawn; the others name the notebook."""
    drawn, reasons = draw_all({}, make_case(hypotheses=[]))
    assert drawn == []
    assert reasons.keys() == set(FIGURES)
    assert "shape_mismatch" in reasons["shapes"]


def test_run_speaks_where_the_base_does_not() -> None:
    """Without the swap, what is written and known is shown for the second run's own system."""
    files = make_files()
    drawn, reasons = draw_all({stem: files[stem] for stem in STEMS[:3]}, make_case())
    assert "suspect, prompt v2" in pick(drawn, "says_and_knows").alt
    assert reasons.keys() == {
        "hero",
        "swap_values",
        "swap_auc",
        "row_time",
        "real_models",
        "suite",
        "membership",
        *CONTROL_FIGURES,
        *INQUIRY_FIGURES,
    }


def test_the_clock_is_drawn_only_where_a_line_was_fitted() -> None:
    """Without times, or with too few of them for a line, the figure says so."""

    def unfitted(record: Record) -> Record:
        if isinstance(record, Measure) and record.key.startswith("forensics.timing"):
            return record.model_copy(update={"value": None, "low": None, "high": None})
        return record

    def emptied(record: Record) -> Record:
        found = isinstance(record, Table) and record.key == "forensics.row_table"
        return record.model_copy(update={"rows": ()}) if found else record

    for change in (unfitted, emptied):
        _, reasons = draw_all(make_files(change=change), make_case())
        assert reasons.keys() == {"row_time"}
        assert "no log on record" in reasons["row_time"]


def test_the_clock_keeps_the_first_row_and_the_limit(drawings: list[Drawing]) -> None:
    """The row that warms up is told apart, and the limit of the prompts stands in the figure."""
    shown = texts_of(pick(drawings, "row_time").wide)
    assert "first row: 0.9 s, above the scale" in shown
    assert "limit 512" in shown
    assert "beside reading: 80 [72, 88] ms" in shown


@pytest.mark.parametrize("rows", [1, 2, 1500])
def test_any_number_of_rows_is_drawn(rows: int) -> None:
    """One row, two and many give every figure."""
    drawn, reasons = draw_all(make_files(rows), make_case())
    assert reasons == {}
    assert len(drawn) == len(FIGURES)


def test_one_class_is_drawn() -> None:
    """Labels of one class give strips with one empty lane, not an error."""

    def same(record: Record) -> Record:
        new = {"label": 0} if isinstance(record, Prediction) else {}
        return without_label(record).model_copy(update=new)

    drawn, reasons = draw_all(make_files(change=same), make_case())
    assert "AUC not available" in pick(drawn, "says_and_knows").alt
    assert "AUC not available" in pick(drawn, "kinds").alt
    assert reasons.keys() == {"swap_auc", "controls_auc", "suite", "real_models"}


def test_sums_above_a_hundred_are_called_out() -> None:
    """Only confidences that sum to more than 100 % are called no probabilities."""
    drawn, _ = draw_all({}, make_case())
    assert "sum 180 %" in texts_of(drawn[0].wide)
    assert "not probabilities" in texts_of(drawn[0].wide)
    modest = make_case().model_dump()["hypotheses"][:1]
    drawn, _ = draw_all({}, make_case(hypotheses=modest))
    assert "not probabilities" not in texts_of(drawn[0].wide)


def test_saving_writes_both_widths_and_the_list(drawings: list[Drawing], tmp_path: Path) -> None:
    """Saving leaves two files a figure, and the alternative texts and reasons in figures.json."""
    save_drawings(drawings[:1], {"stages": "no records"}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "figures.json",
        "hero.wide.svg",
        "hero.narrow.svg",
    }
    assert (tmp_path / "hero.wide.svg").read_text(encoding="utf-8") == drawings[0].wide
    listed = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert listed == {"alt": {"hero": drawings[0].alt}, "missing": {"stages": "no records"}}


def test_every_row_is_in_a_dot() -> None:
    """Dots stand for all rows: however many there are, they fit and none is lost."""
    scale = Scale((0, 1), str)
    for count in (1, 7, 90, 4000):
        lane = Lane("all", [0.5] * count, True)
        bins = Bins(scale, (0.0, 100.0), 10, height=40).packed([lane])
        dots = bins.stack(count)
        assert len(dots) * bins.rows_a_dot >= count
        assert max(rise for _, rise in dots) <= 40


def test_values_stand_inside_the_scale() -> None:
    """A value outside its scale is drawn at the edge."""
    scale = Scale((0, 1), str)
    assert [scale.place(value, (10, 20)) for value in (-5, 0.5, 7)] == [10, 15, 20]


def test_what_is_not_all_is_not_rounded_to_all() -> None:
    """A share below one is not written as 100, and a small divergence not as zero."""
    assert [say_share(value) for value in (0.0, 0.99996, 1.0)] == ["0.0", "99.9", "100.0"]
    assert [say_nats(value) for value in (0.0, 0.00002, 0.2)] == ["0.000", "2e-05", "0.200"]


def test_three_bases_are_told_apart_by_word(drawings: list[Drawing]) -> None:
    """Each base of the teaching figure is named with its word and both of its rankings."""
    drawing = pick(drawings, "kinds")
    for name in ("base alone", "speaking base", "ignorant base"):
        assert f"{name}, does not know: writes AUC 0.60 [0.54, 0.66], holds AUC" in drawing.alt
        assert name in texts_of(drawing.narrow)


def test_an_adapter_is_drawn_off_and_on(drawings: list[Drawing]) -> None:
    """Each prompt shows the base alone and either adapter off and on, by both read-outs."""
    drawing = pick(drawings, "controls_auc")
    for name in ("base alone", "suspect, off", "suspect, on", "reference, off", "reference, on"):
        assert drawing.alt.count(name) == 6


def test_roles_of_systems() -> None:
    """A base or an adapter takes its role's mark; one of no known role is under suspicion."""
    systems = {
        "base": "base",
        "speaking_base": "base",
        "donor_base": "donor",
        "donor_adapter": "donor",
        "reference": "reference",
        "suspect_disabled": "suspect",
        "no_op": "suspect",
    }
    assert {system: role_of(system) for system in systems} == systems


def test_clean_text_is_one_printable_line() -> None:
    """Untrusted text is cut to its limit, on one line."""
    assert clean("a\nb\x00c") == "a b c"
    assert clean("x" * 99, 5) == "xxxx…"


def test_the_matrix_names_the_causes_that_give_all(drawings: list[Drawing]) -> None:
    """The causes that show the whole symptom in every replay are told, and stand on top."""
    drawn = pick(drawings, "replay_matrix")
    assert "silent base: zero-b; speaking base: zero-b" in drawn.alt
    shown = texts_of(drawn.wide)
    assert shown.index("zero b") < shown.index("scale up")
    assert "v1 half parsed" in shown
    assert "v1 half parsed" not in texts_of(drawn.narrow)


def test_beliefs_and_plans_tell_their_numbers(drawings: list[Drawing]) -> None:
    """Beliefs show their intervals, and a plan adds up its bits."""
    assert "0.40 [0.36, 0.44]" in " ".join(texts_of(pick(drawings, "beliefs").wide).split())
    assert "v2 6 min 2.0 bits" in pick(drawings, "plan").alt
