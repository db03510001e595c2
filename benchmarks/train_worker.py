"""Train steps of a config, one for each line of standard input (see `race`).

python -m benchmarks.train_worker CONFIG.json [DOCUMENTS]
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks import race
from tlm_jax import config_io
from tlm_jax.config import RunConfig
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import skeleton
from tlm_jax.models.settings import attention_kernel_here
from tlm_jax.ops import rows
from tlm_jax.training import step
from tlm_jax.training.allocator import release_freed_memory
from tlm_jax.training.updates import About, make_optimizer


def serve(config: RunConfig, documents: int = 1) -> None:
    """Takes the steps of `config`, on random tokens in so many documents a row."""
    model = skeleton(config.model)
    tx = make_optimizer(
        config.optimizer, config.training.num_steps, About.of(model), config.model.mlp
    )
    mesh = mesh_lib.make_mesh(config)
    batch = random_batch(config, documents)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        kind = None  # as training does
        if attention_kernel_here(config.model, config.data.seq_len) == "cudnn":
            kind = rows.kind_on_host(batch["document_ids"])
        program = step.lower_train_step(config, model, tx, mesh, kind=kind).compile()
        compiled = time.perf_counter() - begin
        release_freed_memory()  # as training does
        memory: Any = program.memory_analysis()
        start = {
            "compile_s": compiled,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "state_mib": memory.argument_size_in_bytes / 2**20,
        }
        shardings = step.state_shardings(model, tx, mesh)
        begin_with = jax.jit(lambda key: step.init_state(model, tx, key), out_shardings=shardings)
        init = begin_with.lower(jax.random.key(0)).compile()
        placed = to_devices(batch, mesh)
        last: Any = None

        def one_step() -> None:
            nonlocal last
            if last is None:  # memory is taken when the first turn comes
                last = init(jax.random.key(0)), None
                release_freed_memory()
            last = program(last[0], placed)

        race.answer(one_step, start=start, end=_end, wait=lambda: jax.block_until_ready(last))


def random_batch(config: RunConfig, documents: int = 1) -> dict[str, np.ndarray]:
    """Random tokens, in documents that begin at random places of their rows."""
    shape = rows, length = config.data.batch_size, config.data.seq_len
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    begins = np.zeros(shape, bool)
    for row in range(rows):
        begins[row, rng.choice(np.arange(1, length), documents - 1, replace=False)] = True
    begins[:, 0] = True
    index = np.arange(length, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    numbers = np.cumsum(begins, axis=1, dtype=np.int32)
    return {"inputs": ids, "targets": ids, "document_ids": numbers, "positions": positions}


def _end() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "peak_mib": race.resident_mib(),
        "device_peak_mib": stats.get("peak_bytes_in_use", 0) / 2**20,
    }


if __name__ == "__main__":
    file, *documents = sys.argv[1:]
    serve(config_io.from_dict(json.loads(pathlib.Path(file).read_text())), *map(int, documents))
