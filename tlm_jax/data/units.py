"""A unit of text, written in parts: the work that processes and nodes share.

A part is at most one shard per split, then `parts/UNIT-PART.json`, which marks it as complete.
Parts depend on the job and the unit only.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from tlm_jax import files
from tlm_jax.config import UserError
from tlm_jax.data.sources import Document, Fault, Source, Unit
from tlm_jax.data.store import Shard, ShardWriter, Split
from tlm_jax.data.tokenizers import Tokenizer

PARTS = "parts"
SHARD_BYTES = 64 * 2**20
LISTED_FAULTS = 20
_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to prepare and how; the same job gives the same files."""

    source: Source
    tokenizer: str | None
    """As `load_tokenizer` takes it."""
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the source was told, as JSON values, for plan and manifest."""
    shard_bytes: int = SHARD_BYTES
    """Text of a shard at most, about; less where a source would make too few to share out."""
    skip_corrupt: bool = False
    """Leave out and count records that cannot be used, instead of stopping."""


def parts_of(folder: pathlib.Path, index: int) -> list[dict[str, Any]]:
    """What the complete parts of a unit say, in order."""
    parts: list[dict[str, Any]] = []
    while (path := part_file(folder, index, len(parts))).is_file():
        parts.append(files.read_json(path))
    return parts


def part_file(folder: pathlib.Path, index: int, number: int) -> pathlib.Path:
    """What says that a part is complete."""
    return folder / PARTS / f"{index:05d}-{number:03d}.json"


def is_done(folder: pathlib.Path, index: int) -> bool:
    """Whether all parts of a unit are complete."""
    parts = parts_of(folder, index)
    return bool(parts) and parts[-1]["last"]


def bytes_done(folder: pathlib.Path, unit: Unit, index: int) -> int:
    """Bytes of text in the complete parts, no more than the unit is said to have."""
    shards = [shard for part in parts_of(folder, index) for shard in part["shards"].values()]
    return min(unit.size, sum(shard["num_bytes"] for shard in shards))


def write_unit(
    job: Job,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    unit: Unit,
    index: int,
    advance: Callable[[int], None],
) -> None:
    """Writes the parts of a unit that are missing; `advance` is told the bytes of text done."""
    parts = parts_of(folder, index)
    read = parts[-1]["records"] if parts else 0
    items = itertools.islice(job.source.items(unit), read, None)
    told = bytes_done(folder, unit, index)

    def advance_within(size: int) -> None:
        nonlocal told
        advance(min(size, unit.size - told))
        told += min(size, unit.size - told)

    for number in itertools.count(len(parts)):
        part = _Part(job, tokenizer, folder, f"{index:05d}" + (f"-{number:03d}" if number else ""))
        try:
            last = part.fill(items, advance_within)
            shards = part.close()
        except BaseException:
            part.discard()
            raise
        read += part.records
        values = {
            "last": last,
            "records": read,
            "shards": {split: dataclasses.asdict(shard) for split, shard in shards.items()},
            "skipped": part.skipped,
            "skipped_places": part.skipped_places,
        }
        files.write_text(part_file(folder, index, number), json.dumps(values, indent=1))
        if last:
            break
    advance(unit.size - told)  # sizes of units are estimates


class _Part:
    """At most one shard per split, being written."""

    def __init__(self, job: Job, tokenizer: Tokenizer, folder: pathlib.Path, name: str) -> None:
        self._job, self._tokenizer, self._folder, self._name = job, tokenizer, folder, name
        self._writers: dict[Split, ShardWriter] = {}
        self._batch: list[Document] = []
        self._batch_bytes = 0
        self.records = 0
        self.skipped: dict[str, int] = {}
        self.skipped_places: list[str] = []

    def fill(self, items: Iterator[Document | Fault], advance: Callable[[int], None]) -> bool:
        """Takes records until the part is large enough; returns whether there are no more."""
        size = 0
        for item in items:
            self.records += 1
            if isinstance(item, Fault):
                self._skip(item)
                continue
            self._batch.append(item)
            self._batch_bytes += item.num_bytes
            size += item.num_bytes
            if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_DOCUMENTS:
                advance(self._write_batch())
            if size >= self._job.shard_bytes:
                advance(self._write_batch())
                return False
        advance(self._write_batch())
        return True

    def _skip(self, fault: Fault) -> None:
        if not self._job.skip_corrupt:
            raise UserError(fault.message)
        self.skipped[fault.reason] = self.skipped.get(fault.reason, 0) + 1
        if len(self.skipped_places) < LISTED_FAULTS:
            self.skipped_places.append(fault.message)

    def _write_batch(self) -> int:
        batch = self._tokenizer.encode_batch([document.text for document in self._batch])
        for document, ids in zip(self._batch, batch, strict=True):
            try:
                self._writer(document.split).add(ids, document.num_bytes)
            except ValueError as error:
                raise UserError(
                    f"{document.place}: tokenizer {self._tokenizer.name} gave {error}"
                ) from error
        size = self._batch_bytes
        self._batch, self._batch_bytes = [], 0
        return size

    def _writer(self, split: Split) -> ShardWriter:
        if split not in self._writers:
            file = f"{split}-{self._name}.arrayrecord"
            self._writers[split] = ShardWriter(self._folder, file, self._tokenizer.vocab_size)
        return self._writers[split]

    def close(self) -> dict[Split, Shard]:
        """Completes the shards."""
        return {split: writer.close() for split, writer in self._writers.items()}

    def discard(self) -> None:
        """Drops what was written."""
        for writer in self._writers.values():
            writer.discard()
