"""One of several processes that read a run's batches: address, how many, which, folder, text.

Takes three batches on a mesh whose data axis splits their rows over all of four devices, saves
their place, goes on from there on a mesh that splits the rows over half of them, and saves again.
Where the folder has a checkpoint, it begins there. Prints the readers that it ran and the rows on
its devices, by batch, mesh by mesh; and what it is told when there are only two readers.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

BATCHES = 3


def config(text: str, **mesh: int) -> Any:
    """Four readers of a batch of eight rows."""
    from tlm_jax import config as c

    return c.RunConfig(
        data=c.DataConfig(path=text, tokenizer="bytes", seq_len=16, batch_size=8, readers=4),
        mesh=c.MeshConfig(**mesh),
    )


def meshes(text: str) -> list[Mesh]:
    """Over four devices."""
    from tlm_jax.distributed.mesh import make_mesh

    configs = config(text, data=4), config(text, data=1, fsdp=2, tensor=2)
    return [make_mesh(c, jax.devices()[:4]) for c in configs]


def read(text: str, folder: pathlib.Path, mesh: Mesh) -> tuple[list[int], list[Any]]:
    """Reads on from the newest checkpoint, saves; (readers, targets by first row of each batch)."""
    from tlm_jax.data import open_dataset
    from tlm_jax.distributed.sharding import to_devices
    from tlm_jax.training import checkpoint, reading, step

    data = config(text).data
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    dataset = open_dataset(data, 257)
    iterator = reading.train_iterator(dataset, data, mesh, lambda *_: None)
    found = []
    with jax.set_mesh(mesh), checkpoint.Checkpoints(folder, keep_last=2) as checkpoints:
        zeros = jax.jit(lambda: jnp.zeros((3,)), out_shardings=everywhere)()
        divided = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
        state = step.TrainState(
            step=zeros,
            params={"w": jax.jit(lambda: jnp.arange(8.0), out_shardings=divided)()},
            opt_state=(),
            skipped=zeros,
            skipped_in_a_row=zeros,
            typical_norm=zeros,
        )
        done = max(checkpoints.steps, default=0)
        if done:
            shapes = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
            )
            checkpoints.restore(done, shapes, iterator)
        for _ in range(BATCHES):
            batch = to_devices(next(iterator), mesh)
            shards = batch["targets"].addressable_shards
            found.append({s.index[0].start or 0: s.data.tolist() for s in shards})
        metadata = {"data_layout": dataset.layout()}
        checkpoints.save(done + BATCHES, state, iterator, metadata)
    iterator.close()
    return list(iterator.share.readers), found


def told(text: str, readers: int, mesh: Mesh) -> list[str]:
    """Lines about readers whose rows are read unnecessarily."""
    from tlm_jax.data import open_dataset
    from tlm_jax.training import reading

    data = dataclasses.replace(config(text).data, readers=readers)
    lines: list[str] = []
    dataset = open_dataset(data, 257)
    reading.train_iterator(dataset, data, mesh, lambda line, _: lines.append(line)).close()
    return lines


if __name__ == "__main__":
    from tlm_jax import storage

    address, number, index, folder, text = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4 // int(number))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(number), int(index))
    answers = [read(text, storage.path(folder), mesh) for mesh in meshes(text)]
    print(json.dumps([*answers, told(text, 2, meshes(text)[0])]))
