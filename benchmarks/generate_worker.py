"""Greedy continuations by this package, a batch for each line of standard input (see `race`).

python -m benchmarks.generate_worker RUN '[[1, 2, ...], ...]' NEW_TOKENS
"""

import json
import pathlib
import sys

import jax
import numpy as np

from benchmarks import race
from tlm_jax.data import load_tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation.generation import Generator
from tlm_jax.models import skeleton
from tlm_jax.training import restore


def main() -> None:
    folder, prompts, new = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    step, metadata = restore.saved_metadata(folder, None)
    config = restore.saved_config(metadata)
    mesh = mesh_lib.device_mesh(config.mesh)
    jax.set_mesh(mesh)
    tokenizer, model = load_tokenizer(config.data.tokenizer), skeleton(config.model)
    params = restore.load_params(folder, step, model, tokenizer, mesh)
    generator = Generator(model, params, tokenizer, mesh, max_length=config.data.seq_len)
    written: list[list[int]] = []

    def one_batch() -> None:
        nonlocal written
        pieces = list(generator.pieces(prompts, len(prompts[0]), new))
        written = np.concatenate(pieces, axis=1)[:, :new].tolist()

    one_batch()
    race.answer(one_batch, start={}, end=lambda: {"peak_mib": race.peak_mib(), "written": written})


if __name__ == "__main__":
    main()
