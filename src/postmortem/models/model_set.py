"""A world: the bases and adapters that a profile gives to each role, as folders on disk."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from postmortem.case.files import digest_file, write_text
from postmortem.case.schema import Case, Frozen, Profile
from postmortem.checker.errors import ModelError, RecordError, WeightsError, is_hub_id
from postmortem.models.packaged import find_weights

BASES = ("base", "donor_base", "sibling_base", "speaking_base", "ignorant_base")
ADAPTERS = ("suspect", "reference", "donor_adapter", "no_op")
# The chains of training whose adapters the replays are made from.
REPLAY_LINEAGES = ("silent", "speaking", "sibling", "donor")
# A base up to this size leaves room for another beside it, and notebooks side by side keep two
# cores busier than two threads in one.
SMALL = 1 << 30
# Files up to this size are digested whole; of larger ones size and both ends.
WHOLE, END = 64 << 20, 1 << 20
# An entry of the record that training leaves beside the weights; a mapping is an estimate.
Training = float | int | str | dict[str, float | int | str | None]


class Member(Frozen):
    """A role of the world: its folder and digest, or the reason why it is not available."""

    role: str
    path: str | None
    digest: str | None
    reason: str = ""
    training: dict[str, Training] = Field(default_factory=dict)


class World(Frozen):
    """The members of a profile's world by role, and the adapters of its replays.

    `replays` names an adapter by lineage, recipe and seed: `silent/numeric_0`.
    """

    case: str
    profile: str
    caveat: str
    seed: int
    members: dict[str, Member]
    replays: dict[str, Member] = Field(default_factory=dict)

    def has(self, role: str) -> bool:
        """Whether the role is available."""
        return self.members[role].path is not None

    def path(self, role: str) -> Path:
        """The folder of a role; `ModelError` with the reason where it is not available."""
        member = self.members[role]
        if member.path is None:
            raise ModelError(f"role {role}", expected="a folder", found=member.reason)
        return Path(member.path)

    @property
    def digest(self) -> str:
        """Digest of every member's files; where they lie does not count."""
        members = {**self.members, **self.replays}
        found = sorted((role, member.digest) for role, member in members.items())
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def resolve_world(
    case: Case,
    profile_name: str,
    *,
    adapters: Mapping[str, str] | None = None,
    trained: str = "",
    seed: int | None = None,
) -> World:
    """Find the folder of each role of a profile.

    `adapters` gives folders or hub ids by role that take the place of the profile's own.
    `trained` is another training of the profile's models, from another `seed`: a folder that takes
    the place of the one in which the shipped ones lie. Raises `ModelError` or `WeightsError` where
    a folder that the profile names is missing.
    """
    profile = case.profile(profile_name)
    named: dict[str, str] = {"base": profile.base}
    named |= {str(role): name for role, name in (*profile.bases.items(), *profile.adapters.items())}
    replays = profile.replays.adapters if profile.replays else ""
    if trained:
        shipped = Path(profile.base).parents[1]
        named = {role: _moved(name, shipped, trained) for role, name in named.items()}
        replays = _moved(replays, shipped, trained)
    named |= {role: name for role, name in (adapters or {}).items() if name}
    folders = {role: (find_base if role in BASES else find_adapter)(n) for role, n in named.items()}
    members = {role: _member(role, folders.get(role)) for role in (*BASES, *ADAPTERS)}
    return World(
        case=case.name,
        profile=profile_name,
        caveat=profile.caveat,
        seed=profile.seed if seed is None else seed,
        members=members,
        replays=_find_replays(Path(replays)) if replays else _own_replays(profile, members),
    )


def _moved(name: str, shipped: Path, trained: str) -> str:
    return str(Path(trained, Path(name).relative_to(shipped)))


def _own_replays(profile: Profile, members: Mapping[str, Member]) -> dict[str, Member]:
    """On one real base: its own adapters, whatever the base turns out to do, and the donor's."""
    recipes = {"numeric": members["reference"], "yes_no_short": members["suspect"]}
    found: dict[str, Member] = {}
    for name, folder in profile.replay_adapters.items():
        member = _member(name, find_adapter(folder))
        if name == "donor":
            found["donor/numeric_0"] = member
        else:
            recipes[name] = member
    for kind in ("silent", "speaking"):
        available = {name: m for name, m in recipes.items() if m.path is not None}
        found |= {f"{kind}/{name}_0": member for name, member in available.items()}
    return found


def _find_replays(adapters: Path) -> dict[str, Member]:
    folders = [
        folder
        for lineage in REPLAY_LINEAGES
        for folder in sorted((adapters / lineage).glob("*_[0-9]*"))
        if folder.is_dir()
    ]
    return {
        name: _member(name, folder)
        for folder in folders
        for name in [f"{folder.parent.name}/{folder.name}"]
    }


def find_base(source: str) -> Path:
    """The folder of a base named as `packaged:NAME`, as a folder, or as a hub id."""
    if source.startswith("packaged:"):
        return find_weights(source.removeprefix("packaged:"))
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise ModelError(source, expected="a model folder or a hub id", found="no such folder")
    return _from_hub(source)


def find_adapter(source: str) -> Path:
    """The folder of an adapter named as a folder or as a hub id."""
    if Path(source).exists() or not is_hub_id(source):
        return Path(source)
    return _from_hub(source)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            name,
            expected="a folder here, or a model on the hub or in its local cache",
            found=" ".join(str(error).split())[:200],
            remedy="Check the name and the network, or give a folder instead.",
        ) from None


def digest_model(folder: Path) -> str:
    """Digest of a model or adapter folder: small files whole, weights over 64 MiB by both ends."""
    parts = []
    for file in sorted(folder.iterdir()):
        if file.suffix not in {".json", ".safetensors", ".txt", ".jinja", ".model"}:
            continue
        size = file.stat().st_size
        if size <= WHOLE:
            parts.append(f"{file.name} {digest_file(file)}")
            continue
        with file.open("rb") as stream:
            state = hashlib.sha256(stream.read(END))
            stream.seek(-END, 2)
            state.update(stream.read(END))
        parts.append(f"{file.name} {size} {state.hexdigest()[:16]}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def role_name(role: str) -> str:
    """A role as it is written on a page."""
    return "no-op adapter" if role == "no_op" else role.replace("_", " ")


def folder_digests(profile: Profile, adapters: Iterable[str]) -> list[str]:
    """Digests of the folders that a profile or its user names, whose files may change in place."""
    sources = [profile.base, *profile.bases.values(), *profile.all_adapters.values(), *adapters]
    digests = [digest_model(Path(name)) for name in sources if name and Path(name).is_dir()]
    replays = _find_replays(Path(profile.replays.adapters)) if profile.replays else {}
    return [*digests, *(str(member.digest) for member in replays.values())]


def is_small(profile: Profile) -> bool:
    """Whether the base's weights are here and so few that one thread serves a notebook best."""
    try:
        folder = find_base(profile.base) if profile.base.startswith("packaged:") else profile.base
    except WeightsError:  # a step says what to do
        return False
    folder = Path(folder)
    weights = [*folder.glob("*.safetensors")] if folder.is_dir() else []
    return bool(weights) and sum(file.stat().st_size for file in weights) < SMALL


def check_members(world: World) -> None:
    """Raise `RecordError` where a member's files are not those that the world was described by."""
    for member in [*world.members.values(), *world.replays.values()]:
        if member.path is None:
            continue
        folder = Path(member.path)
        found = digest_model(folder) if folder.is_dir() else "no such folder"
        if found != member.digest:
            raise RecordError(
                f"{folder}, role {member.role}",
                expected=f"files with digest {member.digest}, as the records were made from",
                found=found,
                remedy="Run `make book` to make them again.",
            )


def write_world(world: World, path: str | Path) -> None:
    """Write the world's description."""
    write_text(path, world.model_dump_json(indent=1) + "\n")


def read_world(path: str | Path) -> World:
    """Read a world's description; `RecordError` where it is missing or altered beyond use."""
    try:
        return World.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(path, expected="a world description", found=str(error)[:200]) from None


def _member(role: str, folder: Path | None) -> Member:
    if folder is None:
        reason = f"this profile has no {role_name(role)}"
        return Member(role=role, path=None, digest=None, reason=reason)
    if not folder.is_dir():
        raise ModelError(folder, expected=f"the folder of role {role}", found="no such folder")
    training = folder / "training.json"
    return Member(
        role=role,
        path=str(folder.resolve()),
        digest=digest_model(folder),
        training=json.loads(training.read_text(encoding="utf-8")) if training.is_file() else {},
    )
