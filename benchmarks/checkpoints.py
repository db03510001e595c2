"""What checksums cost: saves and loads of a training state, with and without.

    python -m benchmarks.checkpoints [--config configs/tlm_440m.py] [--layers 6] [--repeats 5]

Random values in the shapes of a model's parameters and moments; medians, turn by turn. With all
24 layers of the 440M model it needs 20 GB of memory and 11 GB of disk.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlm_jax import config_io, files
from tlm_jax.cli.parsing import quiet_libraries
from tlm_jax.config import MeshConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, checksums, step
from tlm_jax.training.allocator import release_freed_memory
from tlm_jax.training.updates import About, make_optimizer


class _Iterator:
    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None: ...


def _without(known: dict[str, str]) -> type:
    """In place of `checksums.Saved`: known checksums are written and none is computed."""

    class Known(checksums.Saved):
        def __init__(self, tree: Any) -> None: ...

        async def save(self, directory: Any) -> Any:
            async def write() -> None:
                folder = await directory.await_creation()
                text = json.dumps(files.sealed({"checksums": known}))
                (folder / checksums.FILE).write_text(text)

            return write()

    return Known


def _random(leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    if leaf.dtype != jnp.float32:
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.normal(key, leaf.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/tlm_440m.py")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    quiet_libraries()
    config = config_io.load_config(pathlib.Path(options.config))
    model = skeleton(dataclasses.replace(config.model, num_layers=options.layers))
    tx = make_optimizer(config.optimizer, 100, About.of(model))
    mesh = mesh_lib.device_mesh(MeshConfig(data=1, fsdp=1))
    shapes = step.abstract_state(model, tx, mesh)
    leaves, tree = jax.tree.flatten(shapes)
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        result = work(*arguments)
        found.setdefault(name, []).append(time.perf_counter() - begin)
        found.setdefault(f"{name}, CPU", []).append(time.process_time() - cpu)
        return result

    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        state = jax.tree.unflatten(tree, map(_random, leaves, keys))
        known = checksums.of(checkpoint._as_dict(state))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
        ways = {"with": checksums.Saved, "without": _without(known)}
        compare = {"with": checksums.mismatches, "without": lambda *_: []}
        path = pathlib.Path(folder)
        number = 0
        with checkpoint.Checkpoints(path, keep_last=1) as checkpoints:

            def save(number: int, state: Any) -> None:
                checkpoints.save(number, state, _Iterator(), {})
                checkpoints.wait()

            def load(number: int) -> Any:
                return jax.block_until_ready(checkpoints.restore(number, shapes, _Iterator()))

            for _ in range(options.repeats):
                timed("checksums alone", checksums.of, checkpoint._as_dict(state))
                for way in ("without", "with"):
                    number += 1
                    checksums.Saved = ways[way]  # type: ignore[assignment,misc]
                    timed(f"save {way}", save, number, state)
                    print(f"saved {way} in {found[f'save {way}'][-1]:.2f} s", flush=True)
            del state  # two do not fit beside what a load needs
            for _ in range(options.repeats):
                for way in ("without", "with"):
                    checksums.mismatches = compare[way]
                    release_freed_memory()
                    timed(f"load {way}", load, number)
                    print(f"loaded {way} in {found[f'load {way}'][-1]:.2f} s", flush=True)
    print(f"a state of {size:.2f} GB; medians of {options.repeats}")
    for name, seconds in found.items():
        print(f"{name:24} {statistics.median(seconds):8.2f} s")


if __name__ == "__main__":
    main()
