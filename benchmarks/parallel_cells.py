"""Cells of a sweep at once on one machine, in processes or in one program, against one by one.

    python -m benchmarks.parallel_cells [--parallel 8] [--size micro] [--steps 300]

Trains the uniform cell of configs/study.py with several seeds on the text that the package
carries: two seeds one after the other, then as many seeds as PARALLEL at once, those two among
them: each in a process of its own, and all in one program (--vmap_seeds). Time is that of the whole
command, with start and compilation. Writes a table to docs/sweeps.md. Losses of the two seeds must
agree.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import report
from tlm_jax.analysis import sweep_report

ROOT = pathlib.Path(__file__).parents[1]
ALONE = 2
"""Seeds that are trained one after the other."""
FILE = """
import dataclasses

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    base = config_io.load_config("{root}/configs/study.py:{size}")
    training = dataclasses.replace(
        base.training, num_steps={steps}, eval_every={steps}, checkpoint_every={steps}
    )
    base = dataclasses.replace(
        base, data=dataclasses.replace(base.data, path=None), training=training
    )
    arm = Arm(name="uniform", changes={{"model.taper.schedule": "uniform"}})
    return Sweep(name="parallel", base=base, arms=(arm,), seeds=(0,))
"""


def run(file: pathlib.Path, out: pathlib.Path, seeds: int, *words: str) -> float:
    """Seconds that `tlm sweep` takes for so many seeds."""
    command = [sys.executable, "-m", "tlm_jax", "sweep", str(file), "--out", str(out)]
    command += [*words, "--seeds", *map(str, range(seeds))]
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--size", default="micro")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    rows, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "parallel.py"
        file.write_text(FILE.format(root=ROOT, size=options.size, steps=options.steps))
        rates = []
        many = max(ALONE, options.parallel)
        for name, seeds, words in (
            ("one after the other", ALONE, ()),
            (f"{options.parallel} processes", many, ("--parallel", str(options.parallel))),
            ("one program", many, ("--vmap_seeds",)),
        ):
            out = pathlib.Path(folder) / name
            seconds = run(file, out, seeds, *words)
            found = sweep_report.read(out)
            tokens = seeds * found[0]["budget"]["tokens"]
            rates.append(tokens / seconds)
            losses.append([r["final"]["loss"] for r in found][:ALONE])
            speed = f"{rates[-1] / rates[0]:.2f}"
            rows.append([name, str(seeds), f"{seconds:.0f}", f"{rates[-1]:,.0f}", speed])
    apart = max(max(of_seed) - min(of_seed) for of_seed in zip(*losses, strict=True))
    report.publish(
        "parallel-cells",
        f"{report.table(['how', 'cells', 'seconds', 'tokens/s', 'speed-up'], rows)}\n\n"
        f"configs/study.py:{options.size}, {options.steps} steps, start and compilation included. "
        f"Final losses of the seeds that all trained differ by at most {apart:.1e}. "
        f"{found[0]['machine']}; {report.machine()}.",
        page=ROOT / "docs" / "sweeps.md",
    )


if __name__ == "__main__":
    main()
