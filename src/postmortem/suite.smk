"""The graph of a suite: a chunk of adapters is a job, which streams its results beside the mark.

It runs in the suite's output folder, whose plan.json `postmortem suite` has written.
"""

import json
import sys
from pathlib import Path

PLAN = json.loads(Path("plan.json").read_text(encoding="utf-8"))
POSTMORTEM = [sys.executable, "-m", "postmortem"]


rule results:
    input:
        expand("chunks/{number}.done", number=PLAN["chunks"]),
    output:
        "results.json",
        "results.csv",
        "summary.txt",
    params:
        judged=PLAN["judged"],
        asked=PLAN["asked"],
        command=POSTMORTEM,
    shell:
        "{params.command:q} step suite-results"


# The file of results is no output: what a killed job has streamed to it must outlive that job.
rule chunk:
    output:
        "chunks/{number}.done",
    params:
        asked=lambda wildcards: PLAN["asked"][wildcards.number],
        command=POSTMORTEM,
    threads: PLAN["threads"] or workflow.cores or 1
    shell:
        "OMP_NUM_THREADS={threads} {params.command:q} step suite-chunk {wildcards.number}"
