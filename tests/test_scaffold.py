import own
import pytest

from postmortem.case.layout import SCAFFOLD, site_of
from postmortem.case.load import load_case
from postmortem.case.new import Known, create_case, quote, write_case
from postmortem.checker.errors import CaseError, DataError
from postmortem.cli import main

HOSTILE = (
    'He said "no": {#}\n- a: &b *c %d `e` \\ <script>alert(1)</script> \u2028 \x07 \N{SNOWMAN} ü'
)


def test_a_new_case_is_filled_in_from_one_line(tmp_path):
    """What is given stands in 25 lines at most, with pages beside; alone it takes the packaged."""
    own.write_rows(tmp_path / "rows.csv")
    known = Known(
        base="models/base",
        suspect="org/adapter",
        data=str(tmp_path / "rows.csv"),
        text="text",
        label="label",
        question="Is this good? {text}",
    )
    file, *pages = create_case("films", known, folder=tmp_path / "cases")
    case = load_case(file)
    assert not case.attempts
    assert (case.systems.base.name, case.systems.suspect.name) == ("models/base", "org/adapter")
    assert (case.columns.text, case.columns.label) == ("text", "label")
    assert case.prompt(case.asked).template == "Is this good? {text}"
    assert len(file.read_text().splitlines()) <= 25
    assert {page.name for page in pages} == {p.name for p in SCAFFOLD.iterdir()}
    assert site_of(file, case).pages == file.with_suffix("")
    alone = file.rename(tmp_path / "alone.yml")
    assert site_of(alone, case).pages == SCAFFOLD


def test_without_anything_known_each_line_says_what_to_fill_in(tmp_path):
    """An empty case has placeholders with comments, and it is a case by its form."""
    file, *_ = create_case("films", Known(), folder=tmp_path)
    assert load_case(file).asked == "ask"
    told = file.read_text()
    for key in ("base:", "suspect:", "data:", "# reference:", "# positive:", "# rows:"):
        assert f"\n{key}" in told


@pytest.mark.parametrize("contract", ["number", "yes_no", "choice", "class"])
def test_each_contract_has_a_prompt_that_holds_the_text(tmp_path, contract):
    """Whatever is asked for, the template holds the column of texts."""
    file, *_ = create_case("films", Known(contract=contract, text="review"), folder=tmp_path)
    prompt = load_case(file).prompt("ask")
    assert prompt.contract == contract
    assert "{review}" in prompt.template


def test_nothing_is_replaced(tmp_path):
    """An existing file, folder or broken link of that name is an error, and stays as it is."""
    (tmp_path / "one.yml").write_text("mine")
    (tmp_path / "two").mkdir()
    (tmp_path / "three.yml").symlink_to(tmp_path / "nowhere")
    for name in ("one", "two", "three"):
        with pytest.raises(CaseError, match="nothing is replaced"):
            create_case(name, Known(), folder=tmp_path)
    assert (tmp_path / "one.yml").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.yml", "three.yml", "two"]


ODD = ["", "Mine", "1st", "-a", "a/b", "../up", "a.yml", "a\nb", "a" * 61, "éclair", "имя"]
ODD += ["\N{SNOWMAN}", "a\x00b", "a\u202eb", "<b>", "a;rm", "My Great Adapter!"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_cannot_be_one_is_refused(tmp_path, name):
    """A name that is no key is refused in one printable line, with one that would do."""
    with pytest.raises(CaseError, match="small letters") as refused:
        create_case(name, Known(), folder=tmp_path)
    told = str(refused.value)
    assert told.isascii()
    assert told.isprintable()
    assert "For example" in told
    assert "my-great-adapter" in told or "Great" not in name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [HOSTILE, "no", "1", "null", "- x", "a: b", "'", "#", "[1"])
def test_any_text_comes_back_as_it_was_given(tmp_path, value):
    """A title, a folder or a column name is read back letter for letter, on a line of its own."""
    assert "\n" not in quote(value)
    known = Known(title=value, base=value, suspect=value, label=value, positive=value)
    file = tmp_path / "c.yml"
    file.write_text(write_case("c", known), encoding="utf-8")
    case = load_case(file)
    assert case.title == value.strip()
    assert case.systems.suspect.name == value.strip()
    assert case.columns.label == value.strip()
    assert case.columns.positive == value


@pytest.mark.parametrize(
    ("known", "error", "told"),
    [
        ({"text": "txt"}, DataError, "a column 'txt'"),
        ({"label": "lable"}, DataError, "lable"),
        ({"positive": "spam", "label": "label"}, DataError, "'spam'"),
        ({"data": "nowhere.csv"}, DataError, "nowhere.csv"),
        ({"text": "my text"}, CaseError, "letters, digits and _"),
        ({"contract": "essay"}, CaseError, "one of yes_no, number, choice, class"),
        ({"contract": "choice", "answers": "yes"}, CaseError, "two different words"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(tmp_path, known, error, told):
    """A misspelt column, label or contract is named, and no file is left behind."""
    own.write_rows(tmp_path / "rows.csv")
    given = {"data": str(tmp_path / "rows.csv"), "text": "text"} | known
    with pytest.raises(error, match=told):
        create_case("films", Known(**given), folder=tmp_path / "cases")
    assert not (tmp_path / "cases").exists()


def test_the_command_says_what_it_wrote_and_what_to_do_next(tmp_path, monkeypatch, capsys):
    """`postmortem new` prints the file, the pages and the next command; again it refuses."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["new", "films", "--base", "b", "--suspect", "s"])
    assert ended.value.code == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "case: cases/films.yml"
    assert told[-1] == "next: make book CASE=cases/films.yml"
    with pytest.raises(SystemExit) as ended:
        main(["new", "films"])
    assert ended.value.code == 2
    assert "postmortem: cases/films.yml: expected nothing there yet" in capsys.readouterr().err
