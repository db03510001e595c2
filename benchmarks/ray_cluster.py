"""Text and sweeps on a Ray cluster of three nodes on this machine, one of which is killed.

    python -m benchmarks.ray_cluster [--megabytes 64]

Text: `tlm prepare` with two processes, and on two nodes of one CPU each, alternating; then on
two nodes of which one is killed while it works. Sweep: eight cells of 60 steps by two processes,
on two nodes, and on two nodes of which one is killed. Prepared folders must be equal to the byte,
and losses equal. Writes a table to docs/ray.md.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import report
from tlm_jax.analysis import sweep_report

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 3
SEEDS = 4
FILE = """
import dataclasses

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    base = config_io.load_config("{root}/configs/study.py:micro")
    training = dataclasses.replace(
        base.training, num_steps=60, eval_every=60, checkpoint_every=20
    )
    base = dataclasses.replace(
        base, data=dataclasses.replace(base.data, path=None), training=training
    )
    arms = tuple(
        Arm(name=name, changes={{"model.taper.schedule": name}}) for name in ("uniform", "cosine")
    )
    return Sweep(name="nodes", base=base, arms=arms, seeds=tuple(range({seeds})))
"""


def tlm(*words: object) -> list[str]:
    """The command line of `tlm`."""
    return [sys.executable, "-m", "tlm_jax", *map(str, words)]


def seconds(command: list[str]) -> float:
    """What a command takes."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[tuple[Any, list[Any]]]:
    """A head that takes no tasks, and nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon})
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield made, [made.add_node(num_cpus=1) for _ in range(workers)]
    finally:
        del os.environ["RAY_ADDRESS"]
        made.shutdown()


def killing(made: Any, node: Any, command: list[str], begun: Callable[[], bool]) -> float:
    """Seconds of a command during which a node is killed as soon as `begun()`."""
    begin = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not begun():
            if process.poll() is not None:
                raise RuntimeError("it ended before the node could be killed")
            time.sleep(0.05)
        made.remove_node(node, allow_graceful=False)
        if process.wait():
            raise RuntimeError(f"{command} failed")
    return time.perf_counter() - begin


def digest(folder: pathlib.Path) -> str:
    """Of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def prepare(folder: pathlib.Path, megabytes: int) -> list[list[str]]:
    """The rows about text."""
    text = folder / "text.jsonl"
    rng = random.Random(0)
    words = [f"w{rng.randrange(10**6)}" for _ in range(20_000)]
    with text.open("w") as file:
        while file.tell() < megabytes * 2**20:
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=500))}) + "\n")
    base = ("prepare", text, "--out")
    times: dict[str, list[float]] = {"pool": [], "ray": []}
    for number in range(ROUNDS):
        times["pool"].append(seconds(tlm(*base, folder / f"pool-{number}", "--processes", 2)))
        with cluster(2):
            out = folder / f"ray-{number}"
            times["ray"].append(seconds(tlm(*base, out, "--engine", "ray")))
    out = folder / "killed"
    with cluster(2) as (made, nodes):
        command = tlm(*base, out, "--engine", "ray")
        lost = killing(made, nodes[0], command, lambda: any(out.glob("parts/*")))
    if len({digest(folder / name) for name in ("pool-0", "ray-0", "killed")}) > 1:
        raise RuntimeError("prepared folders differ")
    pool, ray = (statistics.median(times[name]) for name in ("pool", "ray"))
    rate = megabytes / pool
    return [
        ["text, two processes", f"{pool:.1f}", f"{rate:.1f} MiB/s", "1.00"],
        ["text, two nodes", f"{ray:.1f}", f"{megabytes / ray:.1f} MiB/s", f"{pool / ray:.2f}"],
        ["text, two nodes, one killed", f"{lost:.1f}", f"{megabytes / lost:.1f} MiB/s",
         f"{pool / lost:.2f}"],
    ]  # fmt: skip


def sweep(folder: pathlib.Path) -> list[list[str]]:
    """The rows about cells."""
    file = folder / "nodes.py"
    file.write_text(FILE.format(root=ROOT, seeds=SEEDS))
    base = ("sweep", file, "--out")
    times = {"two processes": seconds(tlm(*base, folder / "pool", "--parallel", 2))}
    with cluster(2):
        times["two nodes"] = seconds(tlm(*base, folder / "ray", "--engine", "ray"))
    out = folder / "killed-cells"
    with cluster(2) as (made, nodes):
        command = tlm(*base, out, "--engine", "ray")
        lost = killing(made, nodes[0], command, lambda: any(out.glob("*/checkpoints/20")))
    times["two nodes, one killed"] = lost
    losses = [
        {(r["arm"], r["seed"]): r["final"]["loss"] for r in sweep_report.read(folder / name)}
        for name in ("pool", "ray", "killed-cells")
    ]
    if len(losses[0]) != 2 * SEEDS or any(found != losses[0] for found in losses):
        raise RuntimeError(f"losses differ: {losses}")
    cells = 2 * SEEDS
    return [
        [f"{cells} cells, {name}", f"{time:.0f}", f"{3600 * cells / time:.0f} cells/hour",
         f"{times['two processes'] / time:.2f}"]
        for name, time in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(pathlib.Path(folder), options.megabytes) + sweep(pathlib.Path(folder))
    report.publish(
        "ray-cluster",
        f"{report.table(['work', 'seconds', 'rate', 'speed-up'], rows)}\n\n"
        f"{options.megabytes} MiB of text, medians of {ROUNDS}; start of the command included, "
        "that of the cluster not. Prepared folders are equal to the byte, losses equal, also "
        f"where a node was killed. {report.machine()}.",
        page=ROOT / "docs" / "ray.md",
    )


if __name__ == "__main__":
    main()
