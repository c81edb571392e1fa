import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from postmortem.case.schema import Replays
from postmortem.checker.errors import ModelError, RecordError, WeightsError
from postmortem.models import model_set as world_module
from postmortem.models.model_set import (
    ADAPTERS,
    BASES,
    check_members,
    digest_model,
    find_base,
    folder_digests,
    is_small,
    read_world,
    resolve_world,
    write_world,
)

ROOT = Path(__file__).parents[1]
EMBEDDED = Path("results/embedded")


def make_folder(path, content="{}"):
    """A folder with a configuration, as a model or adapter has one."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    return path


@pytest.fixture
def trained(case, tmp_path):
    """Folders as another training of the embedded world has them."""
    profile, folder = case.profile("embedded"), tmp_path / "trained"
    roles = {"base": profile.base, **profile.bases, **profile.adapters}
    for role, name in roles.items():
        make_folder(folder / Path(name).relative_to(EMBEDDED), json.dumps({"role": role}))
    return folder


@pytest.fixture
def local(case, tmp_path):
    """The case with a profile whose base and suspect are folders."""
    adapters = {"suspect": str(make_folder(tmp_path / "suspect"))}
    base = str(make_folder(tmp_path / "base"))
    changes = {"base": base, "bases": {}, "adapters": adapters, "replays": None}
    profile = case.profile("embedded").model_copy(update=changes)
    return case.model_copy(update={"profiles": {"local": profile}})


def test_the_shipped_world_has_every_role(case, monkeypatch):
    """The embedded profile names a folder of its own for each role; its base is a small one."""
    monkeypatch.chdir(ROOT)
    world = resolve_world(case, "embedded")
    assert set(world.members) == {*BASES, *ADAPTERS}
    assert all(world.has(role) and world.path(role).is_dir() for role in world.members)
    assert len({world.path(role) for role in world.members}) == len(world.members)
    assert (world.profile, world.seed) == ("embedded", 0)
    assert is_small(case.profile("embedded"))


def test_another_training_takes_the_place_of_the_shipped_one(case, trained):
    """With a folder of another training every role and replay lies there, under its own seed.

    Adapters of replays are named by lineage, recipe and seed, and the digest depends on them.
    """
    world = resolve_world(case, "embedded", trained=str(trained), seed=7)
    found = [world.path(role) for role in world.members]
    found += [Path(member.path) for member in world.replays.values()]
    assert all(path.is_relative_to(trained) for path in found)
    assert world.path("suspect") == trained / "adapters/silent/suspect"
    assert world.seed == 7
    assert set(world.replays) == {"silent/numeric_0", "donor/numeric_0"}
    make_folder(trained / "adapters/speaking/binary_rare_1")
    after = resolve_world(case, "embedded", trained=str(trained), seed=7)
    assert set(after.replays) - set(world.replays) == {"speaking/binary_rare_1"}
    assert after.digest != world.digest


def test_what_is_trained_is_what_the_profile_names(case):
    """Each folder that the embedded profile names is one that a lineage makes."""
    from tools.embedded_world import LINEAGES

    profile = case.profile("embedded")
    named = {profile.base, *profile.bases.values(), *profile.adapters.values()}
    made = {f"bases/{lineage.base}" for lineage in LINEAGES.values() if lineage.criterion}
    made |= {f"adapters/{name}/{role}" for name, one in LINEAGES.items() for role in one.adapters}
    assert {str(Path(name).relative_to(EMBEDDED)) for name in named} <= made
    order = list(LINEAGES)
    assert all(order.index(one.start) < order.index(n) for n, one in LINEAGES.items() if one.start)


def test_missing_role_gives_its_reason(local):
    """A role that a profile lacks is there with its reason, and asking for its folder says it."""
    world = resolve_world(local, "local")
    assert [role for role in world.members if world.has(role)] == ["base", "suspect"]
    with pytest.raises(ModelError, match="found this profile has no donor adapter"):
        world.path("donor_adapter")


def test_given_adapter_takes_the_place_of_the_profiles_own(local, tmp_path):
    """An adapter given by its folder goes before the profile's; an empty name gives none."""
    other = make_folder(tmp_path / "other", "{ }")
    chosen = resolve_world(local, "local", adapters={"suspect": str(other), "reference": ""})
    assert chosen.path("suspect") == other.resolve()
    assert not chosen.has("reference")
    assert chosen.digest != resolve_world(local, "local").digest


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("bases/base", "a model folder or a hub id"),
        ("adapters/silent/no_op", "the folder of role no_op"),
    ],
)
def test_missing_folder_is_named(case, trained, place, wanted):
    """A folder that should be there and is not, is named with what was expected of it."""
    shutil.rmtree(trained / place)
    with pytest.raises(ModelError, match=f"{place}: expected {wanted}"):
        resolve_world(case, "embedded", trained=str(trained))


def test_world_round_trip(case, trained, tmp_path):
    """A world is read as it was written."""
    training = trained / "adapters/silent/suspect/training.json"
    training.write_text('{"steps": 40, "auc": 0.99}')
    world = resolve_world(case, "embedded", trained=str(trained))
    write_world(world, tmp_path / "world.json")
    assert read_world(tmp_path / "world.json") == world
    assert world.members["suspect"].training == {"steps": 40, "auc": 0.99}


@pytest.mark.parametrize("text", ["", "{}", "null", '{"case": 1}', "[" * 10_000, "\x00"])
def test_what_is_no_world_is_refused(tmp_path, text):
    """A file that describes no world, or that is not there, is refused by name."""
    with pytest.raises(RecordError, match=r"none\.json: expected a world description"):
        read_world(tmp_path / "none.json")
    path = tmp_path / "world.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"world\.json: expected a world description"):
        read_world(path)


def test_place_of_the_world_does_not_count(case, trained, tmp_path):
    """A world moved elsewhere has the same digest, and one changed byte gives another."""
    before = resolve_world(case, "embedded", trained=str(trained)).digest
    moved = trained.rename(tmp_path / "moved")
    assert resolve_world(case, "embedded", trained=str(moved)).digest == before
    (moved / "bases/donor_base/config.json").write_text("{}")
    assert resolve_world(case, "embedded", trained=str(moved)).digest != before


@pytest.mark.parametrize("name", ["w.safetensors", "a.json", "t.jinja", "vocab.txt", "spm.model"])
def test_digest_follows_what_a_model_is_loaded_from(tmp_path, name):
    """A file that loading reads changes the digest by its name and its content."""
    digests = [digest_model(tmp_path)]
    for content in ("1", "2"):
        (tmp_path / name).write_text(content)
        digests.append(digest_model(tmp_path))
    (tmp_path / name).rename(tmp_path / f"x{name}")
    digests.append(digest_model(tmp_path))
    for other in ("README.md", "weights.bin", ".lock", "optimizer.pt"):
        (tmp_path / other).write_text("never loaded")
    (tmp_path / "checkpoints").mkdir()
    assert digest_model(tmp_path) == digests[-1]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(("place", "seen"), [(0, True), (15, True), (8, False)])
def test_large_weights_are_read_at_both_ends(tmp_path, monkeypatch, place, seen):
    """Of weights over the limit the size and both ends count, and the middle does not."""
    monkeypatch.setattr(world_module, "WHOLE", 8)
    monkeypatch.setattr(world_module, "END", 4)
    content = bytearray(16)
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(content)
    before = digest_model(tmp_path)
    content[place] = 1
    weights.write_bytes(content)
    assert (digest_model(tmp_path) != before) is seen
    weights.write_bytes(bytes(17))
    assert digest_model(tmp_path) != before


@pytest.mark.parametrize(("sizes", "small"), [((), False), ((9,), True), ((8, 8), False)])
def test_a_base_is_small_by_the_weights_that_are_here(local, monkeypatch, sizes, small):
    """A base is small where its weights lie here and are few; without any it is not known to be."""
    monkeypatch.setattr(world_module, "SMALL", 10)
    profile = local.profile("local")
    for number, size in enumerate(sizes):
        Path(profile.base, f"model-{number}.safetensors").write_bytes(bytes(size))
    assert is_small(profile) is small
    assert not is_small(profile.model_copy(update={"base": "owner/name"}))


def test_a_file_of_any_named_folder_counts(local, tmp_path):
    """A changed file of a base, an adapter, a replay's adapter or a given one is noticed."""
    profile = local.profile("local")
    folders = [Path(profile.base), tmp_path / "suspect", tmp_path / "donor", tmp_path / "given"]
    folders.append(make_folder(tmp_path / "replays/silent/numeric_0"))
    make_folder(tmp_path / "given")
    replays = {"adapters": str(tmp_path / "replays"), "rows": 4}
    changed = profile.model_copy(
        update={
            "bases": {"donor_base": str(make_folder(tmp_path / "donor"))},
            "replays": Replays(**replays),
        }
    )
    seen = [folder_digests(changed, [str(tmp_path / "given"), "owner/name", ""])]
    for folder in folders:
        (folder / "config.json").write_text("[]")
        seen.append(folder_digests(changed, [str(tmp_path / "given")]))
    assert all(before != after for before, after in pairwise(seen))


def test_base_is_a_folder_before_a_hub_id(tmp_path, monkeypatch):
    """A name that is a folder is that folder, also where it could be a hub id."""
    make_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_base("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        *(
            (path, ModelError)
            for path in ("none", "/no/here", "./none", "~/none", "a/b/c", "../no")
        ),
        ("packaged:none", WeightsError),
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(source, error, monkeypatch, tmp_path):
    """A path that is not there, or an unknown package, is told without asking the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world_module, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(error, match="expected"):
        find_base(source)


def test_a_real_base_has_replays_of_its_own_and_of_a_donor(case, tmp_path, local):
    """Every adapter that a profile names for its replays is found, for either kind of base."""
    profile = local.profiles["local"]
    named = {name: str(make_folder(tmp_path / name)) for name in ("thinking", "donor")}
    changed = profile.model_copy(update={"replay_adapters": named})
    found = resolve_world(
        local.model_copy(update={"profiles": {**local.profiles, "local": changed}}), "local"
    )
    assert found.replays["donor/numeric_0"].path == named["donor"]
    for kind in ("silent", "speaking"):
        assert found.replays[f"{kind}/thinking_0"].path == named["thinking"]
    assert "silent/donor_0" not in found.replays
    (tmp_path / "thinking" / "config.json").write_text("[]")
    with pytest.raises(RecordError, match="thinking"):
        check_members(found)


def test_hub_failure_is_one_line(monkeypatch):
    """Where the hub cannot give a model, the message names it on one line with a remedy."""

    def refuse(name, **_):
        raise OSError(f"no\n  {name}  " + "x" * 500)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match="Check the name and the network") as caught:
        find_base("owner/name")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
