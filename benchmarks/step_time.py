"""Step time of a tapered model against its uniform twin, scanned and unrolled.

    python -m benchmarks.step_time [--config configs/tiny.py] [--steps 40]

Each arm runs in a process of its own (in one process, freed pages would be
measured too). The processes take turns, step by step, so that both see the same
machine; medians are written to docs/speed.md.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks import report
from tlm_jax import config_io, costs
from tlm_jax.config import RunConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import skeleton
from tlm_jax.training import step
from tlm_jax.training.optimizer import make_optimizer

ARMS = ("tapered", "uniform", "uniform_unrolled")


def arm_config(path: str, arm: str) -> RunConfig:
    """The config of an arm."""
    config = config_io.load_config(path)
    if arm != "tapered":
        config = dataclasses.replace(config, model=config.model.uniform_twin())
    if arm == "uniform_unrolled":
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, scan_layers=False)
        )
    return config


def serve(config: RunConfig) -> None:
    """Runs one step for each line on standard input and answers with its seconds."""
    model = skeleton(config.model)
    tx = make_optimizer(config.optimizer, config.training.num_steps, config.model.mlp.periods)
    mesh = mesh_lib.make_mesh(config)
    with jax.set_mesh(mesh):
        shardings = step.state_shardings(model, tx, mesh)
        state = jax.jit(lambda k: step.init_state(model, tx, k), out_shardings=shardings)(
            jax.random.key(0)
        )
        run = jax.jit(
            step.make_train_step(config, model, tx),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )
        shape = (config.data.batch_size, config.data.seq_len)
        ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        ones = np.ones(shape, np.int32)
        batch = to_devices(
            {"inputs": ids, "targets": ids, "segment_ids": ones, "positions": positions}, mesh
        )
        for _ in range(3):
            state, metrics = run(state, batch)
        jax.block_until_ready(metrics)
        for _ in sys.stdin:
            begin = time.perf_counter()
            state, metrics = run(state, batch)
            jax.block_until_ready((state, metrics))
            print(time.perf_counter() - begin, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--arm", choices=ARMS, help="run as one of the two processes")
    options = parser.parse_args()
    if options.arm:
        serve(arm_config(options.config, options.arm))
        return
    command = [sys.executable, "-m", "benchmarks.step_time", "--config", options.config]
    workers = {
        arm: subprocess.Popen(
            [*command, "--arm", arm], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for arm in ARMS
    }
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(options.steps + 2):
        for arm in ARMS if turn % 2 else ARMS[::-1]:
            worker = workers[arm]
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("step\n")
            worker.stdin.flush()
            seconds = float(worker.stdout.readline())
            if turn >= 2:  # the first turns still overlap with the other's start
                times[arm].append(seconds)
    for worker in workers.values():
        worker.communicate()
    config = arm_config(options.config, "tapered")
    flops = costs.model_costs(config.model, config.data.seq_len).training_flops_full
    per_step = flops * config.data.batch_size * config.data.seq_len
    rows = []
    for arm in ARMS:
        median = statistics.median(times[arm])
        low, _, high = statistics.quantiles(times[arm], n=4)
        rows.append(
            [
                arm,
                f"{median * 1e3:.1f}",
                f"{low * 1e3:.1f} to {high * 1e3:.1f}",
                f"{per_step / median / 1e9:.0f}",
                f"{_ratio(times['tapered'], times[arm]):.3f}",
            ]
        )
    header = ["model", "ms a step", "middle half", "GFLOP/s", "tapered over it"]
    report.publish(
        "step-time",
        f"{report.table(header, rows)}\n\nMedians of {options.steps} alternating steps; ratios are "
        f"medians over pairs. {options.config}; {report.machine()}.",
    )


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
