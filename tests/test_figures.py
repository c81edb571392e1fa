"""The figures of the book: what they show, what they say, and what they leave on a page."""

import json
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.text import Text

from postmortem.book import figures
from postmortem.book.canvas import FALLBACK, FigureSource, draw_each, save_drawings
from postmortem.book.figures import (
    FIGURES,
    FIGURES_OWN,
    PARTS,
    SYSTEMS,
    draw_all,
    log_odds_by_system,
    values_by_system,
)
from postmortem.case.load import load_case
from postmortem.experiments.records import (
    STATES,
    Measure,
    Prediction,
    Record,
    RecordFile,
    Table,
    Verdict,
)

ROOT = Path(__file__).parents[1]
CASE = load_case(ROOT / "cases/qwen-lora.yml")
EVERY = {**FIGURES, **FIGURES_OWN}
KINDS = ("base", "speaking_base", "ignorant_base")
SHAPES = (
    ("self_attn.q_proj.lora_A", "4×32", "4×48", "no"),
    ("self_attn.q_proj.lora_B", "32×4", "64×4", "no"),
    ("self_attn.v_proj.lora_A", "4×32", "4×48", "no"),
    ("self_attn.v_proj.lora_B", "8×4", "16×4", "no"),
)
EVIL = 'a<b>&"$x_1$ ]]>\u202e\x00#f0000d'
TOLD = {"stage": "float", "group": "rule", "token_ids": (1,), "prompt_tokens": 9}
TOLD |= {"full_prompt_tokens": 9, "finished": True, "yes_no_log_odds": 0.0}


def answers(system, prompt, rows):
    """A system on alternating labels: 0.0 throughout, or the label where it is the reference."""
    found = []
    for row in range(rows):
        value = 0.1 + 0.8 * (row % 2) if system == "reference" else 0.0
        values = dict.fromkeys(("value", "strict_value", "expected_value"), value)
        odds = {"number_log_odds": -3.0 + row % 2 + 0.01 * row, "text": str(value)}
        place = {"system": system, "prompt": prompt, "row_id": str(2029 + row), "label": row % 2}
        found.append(Prediction(**TOLD, **place, **values, **odds))
    return found


def intervals(value, keys):
    """Measures with an interval around one value."""
    ends = {"value": value, "low": 0.9 * value, "high": min(1.0, 1.1 * value)}
    return [Measure(key=key, **ends, n=12) for key in keys]


def table(key, columns, *rows):
    """A recorded table."""
    return Table(key=key, columns=columns.split(", "), rows=rows)


def list_runs(rows):
    """Records of the notebooks that show answers."""
    reads = ("v2.auc_decoded", "v2.auc_number", "v2.auc", "yes_no.auc_yes_no")
    ranks = ("v2.auc_decoded", "v2.auc_number", "yes_no.auc_decoded", "yes_no.auc_yes_no")
    moves = [f"{name}.{m}" for name in ("suspect.yes_no", "zero_b") for m in ("shift", "auc")]
    asked = [f"{system}.{rank}" for system in (*STATES, *KINDS[1:]) for rank in ranks]
    know = {"verdict": "does not know", "because": "b"}
    runs = {
        "adapter_swap": [
            *(answer for system in SYSTEMS for answer in answers(system, "v2", rows)),
            *intervals(0.7, [f"swap.{system}.{read}" for system in SYSTEMS for read in reads]),
        ],
        "controls": [
            *(answer for kind in KINDS for answer in answers(kind, "v2", rows)),
            *intervals(0.6, [f"controls.{place}" for place in (*asked, *moves)]),
            *(Verdict(key=f"controls.{kind}.v2.knowing", **know) for kind in KINDS),
        ],
    }
    for name in ("v1", "v2"):
        stages = intervals(0.5, [f"{name}.stage.float", f"{name}.stage.pattern"])
        strict = intervals(0.4, [f"{name}.parsed_strict"])
        runs[name] = [*answers("suspect", name, rows), *stages, *strict]
    return runs


def list_findings():
    """Records of the notebooks that show measures alone."""
    refits = [f"{r}.{e}" for r in ("healthy", "ignored", "padded") for e in ("kl", "flips")]
    timed = [("1", 370, 0.9), *((str(n), 280 + 30 * n, 0.2 + 0.01 * n) for n in range(8))]
    gains = [f"membership.example.base {n}" for n in (1, 2)]
    causes = {"zero-b": 1.0, "scale-up": 0.5}
    matrix = [
        (kind, cause, f"the {cause} cause", *([share] * len(PARTS)), f"{4 * share:.0f} of 4")
        for kind in ("silent", "speaking")
        for cause, share in causes.items()
    ]
    columns = ", ".join(("base, cause, title", *PARTS, "whole v2 symptom"))
    verdicts = [("suspect", "dropped"), ("reference", "kept"), ("donor adapter", "dropped")]
    ranked = ("base alone", "suspect", "reference", "ensemble of the kept")
    kept = [f"{prompt}.base.auc_{r}" for prompt, r in (("yes_no", "yes_no"), ("v2", "number"))]
    return {
        "shape_mismatch": [
            table("mismatch.qwen3-4b.shapes", "tensor, on the base, in the adapter, fits", *SHAPES),
            *intervals(0.5, [f"mismatch.{name}" for name in refits]),
        ],
        "files": [
            table("forensics.row_table", "row, tokens, seconds", *timed),
            Measure(key="forensics.prompt_limit", value=512),
            *intervals(0.5, ["forensics.timing.per_token"]),
            *intervals(0.08, ["forensics.timing.beside_reading"]),
        ],
        "replay": [table("replay.matrix", columns, *matrix)],
        "suite": [
            table("suite.adapters", "adapter, verdict", *verdicts),
            *intervals(0.7, [f"suite.auc.{name}" for name in ranked]),
        ],
        "attribution": [
            *intervals(0.8, [f"{gains[0]}.the adapter", f"{gains[0]}.layers permuted"]),
            *intervals(-0.3, [f"{gains[1]}.the adapter", f"{gains[1]}.layers permuted"]),
        ],
        "kept.smollm2": intervals(0.6, kept),
        "diagnosis": [
            *intervals(0.4, [f"diagnosis.cause.{cause}" for cause in causes]),
        ],
    }


def make_source(rows=12, *, change=lambda record: record, case=CASE):
    """What the figures draw from, each record changed or, for None, left out."""
    files = {}
    for stem, records in (list_runs(rows) | list_findings()).items():
        changed = [new for record in records if (new := change(record))]
        files[stem] = RecordFile.model_construct(records=tuple(changed))
    return FigureSource(files, case)


def draw(names, source):
    """The drawings of some figures by name, and the reasons for those that cannot be drawn."""
    drawings, reasons = draw_each({name: EVERY[name] for name in names}, source)
    return {drawing.name: drawing for drawing in drawings}, reasons


@pytest.fixture(scope="module")
def made():
    """Every figure of complete records as drawn, by name, and the texts that matplotlib wrote."""
    texts, write = {}, Text.draw

    def watched(self, renderer):
        if self.get_visible() and self.get_text().strip():
            texts.setdefault(self.get_figure(root=True), set()).add(self)
        write(self, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", watched)
        drawings, reasons = draw(EVERY, make_source())
    assert reasons == {}
    return drawings, texts


def svgs(made):
    """All SVGs of the complete records."""
    return [svg for drawing in made[0].values() for svg in (drawing.wide, drawing.narrow)]


def words(svg):
    """All text of a drawing."""
    return " ".join(" ".join(ET.fromstring(svg).itertext()).split())


def unlabelled(record: Record):
    """A record as of a run on rows without labels."""
    if isinstance(record, Measure) and "auc" in record.key:
        return None
    blank = {"label": None} if isinstance(record, Prediction) else {}
    return record.model_copy(update=blank)


def base_alone(record: Record):
    """A record as of a run that had the base alone, or None."""
    key = getattr(record, "key", "")
    adapter = re.search(r"suspect|reference|mismatch\.\w+\.(kl|flips)|suite|shift", key)
    return None if adapter or getattr(record, "system", "base") != "base" else record


def test_complete_records_give_every_figure_for_page_and_phone(made):
    """Each figure is drawn in both widths and says its numbers to who does not see it."""
    assert made[0].keys() == EVERY.keys()
    for drawing in made[0].values():
        assert 'viewBox="0 0 720' in drawing.wide
        assert 'viewBox="0 0 350' in drawing.narrow
        assert ET.fromstring(drawing.narrow).get("aria-label") == drawing.alt


def test_no_text_is_cut_or_covered(made):
    """In matplotlib's font, wider than the page's, all text is inside and apart from other text."""
    bad = []
    for figure, texts in made[1].items():
        boxes = [(t.get_text(), t.get_window_extent().padded(-2)) for t in texts]
        bad += [said for said, b in boxes if b.x0 < -3 or b.x1 > figure.bbox.width + 3]
        bad += [(one, two) for (one, a), (two, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert bad == []


def test_ids_do_not_collide_on_one_page(made):
    """No two SVGs share an id, and every reference finds its target."""
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in svgs(made)]
    assert len(set().union(*ids)) == sum(map(len, ids))
    for svg, own in zip(svgs(made), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([\w-]+)', svg)) <= own


def test_an_svg_leaks_nothing_into_its_page(made):
    """No prolog, style sheet, script, metadata, image, font or outside address comes with it."""
    for svg in svgs(made):
        assert svg.startswith("<svg ")
        assert not re.search(r"<(\?xml|!DOCTYPE|style|script|metadata|image)|font-family", svg)
        assert set(re.findall(r"https?://[^\"\s]+", svg)) == {"http://www.w3.org/2000/svg"}


def test_colours_are_variables_and_text_is_legible_text(made):
    """Every colour is a variable with its fallback; text is text of at least 11 px."""
    allowed = {f"var(--pm-{name},{colour})" for name, colour in FALLBACK.items()}
    for svg in svgs(made):
        styles = "".join(element.get("style", "") for element in ET.fromstring(svg).iter())
        assert set(re.findall(r"var\([^)]*\)", styles)) <= allowed
        assert "#" not in re.sub(r"var\([^)]*\)|url\([^)]*\)", "", styles)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert len(sizes) == svg.count("<text")
        assert min(sizes) >= 11


def test_untrusted_text_is_escaped():
    """Row ids, systems and titles are text: no markup, no mathtext, no control characters."""

    def rename(record):
        if isinstance(record, Prediction):
            return record.model_copy(update={"row_id": EVIL + record.row_id, "system": EVIL})
        return record

    titled = {name: a.model_copy(update={"title": EVIL}) for name, a in CASE.attempts.items()}
    evil = CASE.model_copy(update={"attempts": titled})
    drawn, _ = draw(("stages", "says_and_knows"), make_source(change=rename, case=evil))
    for drawing in drawn.values():
        for svg in (drawing.wide, drawing.narrow):
            assert "<b>" not in svg
            assert 'a<b>&"$x_1$ ]]>' in words(svg)
            assert "\u202e" not in words(svg)
    assert "#f0000d" in words(drawn["stages"].wide)


SAID = {
    "incident": ("truth: 5 of 10 are 1", "attempt 1: all 0.0, as recalled", "attempt 2: all 0.0"),
    "hero": ("truth: 5 of 10 are 1", "v1 run: suspect, all 0.0", "reference: 2 values"),
    "swap_values": ("base alone: all 0.0", "reference: 2 values"),
    "log_odds": ("base alone: AUC 0.70 [0.63, 0.77]",),
    "stages": ("float 50.0 [45.0, 55.0]", "whole answer 40.0 [36.0, 44.0]"),
    "suite": ("base alone 0.70", "kept: reference", "dropped: suspect", "ensembles: of the kept"),
    "membership": ("base 1: the adapter 0.80", "base 2: the adapter −0.30"),
    "kinds": ("ignorant base, does not know: writes AUC 0.60 [0.54, 0.66], holds AUC",),
    "controls_auc": ("base alone 0.60", "suspect, off 0.60", "reference, on 0.60"),
    "shapes": ("q_proj 64×48 of the adapter for Qwen3-4B", "0 of the 4 LoRA tensors"),
    "row_time": ("First row, 370 tokens: 0.9 s", "80 [72, 88] ms"),
    "replay_matrix": ("silent base: zero-b; speaking base: zero-b",),
    "beliefs": ("zero b 0.40 [0.36, 0.44]",),
}


@pytest.mark.parametrize("name", SAID)
def test_the_alternative_text_holds_the_numbers(made, name):
    """What a figure shows is said in its order."""
    alt = made[0][name].alt
    places = [alt.index(part) for part in SAID[name]]
    assert places == sorted(places)


def test_a_real_base_stands_beside_the_incident():
    """A base that wrote one value on the incident's rows has it on each; of another the count."""
    held = {"test.rows": 10, "test.v2.base.distinct": 1, "test.v2.base.top_value": 0.0}
    several = held | {"test.v2.base.distinct": 4}
    files = {
        f"kept.{name}": RecordFile.model_construct(
            records=tuple(Measure(key=key, value=value) for key, value in found.items())
        )
        for name, found in (("qwen-coder", held), ("smollm2", several))
    }
    drawn, _ = draw(("incident",), FigureSource(files, CASE))
    assert "Qwen2.5-Coder: alone: all 0.0." in drawn["incident"].alt
    assert "SmolLM2: alone: 4 values." in drawn["incident"].alt


def test_what_a_run_lacks_is_said():
    """An absent system keeps its band with the words; a figure that needs it says why not."""
    drawn, reasons = draw(("hero", "refits", "kinds", "suite"), make_source(change=base_alone))
    assert words(drawn["hero"].wide).count("not available in this profile") == 4
    assert reasons.keys() == {"refits", "suite", "kinds"}
    drawn, reasons = draw(
        ("hero", "swap_values", "says_and_knows", "swap_auc", "kinds", "real_models"),
        make_source(change=unlabelled),
    )
    assert all("no labels" in words(drawing.wide) for drawing in drawn.values())
    assert drawn.keys() == {"hero", "swap_values"}
    assert "without labels" in reasons["says_and_knows"]


def test_without_records_each_figure_says_what_is_missing():
    """Without records the case's own figure alone is drawn; the others say why they are not."""
    drawn, reasons = draw_all({}, CASE)
    assert [drawing.name for drawing in drawn] == ["incident"]
    assert reasons.keys() == FIGURES.keys() - {"incident"}
    assert "shape_mismatch" in reasons["shapes"]
    own = CASE.model_copy(update={"attempts": {}})
    assert draw_all({}, own)[1].keys() == FIGURES_OWN.keys()


@pytest.mark.parametrize("rows", [1, 1500])
def test_any_number_of_rows_is_drawn_to_the_same_bytes(rows):
    """One row and many give the figures that show rows, and drawing is deterministic."""
    source, names = make_source(rows), ("hero", "says_and_knows")
    drawn, reasons = draw(names, source)
    assert drawn.keys() == {*names}
    assert draw(names, source) == (drawn, reasons)


def test_saving_writes_both_widths_and_the_list(made, tmp_path):
    """Saving leaves two files a figure, and the alternative texts and reasons in figures.json."""
    hero = made[0]["hero"]
    save_drawings([hero], {"stages": "no records"}, tmp_path)
    assert (tmp_path / "hero.wide.svg").read_text(encoding="utf-8") == hero.wide
    assert (tmp_path / "hero.narrow.svg").read_text(encoding="utf-8") == hero.narrow
    listed = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert listed == {"alt": {"hero": hero.alt}, "missing": {"stages": "no records"}}


def test_what_is_not_all_is_not_rounded_to_all():
    """A share below one is not written as 100, nor a small divergence as zero."""
    assert [figures.say_share(v) for v in (0.0, 0.99996, 1.0)] == ["0.0", "99.9", "100.0"]
    assert [figures.say_nats(v) for v in (0.0, 0.00002, 0.2)] == ["0.000", "2e-05", "0.200"]


def test_a_system_takes_the_mark_of_its_role():
    """A base or an adapter takes its role's mark; one of no known role is under suspicion."""
    roles = {"speaking_base": "base", "donor_base": "donor", "donor_adapter": "donor"}
    roles |= {"reference": "reference", "suspect_disabled": "suspect", "no_op": "suspect"}
    assert {system: figures.role_of(system) for system in roles} == roles


def test_answers_are_drawn_without_any_record():
    """A notebook draws the answers that it has, by system, and shows the SVG of the pages."""
    given = {
        name: SimpleNamespace(predictions=answers(name, "v2", 12), contract="number")
        for name in ("base", "reference")
    }
    values, odds = values_by_system(given), log_odds_by_system(given)
    assert "base: 12 rows. reference: 12 rows." in values.alt
    for drawing in (values, odds):
        assert drawing._repr_html_() == drawing.wide
        assert drawing.wide.startswith("<svg")
        assert "var(--pm-reference" in drawing.wide
