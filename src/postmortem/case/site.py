"""The site of a case: which notebooks run for it, which pages stand in it, where it is built."""

from dataclasses import dataclass
from pathlib import Path

from postmortem.case.schema import Case, Profile

BUILD = Path("_build")
# The kept runs of each profile, and the folder of its replays, which hold one record for each
# training of the models.
RESULTS, REPLAYS = Path("results"), "replays"
# The notebooks of the full form's case, and those that any case in the short form takes.
NOTEBOOKS = Path("notebooks")
ANY = NOTEBOOKS / "any"
BOOK = Path("book")
# The pages that `postmortem new` copies; they serve a case that has none of its own.
SCAFFOLD = Path(__file__).with_name("scaffold")
TOC = "_toc.yml"
# What a folder of pages may hold beside them: nothing else is copied from it.
PAGES = {".md", ".svg", ".png", ".jpg", ".jpeg", ".gif", ".webp"}


@dataclass(frozen=True)
class Site:
    """What a site is made of.

    The files of `prose`, which lie below `pages`, are copied under `place` in the staged tree, and
    `toc` to its root. jupyter-book builds into `out/_build`. A `title` takes the place of the
    project's own.
    """

    notebooks: tuple[Path, ...]
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

    One in the short form takes the folder of pages beside its file, by the file's name, or the
    packaged pages where there is none, and is built in a folder of its own.
    """
    if not case.own:
        return Site(
            notebooks=tuple(sorted(NOTEBOOKS.glob("*.ipynb"))),
            pages=BOOK,
            prose=_files(BOOK),
            toc=Path(TOC),
            place="book",
            staged=BUILD / "site",
            out=Path(),
            summary=BUILD / "book.json",
        )
    beside = Path(path).with_suffix("")
    pages = beside if (beside / TOC).is_file() else SCAFFOLD
    folder = BUILD / "cases" / case.name
    return Site(
        notebooks=tuple(sorted(ANY.glob("*.ipynb"))),
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
