"""Batches of token ids, deterministic and exactly resumable.

Legend: B batch, L sequence length. A document of tokens t_1 .. t_n becomes
inputs [eot] + t and targets t + [eot], so that every token is predicted once,
wherever rows are cut.
"""

import dataclasses
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import prepared as prepared_lib
from tlm_jax.data import sources
from tlm_jax.data import tokenizers as tokenizers_lib

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

LAYOUT_VERSION = 1
_READ_THREADS = 4
_READ_AHEAD = 16  # documents


def open_dataset(config: DataConfig, vocab_size: int) -> "Dataset":
    """Opens the text that `config` names; tokenises it if that was not done before.

    Args:
      config: text, tokenizer and batches.
      vocab_size: rows of the model's embedding table.

    Raises:
      UserError: the tokenizer does not fit the model, or a fault in text or cache.
    """
    tokenizer = tokenizers_lib.load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but model.vocab_size "
            f"is {vocab_size}; use --model.vocab_size {tokenizer.vocab_size}"
        )
    source = sources.open_source(config)
    prepared = prepared_lib.prepare(source, tokenizer, config.cache_dir)
    return Dataset(config=config, tokenizer=tokenizer, prepared=prepared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Tokenised text and the batches made of it; open it with `open_dataset`."""

    config: DataConfig
    tokenizer: tokenizers_lib.Tokenizer
    prepared: prepared_lib.Prepared

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with text, splits and tokenizer."""
        return self.prepared.fingerprint

    @property
    def statistics(self) -> dict[sources.Split, prepared_lib.SplitStatistics]:
        """Counts of documents, tokens and bytes by split."""
        return self.prepared.statistics

    def layout(self, *, process_count: int = 1) -> dict[str, Any]:
        """All that the content of the n-th batch depends on, as JSON values.

        Store it with a checkpoint and compare it before an iterator's state is
        restored: Grain takes the state of another layout without complaint and
        goes on with other data.
        """
        return {
            "dataset": self.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "seq_len": self.config.seq_len,
            "batch_size": self.config.batch_size,
            "num_workers": self.config.num_workers,
            "process_count": process_count,
            "seed": self.config.seed,
            "packing": "concat_then_split",
            "version": LAYOUT_VERSION,
        }

    def train_iterator(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> "grain.DatasetIterator":
        """Endless batches of the train split, documents reshuffled in each epoch.

        With `num_workers` > 0, reader processes import the main module: its code
        must stand under `if __name__ == "__main__"`. Call the iterator's `close()`
        at the end, which stops them.

        Args:
          process_index: this process among those that share the batch.
          process_count: their number. Process p reads every process_count-th document.

        Returns:
          A Grain iterator, with `get_state` and `set_state`, of dicts of int32 arrays
          (B / process_count, L): `inputs`, `targets`, `segment_ids` (1, 2, ... for the
          documents of a row) and `positions` (from 0 in each segment).

        Raises:
          UserError: batch_size cannot be shared out evenly.
        """
        batch_size = _local_size(self.config.batch_size, process_count)
        import grain
        from absl import flags

        from tlm_jax.data import packing

        documents = grain.MapDataset.source(self._documents("train"))
        documents = documents.seed(self.config.seed % 2**32).shuffle().repeat()
        documents = documents[process_index::process_count]
        rows = packing.PackedRows(
            documents.to_iter_dataset(grain.ReadOptions(_READ_THREADS, _READ_AHEAD)),
            self.config.seq_len,
        )
        batches = rows.batch(batch_size, drop_remainder=True)
        if self.config.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; we have none
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.config.num_workers),
                worker_init_fn=_start_reader,
            )
        return iter(batches)

    def validation_batches(
        self, *, batch_size: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> "ValidationBatches":
        """One pass over the validation split in fixed order; each target occurs once.

        Args:
          batch_size: rows over all processes; None is the config's.
          process_index: this process among those that share the batch.
          process_count: their number.

        Raises:
          UserError: batch_size cannot be shared out evenly.
        """
        size = self.config.batch_size if batch_size is None else batch_size
        _local_size(size, process_count)
        return ValidationBatches(
            dataset=self, batch_size=size, process_index=process_index, process_count=process_count
        )

    def _documents(self, split: sources.Split) -> Any:
        from tlm_jax.data import packing

        return packing.TokenDocuments(self.prepared.folder, split, self.tokenizer.eot_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationBatches:
    """Iterate over it as often as needed; all processes get equally many batches.

    Yields what the train iterator yields. Rows that fill up the last batch, and the
    end of the last row, have segment id 0 and are not to be scored.
    """

    dataset: Dataset
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        targets = self.dataset.statistics["validation"].num_targets
        return math.ceil(math.ceil(targets / self.dataset.config.seq_len) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        import grain

        from tlm_jax.data import packing

        documents = grain.MapDataset.source(self.dataset._documents("validation"))
        rows = iter(
            packing.PackedRows(
                documents.to_iter_dataset(grain.ReadOptions(_READ_THREADS, _READ_AHEAD)),
                self.dataset.config.seq_len,
            )
        )
        local = self.batch_size // self.process_count
        mine = slice(self.process_index * local, (self.process_index + 1) * local)
        while group := list(itertools.islice(rows, self.batch_size)):
            padding = {name: np.zeros_like(array) for name, array in group[0].items()}
            group += [padding] * (self.batch_size - len(group))
            yield {name: np.stack([row[name] for row in group[mine]]) for name in padding}


def _start_reader(index: int, count: int) -> None:
    """In a reader process: leave Ctrl-C to the parent, and end with it even if it is killed."""
    del index, count

    def end_with_parent() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"data.batch_size={batch_size} does not divide among {process_count} processes; "
            f"use --data.batch_size {-(-batch_size // process_count) * process_count}"
        )
    return batch_size // process_count
