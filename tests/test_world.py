import json
from pathlib import Path

import pytest

from postmortem import world as world_module
from postmortem.case import Case, load_case
from postmortem.errors import CaseError, ModelError, RecordError, WeightsError
from postmortem.world import (
    ADAPTERS,
    BASES,
    EMBEDDED_ROLES,
    LINEAGE_STARTS,
    check_members,
    digest_model,
    embedded_digest,
    find_base,
    read_world,
    resolve_world,
    write_world,
)

SHIPPED = Path(__file__).parents[1] / "cases" / "qwen-lora.yml"


@pytest.fixture(scope="module")
def case() -> Case:
    """The shipped case, read once."""
    return load_case(SHIPPED)


def make_folder(path, content="{}"):
    """A folder with a configuration, as a model or adapter has one."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    return path


@pytest.fixture
def trained(tmp_path):
    """Folders as an embedded world has them."""
    for role, place in EMBEDDED_ROLES.items():
        make_folder(tmp_path / "trained" / place, json.dumps({"role": role}))
    return tmp_path / "trained"


@pytest.fixture
def local(case, tmp_path):
    """The case with a profile whose base and suspect are folders."""
    adapters = {"suspect": str(make_folder(tmp_path / "suspect"))}
    base = str(make_folder(tmp_path / "base"))
    changes = {"base": base, "adapters": adapters}
    profile = case.profile("embedded").model_copy(update=changes)
    return case.model_copy(update={"profiles": {"local": profile}})


def test_embedded_world_has_every_role(case, trained):
    """The embedded world gives a folder of its own to each role."""
    world = resolve_world(case, "embedded", trained=trained)
    assert set(world.members) == {*BASES, *ADAPTERS} == set(EMBEDDED_ROLES)
    assert all(world.has(role) and world.path(role).is_dir() for role in world.members)
    assert len({world.path(role) for role in world.members}) == len(EMBEDDED_ROLES)
    assert (world.title, world.seed) == (case.profile("embedded").title, 0)


def test_another_seed_is_the_worlds_own(case, trained):
    """An embedded world of another seed than the profile's says so."""
    assert resolve_world(case, "embedded", trained=trained, seed=7).seed == 7


def test_replay_adapters_are_named_by_lineage_recipe_and_seed(case, trained):
    """An embedded world lists the adapters of its replays, and its digest depends on them."""
    before = resolve_world(case, "embedded", trained=trained)
    assert set(before.replays) == {"silent/numeric_0", "donor/numeric_0"}
    make_folder(trained / "speaking" / "binary_rare_1")
    after = resolve_world(case, "embedded", trained=trained)
    assert set(after.replays) - set(before.replays) == {"speaking/binary_rare_1"}
    assert after.digest != before.digest


def test_each_lineage_stands_after_the_one_it_starts_from():
    """The graph's table of lineages agrees with what training does, and an earlier one is first."""
    from tools.embedded_world import LINEAGES

    assert {name: lineage.start for name, lineage in LINEAGES.items()} == LINEAGE_STARTS
    order = list(LINEAGE_STARTS)
    assert all(order.index(start) < order.index(n) for n, start in LINEAGE_STARTS.items() if start)
    places = {tuple(place.split("/")) for place in EMBEDDED_ROLES.values()}
    for lineage, name in places:
        made = {*LINEAGES[lineage].adapters}
        assert name in made | {LINEAGES[lineage].base if LINEAGES[lineage].criterion else ""}


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


@pytest.mark.parametrize("role", ["base", "no_op"])
def test_missing_folder_is_named(case, trained, role):
    """A folder that should be there and is not, is named with its role."""
    folder = trained / EMBEDDED_ROLES[role]
    (folder / "config.json").unlink()
    folder.rmdir()
    with pytest.raises(ModelError, match=f"{role}: expected the folder of role {role}"):
        resolve_world(case, "embedded", trained=trained)


def test_unknown_profile_is_refused(case):
    """A profile that the case does not have is refused by the case."""
    with pytest.raises(CaseError, match="profile 'none'"):
        resolve_world(case, "none")


def test_world_round_trip(case, trained, tmp_path):
    """A world is read as it was written."""
    (trained / EMBEDDED_ROLES["suspect"] / "training.json").write_text('{"steps": 40, "auc": 0.99}')
    world = resolve_world(case, "embedded", trained=trained)
    write_world(world, tmp_path / "world.json")
    assert read_world(tmp_path / "world.json") == world
    assert world.members["suspect"].training == {"steps": 40, "auc": 0.99}


@pytest.mark.parametrize("text", ["", "{}", "null", '{"case": 1}', "[" * 10_000, "\x00"])
def test_what_is_no_world_is_refused(tmp_path, text):
    """A file that describes no world is refused by name."""
    path = tmp_path / "world.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"world\.json: expected a world description"):
        read_world(path)


def test_missing_world_is_refused(tmp_path):
    """A description that is not there is refused by name."""
    with pytest.raises(RecordError, match=r"none\.json: expected a world description"):
        read_world(tmp_path / "none.json")


def test_place_of_the_world_does_not_count(case, trained, tmp_path):
    """A world moved elsewhere has the same digest, and one changed byte gives another."""
    before = resolve_world(case, "embedded", trained=trained).digest
    moved = trained.rename(tmp_path / "moved")
    assert resolve_world(case, "embedded", trained=moved).digest == before
    (moved / "donor" / "donor_base" / "config.json").write_text("{}")
    assert resolve_world(case, "embedded", trained=moved).digest != before


@pytest.mark.parametrize("name", ["w.safetensors", "a.json", "t.jinja", "vocab.txt", "spm.model"])
def test_digest_follows_what_a_model_is_loaded_from(tmp_path, name):
    """A file that loading reads changes the digest by its name and its content."""
    folder = make_folder(tmp_path / "m")
    digests = [digest_model(folder)]
    for content in ("1", "2"):
        (folder / name).write_text(content)
        digests.append(digest_model(folder))
    (folder / name).rename(folder / f"x{name}")
    digests.append(digest_model(folder))
    assert len(set(digests)) == 4


@pytest.mark.parametrize("name", ["README.md", "weights.bin", ".lock", "optimizer.pt"])
def test_digest_leaves_out_what_is_never_loaded(tmp_path, name):
    """A file that loading never reads does not change the digest."""
    folder = make_folder(tmp_path / "m")
    before = digest_model(folder)
    (folder / name).write_text("x")
    (folder / "checkpoints").mkdir()
    assert digest_model(folder) == before


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


def test_empty_folder_has_a_digest(tmp_path):
    """A folder without files has a digest, which a first file changes."""
    before = digest_model(tmp_path)
    (tmp_path / "config.json").touch()
    assert digest_model(tmp_path) != before


def test_embedded_digest_follows_prompts_and_seed(case):
    """The embedded world is made anew for other prompts or another seed, not for a new title."""
    v1 = case.prompts["v1"].model_copy(update={"template": "{body}"})
    reworded = case.model_copy(update={"prompts": {**case.prompts, "v1": v1}})
    before = embedded_digest(case, 0)
    assert embedded_digest(case.model_copy(update={"title": "T"}), 0) == before
    assert embedded_digest(case, 1) != before
    assert embedded_digest(reworded, 0) != before


def test_base_is_a_folder_before_a_hub_id(tmp_path, monkeypatch):
    """A name that is a folder is that folder, also where it could be a hub id."""
    make_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_base("owner/name") == Path("owner/name")


@pytest.mark.parametrize("source", ["none", "/none/here", "./none", "~/none", "a/b/c", "../none"])
def test_what_is_neither_folder_nor_hub_id_is_refused(source, monkeypatch, tmp_path):
    """A path that is not there is told at once, without asking the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world_module, "_from_hub", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="expected a model folder or a hub id"):
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


def test_unknown_package_is_refused():
    """A packaged base that the catalogue lacks is refused by the catalogue."""
    with pytest.raises(WeightsError, match="smollm2"):
        find_base("packaged:none")


def test_hub_failure_is_one_line(monkeypatch):
    """Where the hub cannot give a model, the message names it on one line with a remedy."""

    def refuse(name, **_):
        raise OSError(f"no\n  {name}  " + "x" * 500)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match="Check the name and the network") as caught:
        find_base("owner/name")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
