"""Saves a small state many times with few descriptors, and shows what each save leaves behind.

    python tests/faults/saves.py [--saves 1000] [--descriptors 256]

The exit status is 1 if descriptors or threads grow, or memory by more than 10%, after the first
tenth of the saves.
"""

import argparse
import os
import pathlib
import resource
import sys
import tempfile
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from tlm_jax.cli.parsing import quiet_libraries
from tlm_jax.training import checkpoint
from tlm_jax.training.step import TrainState


class _Iterator:
    def get_state(self) -> dict[str, int]:
        return {"place": 0}


def _used() -> tuple[int, int, float]:
    """(descriptors, threads, resident memory in MB)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    memory = pages * resource.getpagesize() / 1e6
    return len(os.listdir("/proc/self/fd")), threading.active_count(), memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--descriptors", type=int, default=256)
    options = parser.parse_args()
    quiet_libraries()
    resource.setrlimit(resource.RLIMIT_NOFILE, (options.descriptors, options.descriptors))
    zero = jnp.zeros((), jnp.int32)
    params = {"embedding": jax.random.normal(jax.random.key(0), (256, 64))}
    state = TrainState(
        step=zero,
        params=params,
        opt_state=(params, params),
        skipped=zero,
        skipped_in_a_row=zero,
        typical_norm=jnp.zeros(()),
    )
    seen = []
    tenth = max(1, options.saves // 10)
    with (
        tempfile.TemporaryDirectory() as name,
        checkpoint.Checkpoints(pathlib.Path(name) / "checkpoints", keep_last=2) as checkpoints,
    ):
        for step in range(1, options.saves + 1):
            checkpoints.save(step, state, _Iterator(), {"config": {}})
            if step % tenth == 0:
                checkpoints.wait()
                seen.append(_used())
                descriptors, threads, memory = seen[-1]
                print(
                    f"{step} saves: {descriptors} descriptors, {threads} threads, {memory:.0f} MB",
                    flush=True,
                )
    first, last = seen[0], seen[-1]
    return int(last[:2] > first[:2] or last[2] > 1.1 * first[2])


if __name__ == "__main__":
    sys.exit(main())
