"""The graph of work: world, notebooks, values, book. Every step is one call of `postmortem`.

A step runs again when its notebook, the case, the data, the models or any file of the library has
changed; kept runs are read from `results/`, and made here only where they are asked for.
"""

import json
from pathlib import Path

from postmortem.book.build import gpu_resources
from postmortem.case.load import load_case
from postmortem.case.layout import list_kept, site_of
from postmortem.experiments.records import digest_library, digest_notebook, settings_digest
from postmortem.models.model_set import folder_digests, is_small

BUILD = "_build"
SETTINGS = json.loads(Path(f"{BUILD}/settings.json").read_text())
CASE = load_case(SETTINGS["case"])
PROFILE = CASE.profile(SETTINGS["profile"])
RUN = f"{BUILD}/runs/{CASE.name}/{SETTINGS['profile']}"
SITE = site_of(SETTINGS["case"], CASE)
RUNS = {run.name: run for run in SITE.runs}
LIBRARY = digest_library()
# Notebooks on a small base run side by side; a large one takes all there is.
SMALL = is_small(PROFILE)
CORES = config.get("threads") or workflow.cores or 1
THREADS = 1 if SMALL else CORES
# What to ask a scheduler for, in MB and minutes; a retry gets more. The largest base of the
# profiles takes 12 GB as float32.
MEMORY, MINUTES = (4_000, 60) if SMALL else (16_000, 1_440)
RESOURCES = {
    "mem_mb": lambda wildcards, attempt: MEMORY * attempt,
    "runtime": lambda wildcards, attempt: MINUTES * attempt,
    **({} if SMALL else gpu_resources(SETTINGS["device"])),
}
# Kept runs, which the pages of a case in full read.
KEPT = [str(path) for p in CASE.profiles for path in list_kept(p).values()]
# The longest first, and what another waits for, so that both cores are busy to the end.
FIRST = ["controls", *CASE.attempts, "replay", "adapter_swap"]
# The kept runs that were asked for by name, such as `suite` or `replays/0`.
ASKED = SETTINGS.get("kept", "").split()
MADE = f"{BUILD}/{'confirm' if SETTINGS.get('sample') else 'kept'}/{CASE.name}/{SETTINGS['profile']}"


# These take seconds and no model, or write what the next command reads here.
localrules:
    book,
    publish,
    world,
    world_of_seed,
    keep,


def world_of(seed):
    """The description of a training of the profile's models: the shipped one, or another."""
    return f"{RUN}/world.json" if seed == PROFILE.seed else f"{BUILD}/worlds/{seed}/world.json"


rule book:
    input:
        values=f"{RUN}/values.json",
        figures=f"{RUN}/figures/figures.json",
        notebooks=expand(f"{RUN}/notebooks/{{name}}.ipynb", name=RUNS),
        prose=sorted(map(str, [*SITE.prose, *Path("book/_static").rglob("*.*")])),
        config=["_config.yml", str(SITE.toc)],
    output:
        str(SITE.summary),
    params:
        run=RUN,
        title=SITE.title,
        library=LIBRARY,
    shell:
        "postmortem step book --run {params.run:q} --out {output:q}"


rule publish:
    input:
        world=f"{RUN}/world.json",
        case=SETTINGS["case"],
        records=expand(f"{RUN}/records/{{name}}.jsonl", name=RUNS),
        kept=KEPT,
    output:
        f"{RUN}/values.json",
        f"{RUN}/figures/figures.json",
    params:
        run=RUN,
        library=LIBRARY,
    shell:
        "postmortem step publish --run {params.run:q}"


for name, run in RUNS.items():

    rule:
        name:
            f"notebook_{name}"
        input:
            notebook=str(run.notebook),
            world=f"{RUN}/world.json",
            earlier=f"{RUN}/records/{run.earlier}.jsonl" if run.earlier else [],
            replays=[path for path in KEPT if "/replays/" in path] if run.learns else [],
        output:
            records=f"{RUN}/records/{name}.jsonl",
            executed=f"{RUN}/notebooks/{name}.ipynb",
        params:
            library=LIBRARY,
            notebook=digest_notebook(run.notebook),
            settings=settings_digest(CASE, SETTINGS),
            given=" ".join(f"--set {key}={value}" for key, value in run.parameters.items()),
        threads: THREADS if run.asks else 1
        resources:
            **RESOURCES,
        priority: len(FIRST) - FIRST.index(name) if name in FIRST else 0
        shell:
            "OMP_NUM_THREADS={threads} postmortem step notebook {input.notebook:q}"
            " --records {output.records:q} --executed {output.executed:q}"
            " --world {input.world:q} --earlier={input.earlier:q} {params.given}"


rule world:
    output:
        f"{RUN}/world.json",
    params:
        library=LIBRARY,
        # A title is on the pages alone: a new one asks no model anew.
        profile=PROFILE.model_dump_json(exclude={"title"}),
        adapters=[SETTINGS["suspect"], SETTINGS["reference"]],
        files=folder_digests(PROFILE, [SETTINGS["suspect"], SETTINGS["reference"]]),
    shell:
        "postmortem step world --out {output:q}"


rule keep:
    input:
        expand(f"{MADE}/{{name}}.jsonl", name=ASKED),


# Only where one is asked for: to a build of the book a kept record is a source.
for name in ASKED:

    rule:
        name:
            f"kept_{name.replace('/', '_')}"
        input:
            notebook=f"notebooks/kept/{Path(name).parts[0]}.ipynb",
            world=world_of(int(Path(name).name)) if "/" in name else f"{RUN}/world.json",
        output:
            records=f"{MADE}/{name}.jsonl",
            executed=f"{MADE}/{name}.ipynb",
        params:
            library=LIBRARY,
            settings=settings_digest(CASE, SETTINGS),
            asked=[SETTINGS["files"], SETTINGS.get("sample", 0)],
        # Of the embedded world several at once; a real model's kept run has the machine to itself.
        threads: 1 if PROFILE.replays else CORES
        resources:
            **RESOURCES,
        priority: int("/" in name)
        shell:
            "OMP_NUM_THREADS={threads} postmortem step notebook {input.notebook:q}"
            " --records {output.records:q} --executed {output.executed:q} --world {input.world:q}"


rule world_of_seed:
    input:
        f"{BUILD}/worlds/{{seed}}/world.jsonl",
    output:
        f"{BUILD}/worlds/{{seed}}/world.json",
    shell:
        "postmortem step world --trained $(dirname {input:q}) --seed {wildcards.seed}"
        " --out {output:q}"


rule train_world:
    input:
        "tools/embedded_world.py",
    output:
        f"{BUILD}/worlds/{{seed}}/world.jsonl",
    params:
        case=SETTINGS["case"],
        prompts={name: prompt.template for name, prompt in CASE.prompts.items()},
    threads: workflow.cores or 1
    resources:
        **RESOURCES,
    shell:
        "python -m tools.train_world --case {params.case:q} --seed {wildcards.seed}"
        " --out $(dirname {output:q}) --cores {threads}"
