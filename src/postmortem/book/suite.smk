"""The graph of a suite: a chunk of adapters is a job, which writes a file for each and a mark.

It runs in the suite's output folder, where `postmortem suite` has written plan.json and put this
file. What a rule must leave goes to its output's own path, which in a pod is a local copy of it.
"""

import json
import sys
from pathlib import Path

from postmortem.book.build import CHUNK_MINUTES, gpu_resources, memory_mb

PLAN = json.loads(Path("plan.json").read_text(encoding="utf-8"))
POSTMORTEM = [sys.executable, "-m", "postmortem"]


localrules:
    results,


rule results:
    input:
        expand("chunks/{number}.done", number=PLAN["chunks"]),
    output:
        "results.json",
        "results.csv",
        "summary.txt",
    params:
        judged=PLAN["judged"],
        asked=[PLAN["run"], PLAN["chunks"]],
        command=POSTMORTEM,
    shell:
        "{params.command:q} step suite-results --into $(dirname {output[0]:q})"


# The results are no outputs: what a killed job has written must outlive that job.
rule chunk:
    output:
        "chunks/{number}.done",
    params:
        asked=lambda wildcards: [PLAN["run"], PLAN["chunks"][wildcards.number]],
        command=POSTMORTEM,
    threads: PLAN["threads"] or config.get("threads") or workflow.cores or 1
    resources:
        mem_mb=lambda wildcards, attempt: memory_mb(PLAN["base_bytes"], attempt=attempt),
        runtime=lambda wildcards, attempt: CHUNK_MINUTES * attempt,
        **gpu_resources(PLAN["suite"]["device"]),
    shell:
        "OMP_NUM_THREADS={threads} {params.command:q} step suite-chunk {wildcards.number}"
        " --mark {output:q}"
