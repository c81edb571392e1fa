"""The site of a case: which notebooks run for it, which pages stand in it, where it is built."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from postmortem.case.schema import Case, Profile

BUILD = Path("_build")
# The kept runs of each profile, and the folder of its replays, which hold one record for each
# training of the models.
RESULTS, REPLAYS = Path("results"), "replays"
NOTEBOOKS = Path("notebooks")
# Where the files lie that every site takes: styles and pictures.
BOOK = Path("book")
# The pages that `postmortem new` copies; they serve a case that has none of its own.
SCAFFOLD = Path(__file__).with_name("scaffold")
TOC = "_toc.yml"
# What a folder of pages may hold beside them: nothing else is copied from it.
PAGES = {".md", ".svg", ".png", ".jpg", ".jpeg", ".gif", ".webp"}


@dataclass(frozen=True)
class NotebookRun:
    """One run of a notebook: its records and its page bear the name.

    `parameters` are what sets it apart from other runs of the same notebook. `earlier` names the
    run whose records it reads; a run that `asks` loads a model, and one that `learns` reads the
    kept replays.
    """

    name: str
    notebook: Path
    parameters: Mapping[str, str] = field(default_factory=dict)
    earlier: str = ""
    asks: bool = True
    learns: bool = False


def list_runs(case: Case) -> tuple[NotebookRun, ...]:
    """The runs that a case's pages are made of: the same notebooks for every case.

    Each attempt is run, or each prompt of a case without attempts. What a case says nothing of is
    not run: true sizes, replays of its causes. The checker is shown on the project's own site.
    """
    attempts = list(case.attempts or case.prompts)
    earlier = dict(zip(attempts[1:], attempts[:-1], strict=True)) if case.attempts else {}
    learns = any(profile.replays for profile in case.profiles.values())
    return (
        NotebookRun("files", NOTEBOOKS / "files.ipynb", asks=False),
        *([NotebookRun("check", NOTEBOOKS / "check.ipynb", asks=False)] if case.pages else []),
        *(
            NotebookRun(
                name if case.attempts else f"attempt_{name}",
                NOTEBOOKS / "attempt.ipynb",
                parameters={"attempt": name},
                earlier=earlier.get(name, ""),
            )
            for name in attempts
        ),
        *(
            [NotebookRun("shape_mismatch", NOTEBOOKS / "shape_mismatch.ipynb")]
            if case.true_size
            else []
        ),
        NotebookRun("adapter_swap", NOTEBOOKS / "adapter_swap.ipynb"),
        NotebookRun("controls", NOTEBOOKS / "controls.ipynb"),
        *([NotebookRun("replay", NOTEBOOKS / "replay.ipynb", learns=True)] if learns else []),
        NotebookRun("diagnosis", NOTEBOOKS / "diagnosis.ipynb", asks=not learns, learns=learns),
    )


@dataclass(frozen=True)
class Site:
    """What a site is made of.

    The files of `prose`, which lie below `pages`, are copied under `place` in the staged tree, and
    `toc` to its root. jupyter-book builds into `out/_build`. A `title` takes the place of the
    project's own.
    """

    runs: tuple[NotebookRun, ...]
    pages: Path
    prose: tuple[Path, ...]
    toc: Path
    place: str
    staged: Path
    out: Path
    summary: Path
    title: str = ""

    @property
    def html(self) -> Path:
        """Where the built pages lie."""
        return self.out / "_build/html"


def site_of(path: str | Path, case: Case) -> Site:
    """The site of the case in a file.

    A case that names its pages is the project's own site. Any other takes the folder of pages
    beside its file, by the file's name, or the packaged pages where there is none, and is built in
    a folder of its own.
    """
    if case.pages:
        pages = Path(case.pages)
        return Site(
            runs=list_runs(case),
            pages=pages,
            prose=_files(pages),
            toc=Path(TOC),
            place=pages.name,
            staged=BUILD / "site",
            out=Path(),
            summary=BUILD / "book.json",
        )
    beside = Path(path).with_suffix("")
    pages = beside if (beside / TOC).is_file() else SCAFFOLD
    folder = BUILD / "cases" / case.name
    return Site(
        runs=list_runs(case),
        pages=pages,
        prose=tuple(file for file in _files(pages) if file.suffix.lower() in PAGES),
        toc=pages / TOC,
        place="",
        staged=folder / "site",
        out=folder,
        summary=folder / "book.json",
        title=case.title,
    )


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file())


def kept_names(profile: Profile, *, worlds: int = 1) -> list[str]:
    """What is kept of a profile: the heavy notebooks, and the replays of so many worlds.

    The benchmark is not among them: it takes a quiet machine, and a command of its own.
    """
    names = ["real_model"] if profile.recorded else []
    if profile.replays:
        names += [f"{REPLAYS}/{seed}" for seed in range(profile.seed, profile.seed + worlds)]
        names += ["suite", "attribution", "catalogue"]
    return names


def list_kept(profile: str) -> dict[str, Path]:
    """A profile's kept records by name: `suite`, or `replays/0` for those of a training."""
    folder = RESULTS / profile
    found = sorted([*folder.glob("*.jsonl"), *folder.glob(f"{REPLAYS}/*.jsonl")])
    return {str(path.relative_to(folder).with_suffix("")): path for path in found}
