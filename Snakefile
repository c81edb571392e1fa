"""The graph of work: world, notebooks, values, book. Every step is one call of `postmortem`."""

import json
from pathlib import Path

from postmortem.case import case_digest, load_case
from postmortem.case_site import site_of
from postmortem.cluster import gpu_resources
from postmortem.inputs import settings_digest
from postmortem.provenance import modules_behind, notebook_digests
from postmortem.recorded import kept_inputs
from postmortem.world import LINEAGE_STARTS, embedded_digest, folder_digests

BUILD = "_build"
SETTINGS = json.loads(Path(f"{BUILD}/settings.json").read_text())
CASE = load_case(SETTINGS["case"])
PROFILE = CASE.profile(SETTINGS["profile"])
RUN = f"{BUILD}/runs/{CASE.name}/{SETTINGS['profile']}"
SITE = site_of(SETTINGS["case"], CASE)
SOURCES = {path.stem: str(path) for path in SITE.notebooks}
NOTEBOOKS = list(SOURCES)
EMBEDDED = PROFILE.base == "embedded"
# An embedded world for each seed: the book takes the first, `make replay` as many as asked for.
WORLDS = {
    embedded_digest(CASE, seed): seed
    for seed in range(PROFILE.seed, PROFILE.seed + SETTINGS["worlds"])
    if EMBEDDED
}
TRAINED = {seed: f"{BUILD}/worlds/{CASE.name}-{digest}" for digest, seed in WORLDS.items()}
WORLD = TRAINED.get(PROFILE.seed, "")
REPLAYS = f"{BUILD}/replays/{CASE.name}/{SETTINGS['profile']}"
STARTS = LINEAGE_STARTS if EMBEDDED else {}
# The embedded models are too small for two threads to help; a real one takes all there are.
THREADS = 1 if EMBEDDED else config.get("threads") or workflow.cores or 1
# What to ask a scheduler for, in MB and minutes; a retry gets more. The largest base of the
# profiles takes 12 GB as float32.
MEMORY, MINUTES = (2_000, 60) if EMBEDDED else (16_000, 1_440)
RESOURCES = {
    "mem_mb": lambda wildcards, attempt: MEMORY * attempt,
    "runtime": lambda wildcards, attempt: MINUTES * attempt,
    **({} if EMBEDDED else gpu_resources(SETTINGS["device"])),
}
# Runs on real models that are kept; `make record` and `make bench` make them again.
KEPT = [] if CASE.own else sorted(str(path) for path in Path("results").glob("*/*.jsonl"))
# The heavy notebook that this run was asked for, if any.
HEAVY = SETTINGS.get("heavy", "")
# Notebooks that read what an earlier one recorded.
EARLIER = {"02_v2_run": "01_v1_run", "09_diagnosis": "07_replay"}


# These take seconds and no model, or write what the next command reads here.
localrules:
    book,
    publish,
    world,
    replay,
    replay_world,


def lineages_of(seed):
    """What the world of a seed is put together from."""
    return expand(f"{TRAINED[seed]}/{{lineage}}.done", lineage=STARTS) if EMBEDDED else []


rule book:
    input:
        values=f"{RUN}/values.json",
        figures=f"{RUN}/figures/figures.json",
        notebooks=expand(f"{RUN}/notebooks/{{name}}.ipynb", name=NOTEBOOKS),
        prose=sorted(map(str, [*SITE.prose, *Path("book/_static").rglob("*.*")])),
        config=["_config.yml", str(SITE.toc)],
    output:
        str(SITE.summary),
    params:
        run=RUN,
        title=SITE.title,
        code=modules_behind(["import postmortem.book, postmortem.sphinx_ext"]),
    shell:
        "postmortem step book --run {params.run:q} --out {output:q}"


rule publish:
    input:
        world=f"{RUN}/world.json",
        case=SETTINGS["case"],
        records=expand(f"{RUN}/records/{{name}}.jsonl", name=NOTEBOOKS),
        recorded=KEPT,
    output:
        f"{RUN}/values.json",
        f"{RUN}/figures/figures.json",
    params:
        run=RUN,
        code=modules_behind(["import postmortem.publish"]),
        # What a kept record is held against.
        behind=[kept_inputs(name, CASE) for name in KEPT],
    shell:
        "postmortem step publish --run {params.run:q}"


# The longest first, so that the others run beside it.
for order, name in enumerate(sorted(NOTEBOOKS, key=lambda name: name == "07_replay")):

    rule:
        name:
            f"notebook_{name}"
        input:
            notebook=SOURCES[name],
            world=f"{RUN}/world.json",
            earlier=f"{RUN}/records/{EARLIER[name]}.jsonl" if name in EARLIER else [],
        output:
            records=f"{RUN}/records/{name}.jsonl",
            executed=f"{RUN}/notebooks/{name}.ipynb",
        params:
            depends=notebook_digests(SOURCES[name]),
            settings=settings_digest(CASE, SETTINGS),
        threads: THREADS
        resources:
            **RESOURCES,
        priority: order
        shell:
            "OMP_NUM_THREADS={threads} postmortem step notebook {input.notebook:q}"
            " --records {output.records:q} --executed {output.executed:q}"
            " --world {input.world:q} --earlier={input.earlier:q}"


rule world:
    input:
        lineages_of(PROFILE.seed),
    output:
        f"{RUN}/world.json",
    params:
        trained=WORLD,
        # The title of a case of one's own is on its pages alone: a new one asks no model anew.
        profile=PROFILE.model_dump_json(exclude={"title"} if CASE.own else None),
        adapters=[SETTINGS["suspect"], SETTINGS["reference"]],
        files=folder_digests(PROFILE, [SETTINGS["suspect"], SETTINGS["reference"]]),
    shell:
        "postmortem step world --trained={params.trained:q} --out {output:q}"


rule replay:
    input:
        expand(f"{REPLAYS}/{{seed}}.jsonl", seed=TRAINED or [PROFILE.seed]),
    output:
        f"{BUILD}/replays.json",
    params:
        code=modules_behind(["import postmortem.beliefs"]),
        case=case_digest(CASE),
    shell:
        "postmortem step evaluate {input:q} --out {output:q}"


rule replay_notebook:
    input:
        notebook="notebooks/07_replay.ipynb",
        world=f"{REPLAYS}/{{seed}}.world.json",
    output:
        records=f"{REPLAYS}/{{seed}}.jsonl",
        executed=f"{REPLAYS}/{{seed}}.ipynb",
    params:
        depends=notebook_digests("notebooks/07_replay.ipynb"),
        settings=settings_digest(CASE, SETTINGS),
    threads: THREADS
    resources:
        **RESOURCES,
    shell:
        "OMP_NUM_THREADS={threads} postmortem step notebook {input.notebook:q}"
        " --records {output.records:q} --executed {output.executed:q}"
        " --world {input.world:q} --whole"


if HEAVY:

    # Only where it is asked for: to a build of the book a kept record is a source.
    rule keep:
        input:
            notebook=f"notebooks/recorded/{HEAVY}.ipynb",
            world=f"{RUN}/world.json",
        output:
            records=SETTINGS["kept"],
            executed=f"{RUN}/recorded/{HEAVY}.ipynb",
        threads: THREADS
        resources:
            **RESOURCES,
        shell:
            "OMP_NUM_THREADS={threads} postmortem step notebook {input.notebook:q}"
            " --records {output.records:q} --executed {output.executed:q} --world {input.world:q}"


rule replay_world:
    input:
        lambda wildcards: lineages_of(int(wildcards.seed)),
    output:
        f"{REPLAYS}/{{seed}}.world.json",
    params:
        trained=lambda wildcards: TRAINED.get(int(wildcards.seed), ""),
    shell:
        "postmortem step world --trained={params.trained:q} --out {output:q}"
        " --seed {wildcards.seed}"


rule looks:
    input:
        expand(f"{BUILD}/looks/{{seed}}.jsonl", seed=TRAINED),
    output:
        touch(f"{BUILD}/looks/all"),


rule looks_of_world:
    input:
        f"{REPLAYS}/{{seed}}.world.json",
    output:
        f"{BUILD}/looks/{{seed}}.jsonl",
    params:
        code=modules_behind(["import postmortem.replaying"]),
    shell:
        "OMP_NUM_THREADS=1 postmortem step looks --world {input:q} --out {output:q}"


# Those that others start from first, then the longest.
for order, (lineage, start) in enumerate(reversed(STARTS.items())):

    rule:
        name:
            f"train_{lineage}"
        input:
            f"{BUILD}/worlds/{CASE.name}-{{digest}}/{start}.done" if start else [],
        output:
            f"{BUILD}/worlds/{CASE.name}-{{digest}}/{lineage}.done",
        params:
            lineage=lineage,
            folder=f"{BUILD}/worlds/{CASE.name}-{{digest}}/{lineage}",
            seed=lambda wildcards: WORLDS[wildcards.digest],
        resources:
            **RESOURCES,
        priority: order
        shell:
            "OMP_NUM_THREADS=1 postmortem step lineage {params.lineage}"
            " --folder {params.folder:q} --seed {params.seed} && touch {output:q}"
