"""Time `postmortem check` on a true-size adapter, in times of importing numpy beside it.

Usage: python -m tools.bench_check [--peft]
The adapter has the shapes of Qwen3-4B, all linear targets, r=16, bfloat16: 66 MB. Each ratio is a
median of five, of a process by the import that was timed just before it: it holds on machines of
any speed. With --peft the base is laid out in memory without values, so that loading the adapter
alone is timed, as PeftModel.from_pretrained does it.
"""

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from postmortem.checker.bases import describe, find_base
from postmortem.checker.checks import inspect_adapter

RUNS, MANY, BASE = 5, 1000, "Qwen/Qwen3-4B"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROBE = (
    "import resource, subprocess, sys, time\n"
    "start = time.perf_counter()\n"
    "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
    "took = time.perf_counter() - start\n"
    "print(took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, code)\n"
)
LOAD = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(**{values})
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.to_empty(device="cpu")
start = time.perf_counter()
PeftModel.from_pretrained(model, sys.argv[1])
print(time.perf_counter() - start)
"""


def write_adapter(folder: Path, rank: int = 16) -> None:
    """Write random bfloat16 weights for every linear module of the base."""
    known = find_base(BASE)
    assert known is not None
    base = describe(known.config, name=BASE, kind="causal")
    assert base is not None
    header, blocks, position = {}, [], 0
    random = np.random.default_rng(0)
    for path, module in base.modules.items():
        if path.split(".")[-1] not in TARGETS:
            continue
        assert module.inputs is not None
        assert module.outputs is not None
        for part, shape in (("A", (rank, module.inputs)), ("B", (module.outputs, rank))):
            values = random.normal(0, 0.02, shape).astype("<f4").view("<u4") >> 16
            block = values.astype("<u2").tobytes()
            key = f"base_model.model.{path}.lora_{part}.weight"
            offsets = [position, position + len(block)]
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
            blocks.append(block)
            position += len(block)
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"".join(blocks)
    (folder / "adapter_model.safetensors").write_bytes(content)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32}
    config |= {"target_modules": TARGETS, "base_model_name_or_path": BASE}
    (folder / "adapter_config.json").write_text(json.dumps(config))


UNIT = (sys.executable, "-c", "import numpy")


def measure(*command: str) -> tuple[float, float]:
    """Return the wall time in seconds and the peak memory in MB of a whole process."""
    probe = [sys.executable, "-c", PROBE, *command]
    out = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
    took, memory, code = out.split()
    assert code == "0", f"{command} ended with {code}"
    return float(took), float(memory)


def report(label: str, *command: str) -> None:
    """Print a process in times of importing numpy, and in seconds of this machine."""
    ratios, seconds, memory = [], [], []
    for _ in range(RUNS):
        unit, _ = measure(*UNIT)
        took, peak = measure(*command)
        ratios.append(took / unit)
        seconds.append(took)
        memory.append(peak)
    taken = f"{median(seconds):.3f} s, peak {max(memory):.0f} MB"
    print(f"check, {label}: {median(ratios):.2f} imports of numpy ({taken})")


def report_many(folder: str) -> None:
    """Print many checks in one process in times of importing numpy."""
    units = [measure(*UNIT)[0] for _ in range(RUNS)]
    start = time.perf_counter()
    for _ in range(MANY):
        inspect_adapter(folder, header_only=True)
    took = time.perf_counter() - start
    ratio = took / median(units)
    print(f"{MANY} adapters, header only: {ratio:.0f} imports of numpy ({took:.1f} s)")


def main() -> None:
    """Print one line per figure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        print(f"adapter: {BASE}, all linear, r=16, {size / 1e6:.1f} MB")
        print(f"import numpy: {median(measure(*UNIT)[0] for _ in range(RUNS)):.3f} s")
        check = (sys.executable, "-m", "postmortem", "check", name)
        report("header only", *check, "--header-only")
        report("header only, for every runtime", *check, "--header-only", "--for", "all")
        report("with bytes", *check)
        report_many(name)
        if "--peft" in sys.argv:
            known = find_base(BASE)
            code = LOAD.replace("{values}", repr(dict(known.config if known else {})))
            start = time.perf_counter()
            command = [sys.executable, "-W", "ignore", "-c", code, name]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"PeftModel.from_pretrained with the base in memory: {float(out):.2f} s")
            print(f"the process around it: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
