"""Batches of token ids, deterministic and exactly resumable.

Legend: B batch, L sequence length. A document of tokens t_1 .. t_n becomes
inputs [eot] + t and targets t + [eot], so that every token is predicted once,
wherever rows are cut.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlm_jax import storage
from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import cache, store
from tlm_jax.data import prepare as prepare_lib
from tlm_jax.data import processes as processes_lib
from tlm_jax.data import shares as shares_lib
from tlm_jax.data import tokenizers as tokenizers_lib
from tlm_jax.data.store import SPLITS, Split, SplitStatistics

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

LAYOUT_VERSION = 2
_ARRAYS = ("inputs", "targets", "document_ids", "positions")
_READ_THREADS = 4
_READ_AHEAD = 16  # documents


def open_dataset(config: DataConfig, vocab_size: int) -> "Dataset":
    """Opens the text that `config` names; tokenises it if that was not done before.

    Args:
      config: text, tokenizer and batches.
      vocab_size: rows of the model's embedding table.

    Raises:
      UserError: the tokenizer does not fit the model or the prepared text, or a fault
        in text, prepared text or cache.
    """
    tokenizer = tokenizers_lib.load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but model.vocab_size "
            f"is {vocab_size}; use --model.vocab_size {tokenizer.vocab_size}"
        )
    if config.mixture:
        folders = {storage.path(name).expanduser(): w for name, w in config.mixture}
    elif config.path is not None and _is_prepared(storage.path(config.path).expanduser()):
        folders = {storage.path(config.path).expanduser(): 1.0}
    else:
        folders = {cache.prepare_cached(config, tokenizer): 1.0}
        statistics = store.open_manifest(next(iter(folders))).statistics
        if empty := [split for split, found in statistics.items() if not found.num_documents]:
            raise UserError(
                f"data.path {config.path} has no {empty[0]} documents at "
                f"validation_fraction={config.validation_fraction}, by which a hash of their text "
                "chooses; use another --data.validation_fraction"
            )
    parts = tuple(_open_part(folder, weight, tokenizer) for folder, weight in folders.items())
    return Dataset(config=config, tokenizer=tokenizer, parts=parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A store and its share of the training rows."""

    folder: pathlib.Path
    manifest: store.Manifest
    weight: float


def _is_prepared(folder: pathlib.Path) -> bool:
    """Whether a folder is one of `tlm prepare`, finished or not."""
    return store.is_complete(folder) or (folder / prepare_lib.PLAN).is_file()


def _open_part(folder: pathlib.Path, weight: float, tokenizer: tokenizers_lib.Tokenizer) -> Part:
    if not store.is_complete(folder):
        if _is_prepared(folder):
            raise UserError(f"{folder} is not finished; the same tlm prepare command resumes it")
        raise UserError(
            f"{folder} has no {store.MANIFEST}; make it with tlm prepare TEXT --out {folder}"
        )
    manifest = store.open_manifest(folder)
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{folder / store.MANIFEST} was made with tokenizer {manifest.tokenizer} "
            f"({manifest.tokenizer_fingerprint}), but data.tokenizer is {tokenizer.name} "
            f"({tokenizer.fingerprint}); give the same --data.tokenizer, or prepare the text again"
        )
    for split, statistics in manifest.statistics.items():
        if not statistics.num_documents:
            raise UserError(
                f"{folder} has no {split} documents; prepare it with another --validation_fraction"
            )
    return Part(folder=folder, manifest=manifest, weight=weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Tokenised text and the batches made of it; open it with `open_dataset`."""

    config: DataConfig
    tokenizer: tokenizers_lib.Tokenizer
    parts: tuple[Part, ...]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with text, splits and tokenizer, not with the shards."""
        prints = [part.manifest.fingerprint for part in self.parts]
        if len(prints) == 1:
            return prints[0]
        return hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16]

    @property
    def statistics(self) -> dict[Split, SplitStatistics]:
        """Counts of documents, tokens and bytes by split."""
        names = [f.name for f in dataclasses.fields(SplitStatistics)]
        return {
            split: SplitStatistics(
                **{
                    n: sum(getattr(p.manifest.statistics[split], n) for p in self.parts)
                    for n in names
                }
            )
            for split in SPLITS
        }

    def layout(self) -> dict[str, Any]:
        """All that the content of the n-th batch depends on, as JSON values.

        Store it with a checkpoint and compare it before an iterator's state is
        restored: Grain takes the state of another layout without complaint and continues with
        other data. Not in it are how many shards hold the documents and how
        many processes train, as other numbers give the same batches, and `skip_corrupt`, as
        without it no iterator has passed a damaged record.
        """
        mixture = [[part.manifest.fingerprint, part.weight] for part in self.parts]
        return {
            "dataset": self.fingerprint,
            "mixture": mixture if len(mixture) > 1 else None,
            "tokenizer": self.tokenizer.fingerprint,
            "seq_len": self.config.seq_len,
            "batch_size": self.config.batch_size,
            "num_workers": self.config.num_workers,
            # Not there before there were several.
            "readers": self.config.readers if self.config.readers > 1 else None,
            "seed": self.config.seed,
            "packing": self.config.packing,
            "version": LAYOUT_VERSION,
        }

    def train_iterator(
        self, share: shares_lib.Share | None = None
    ) -> "grain.DatasetIterator | shares_lib.SharedBatches":
        """Endless batches of the train split, documents reshuffled in each epoch.

        Of several parts, each fills rows of its own; these are mixed by the parts' weights.
        With several readers (`DataConfig.readers`), document n of the shuffled ones goes to
        reader n modulo their number, and each makes rows of its own.

        With `num_workers` > 0, reader processes import the main module: its code
        must stand under `if __name__ == "__main__"`. Call the iterator's `close()`
        at the end, which stops them.

        Args:
          share: of several readers, those whose rows are wanted; the others' rows are zeros. None
            is all. It means nothing to a single reader.

        Returns:
          An iterator, with `get_state` and `set_state`, of dicts of int32 arrays
          (B, L): `inputs`, `targets`, `document_ids` (1, 2, ... for the documents of a row)
          and `positions` (from 0 in each document).
        """
        from tlm_jax.data import packing

        number = self.config.readers
        if number == 1:
            rows = self._rows(1)[0]
            return iter(self._in_processes(rows.batch(self.config.batch_size, drop_remainder=True)))
        share = share or shares_lib.Share(readers=tuple(range(number)), saves=tuple(range(number)))
        joined = packing.ReadersRows(
            self._rows(number, share.readers), self.config.batch_size // number
        )
        return shares_lib.SharedBatches(iter(self._in_processes(joined)), share, number)

    def _rows(self, count: int, readers: Sequence[int] = (0,)) -> dict[int, "grain.IterDataset"]:
        """The endless rows of some of `count` readers."""
        import grain

        from tlm_jax.data import packing

        seeds = [(self.config.seed + number) % 2**32 for number in range(len(self.parts))]
        orders = [
            grain.MapDataset.source(documents).seed(seed).shuffle().repeat()
            for documents, seed in zip(self._documents("train"), seeds, strict=True)
        ]
        weights = [part.weight for part in self.parts]
        threads = max(1, _READ_THREADS // len(readers))
        found = {}
        for reader in readers:
            rows = [
                packing.PackedRows(
                    (
                        order if count == 1 else order.slice(slice(reader, None, count))
                    ).to_iter_dataset(grain.ReadOptions(threads, _READ_AHEAD)),
                    self.config.seq_len,
                    best_fit=self.config.packing == "best_fit",
                    seed=(seed + reader * len(orders)) % 2**32,
                )
                for order, seed in zip(orders, seeds, strict=True)
            ]
            if len(rows) == 1:
                found[reader] = rows[0]
            elif count == 1:
                found[reader] = grain.IterDataset.mix(rows, weights)
            else:
                place = reader * self.config.batch_size // count
                found[reader] = packing.MixedRows(rows, weights, place)
        return found

    def _in_processes(self, batches: "grain.IterDataset") -> "grain.IterDataset":
        """The same batches, made by `num_workers` reader processes if there are to be any."""
        import grain
        from absl import flags

        if not self.config.num_workers:
            return batches
        processes_lib.require_semaphores("use --data.num_workers 0")
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags; we have none
        return batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self.config.num_workers),
            worker_init_fn=_start_reader,
        )

    def validation_batches(self, *, batch_size: int | None = None) -> "ValidationBatches":
        """One pass over the validation split in fixed order; each target occurs once.

        Args:
          batch_size: rows; None is the config's.
        """
        return ValidationBatches(dataset=self, batch_size=batch_size or self.config.batch_size)

    def _documents(self, split: Split) -> list[Any]:
        from tlm_jax.data import packing

        eot, skip = self.tokenizer.eot_id, self.config.skip_corrupt
        copies = cache.cache_root(self.config.cache_dir) / "shards"
        return [packing.TokenDocuments(p.folder, split, eot, skip, copies) for p in self.parts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationBatches:
    """Iterate over it as often as needed; every process gets all rows of all batches.

    Yields what the train iterator yields. Rows that fill up the last batch, and the
    end of the last row, have document id 0 and are not to be scored.
    """

    dataset: Dataset
    batch_size: int

    def __len__(self) -> int:
        targets = self.dataset.statistics["validation"].num_targets
        return math.ceil(math.ceil(targets / self.dataset.config.seq_len) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        import grain

        from tlm_jax.data import packing

        documents = grain.MapDataset.concatenate(
            [grain.MapDataset.source(d) for d in self.dataset._documents("validation")]
        )
        rows = iter(
            packing.PackedRows(
                documents.to_iter_dataset(grain.ReadOptions(_READ_THREADS, _READ_AHEAD)),
                self.dataset.config.seq_len,
            )
        )
        length = self.dataset.config.seq_len
        padding = dict.fromkeys(_ARRAYS, np.zeros(length, np.int32))
        for _ in range(len(self)):  # as many when damaged records were skipped
            group = list(itertools.islice(rows, self.batch_size))
            group += [padding] * (self.batch_size - len(group))
            yield {name: np.stack([row[name] for row in group]) for name in padding}


def _start_reader(index: int, count: int) -> None:
    """In a reader process: leave Ctrl-C to the parent, and end with it even if it is killed."""
    del index, count
    processes_lib.end_with_parent()
