"""Greedy continuations by this package, a batch for each line of standard input (see `race`).

python -m benchmarks.generate_worker RUN '[[1, 2, ...], ...]' NEW_TOKENS
"""

import json
import pathlib
import sys

import numpy as np

from benchmarks import race
from benchmarks.evaluation import open_run
from tlm_jax.evaluation.generation import Generator


def main() -> None:
    folder, prompts, new = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    _, tokenizer, model, params, mesh = open_run(folder)
    length = len(prompts[0])
    generator = Generator(model, params, tokenizer, mesh, max_length=length + new)
    written: list[list[int]] = []

    def one_batch() -> None:
        nonlocal written
        pieces = list(generator.pieces(prompts, length, new))
        written = np.concatenate(pieces, axis=1)[:, :new].tolist()

    one_batch()
    race.answer(
        one_batch, start={}, end=lambda: {"peak_mib": race.resident_mib(), "written": written}
    )


if __name__ == "__main__":
    main()
