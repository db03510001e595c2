"""The batches of a job: each process reads the rows that its devices need."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from tlm_jax.config import DataConfig
from tlm_jax.data import Dataset
from tlm_jax.data.shares import shares
from tlm_jax.distributed.sharding import rows_by_process


def train_iterator(
    dataset: Dataset, config: DataConfig, mesh: Mesh, say: Callable[[str, str], None]
) -> Any:
    """The training batches, with the rows that this process needs.

    Args:
      dataset: the text.
      config: says how many readers make the batches.
      mesh: where they will be placed.
      say: shows a line in a style, if processes must read rows that they do not need.
    """
    readers, size = config.readers, config.batch_size
    rows = rows_by_process(mesh, size)
    each = shares(rows, num_readers=readers, batch_size=size)
    if spare := max(share.spare for share in each):
        fits = next(
            number
            for number in range(readers + 1, size + 1)
            if size % number == 0
            and not any(s.spare for s in shares(rows, num_readers=number, batch_size=size))
        )
        say(
            f"data.readers={readers} does not divide over {len(rows)} processes: up to {spare} of "
            f"the {size} rows of a batch are read by processes that do not need them. A new run "
            f"with data.readers={fits} would avoid this.",
            "yellow",
        )
    if readers == 1:
        return dataset.train_iterator()
    return dataset.train_iterator(each[jax.process_index()])
