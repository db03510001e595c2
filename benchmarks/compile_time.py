"""Compile time of the train step by number of segments.

    python -m benchmarks.compile_time

A 24-layer model in the shape of configs/tiny.py, compiled for the devices at hand: a uniform scan,
stairs of 1, 4 and 8 segments, the exact taper, and a hybrid of three layers of attention to one
of Titans, whose turn of four layers is one scan body. The variants take turns; medians over the
rounds are written to docs/speed.md.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax

from benchmarks import report
from tlm_jax import config_io
from tlm_jax.architectures import with_architecture
from tlm_jax.config import RunConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.models import skeleton
from tlm_jax.training import step
from tlm_jax.training.updates import About, make_optimizer

LAYERS = 24


def variants() -> dict[str, RunConfig]:
    """Configs by name."""
    base = config_io.load_config("configs/tiny.py")
    model = dataclasses.replace(base.model, num_layers=LAYERS, remat="full")

    def run(**taper: Any) -> RunConfig:
        changed = dataclasses.replace(model.taper, **taper)
        return dataclasses.replace(base, model=dataclasses.replace(model, taper=changed))

    return {
        "uniform": run(schedule="uniform"),
        "num_segments=1": run(num_segments=1),
        "num_segments=4": run(num_segments=4),
        "num_segments=8": run(num_segments=8),
        "exact taper": run(),
        "hybrid, uniform": with_architecture(run(schedule="uniform"), "hybrid"),
        "hybrid, num_segments=3": with_architecture(run(num_segments=3), "hybrid"),
    }


def compile_once(config: RunConfig) -> tuple[float, float]:
    """Seconds to (trace and lower, compile) the train step."""
    jax.clear_caches()
    model = skeleton(config.model)
    tx = make_optimizer(
        config.optimizer, config.training.num_steps, About.of(model), config.model.mlp
    )
    mesh = mesh_lib.make_mesh(config)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        lowered = step.lower_train_step(config, model, tx, mesh)
        middle = time.perf_counter()
        lowered.compile()
        return middle - begin, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    configs = variants()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in configs}
    compile_once(configs["uniform"])  # warms up the compiler itself
    for _ in range(rounds):
        for name, config in configs.items():
            times[name].append(compile_once(config))
    total = {n: statistics.median(a + b for a, b in runs) for n, runs in times.items()}
    rows = [
        [
            name,
            str(len(skeleton(config.model).shapes["segments"])),
            f"{statistics.median(a for a, _ in times[name]):.2f}",
            f"{statistics.median(b for _, b in times[name]):.2f}",
            f"{total[name]:.2f}",
            f"{total[name] / total['uniform']:.2f}",
        ]
        for name, config in configs.items()
    ]
    header = ["24 layers", "segments", "trace s", "compile s", "total s", "over uniform"]
    text = report.table(header, rows)
    report.publish(
        "compile-time", f"{text}\n\nMedian of {rounds} alternating rounds; {report.machine()}."
    )


if __name__ == "__main__":
    main()
