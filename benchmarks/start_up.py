"""Seconds from a command to its first answer: help texts, plans, and a run's first step.

    python -m benchmarks.start_up

Commands take turns. A run of configs/tiny.py starts once with an empty cache of compiled programs
and then with a filled one. The table goes to docs/speed.md.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks import report
from benchmarks.step_time import ROOT

TLM = str(pathlib.Path(sys.executable).with_name("tlm"))
SHORT = {
    "tlm --help": [TLM, "--help"],
    "tlm plan --help": [TLM, "plan", "--help"],
    "tlm train --help": [TLM, "train", "--help"],
    "tlm plan --config configs/tlm_440m.py": [TLM, "plan", "--config", "configs/tlm_440m.py"],
}
STAGES = {"Compiled": "compiled", "step 0 ": "first evaluation", "step 1/": "first step"}
"""What a run prints, in this order, and what has then been done."""


def whole(command: Sequence[str]) -> float:
    """Seconds of a command."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def stages(folder: str, cache: str) -> dict[str, float]:
    """Seconds from train.py's start to each of its STAGES."""
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--workdir", folder]
    changes = {"num_steps": 1, "log_every": 1, "eval_batches": 1}
    words = [word for key, v in changes.items() for word in (f"--training.{key}", str(v))]
    begin = time.perf_counter()
    run = subprocess.Popen(
        [*command, *words],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    found: dict[str, float] = {}
    for line in run.stdout:
        for prefix, stage in STAGES.items():
            if " ".join(line.split()).startswith(prefix.strip()) and stage not in found:
                found[stage] = time.perf_counter() - begin
    assert run.wait() == 0, command
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, command in SHORT.items():
            times.setdefault(name, []).append(whole(command))
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "filled"):
                for stage, seconds in stages(f"{folder}/{cache}", f"{folder}/cache").items():
                    name = f"train.py, {cache} cache: {stage}"
                    times.setdefault(name, []).append(seconds)
    rows = [
        [name, f"{statistics.median(t):.2f}", f"{min(t):.2f} to {max(t):.2f}"]
        for name, t in times.items()
    ]
    report.publish(
        "start-up",
        f"{report.table(['from the command to', 's', 'least to most'], rows)}\n\nMedians of "
        f"{rounds} rounds; {report.machine()}.",
    )


if __name__ == "__main__":
    main()
