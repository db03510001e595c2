"""The store of tokenised documents: a folder of ArrayRecord shards and a manifest.

A record is one document: a header (CRC-32 of all that follows, number of tokens, bytes per
token) and its token ids, little endian. Order counts: document n is the
n-th record of a split's shards, taken in the order of the manifest, and neither
the number nor the size of the shards matters to what is read.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from tlm_jax import files, storage
from tlm_jax.config import UserError
from tlm_jax.data import shard_cache
from tlm_jax.files import sha256 as sha256

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
FORMAT_VERSION = 2
MANIFEST = "manifest.json"

_CRC = struct.Struct("<I")
_SHAPE = struct.Struct("<IB")
_HEADER_BYTES = _CRC.size + _SHAPE.size
_OPEN_SHARDS = 128
"""Readers kept open at a time; each takes a file handle and the offsets of its records."""

# A polynomial over documents: unlike a running hash, that of a whole follows from those of parts.
_MODULUS = 2**127 - 1
_BASE = 0x5851F42D4C957F2D14057B7EF767814F % _MODULUS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of records."""

    file: str
    """Its name in the folder."""
    num_documents: int
    num_tokens: int
    """Without separators."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""
    digest: str
    """32 hex digits that change with the documents and their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """What a split holds."""

    num_documents: int
    num_tokens: int
    """Without separators."""
    num_bytes: int
    """UTF-8 bytes of the text."""

    @property
    def num_targets(self) -> int:
        """Tokens to predict in one pass: those of the text and one end-of-text per document."""
        return self.num_tokens + self.num_documents

    @property
    def bytes_per_target(self) -> float:
        """Divide a loss in nats by this and by ln 2 to get bits per byte."""
        return self.num_bytes / self.num_targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a store's folder."""

    source: str
    """What was prepared, for messages."""
    tokenizer: str
    """Its name at that time, for messages."""
    tokenizer_fingerprint: str
    vocab_size: int
    rules: dict[str, Any]
    """What the source was told: column, seed and share of what is held out; empty for its own."""
    shards: dict[Split, tuple[Shard, ...]]
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records left out, by reason."""
    skipped_places: tuple[str, ...] = ()
    """The first of them, with file and record."""
    format_version: int = FORMAT_VERSION

    @property
    def statistics(self) -> dict[Split, SplitStatistics]:
        """Counts by split."""
        names = [f.name for f in dataclasses.fields(SplitStatistics)]
        return {
            split: SplitStatistics(**{n: sum(getattr(s, n) for s in shards) for n in names})
            for split, shards in self.shards.items()
        }

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with documents, their order, splits, tokenizer and format.

        The same documents in more or fewer shards have the same.
        """
        key: list[Any] = [self.format_version, self.tokenizer_fingerprint]
        for split, shards in self.shards.items():
            digest = 0
            for shard in shards:
                digest *= pow(_BASE, shard.num_documents, _MODULUS)
                digest = (digest + int(shard.digest, 16)) % _MODULUS
            key += [split, dataclasses.astuple(self.statistics[split]), digest]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def save(self, folder: pathlib.Path) -> None:
        """Writes manifest.json atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        files.write_text(folder / MANIFEST, text)


def is_complete(folder: pathlib.Path) -> bool:
    """Whether the folder holds a store that was finished."""
    return (folder / MANIFEST).is_file()


def open_manifest(folder: pathlib.Path) -> Manifest:
    """Reads manifest.json and checks that every shard is there in its full size.

    Raises:
      UserError: no manifest, a damaged one, or a shard that is missing or truncated.
    """
    path = folder / MANIFEST
    try:
        values = files.read_json(path)
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {values['format_version']}, this version of tlm-jax reads "
                f"{FORMAT_VERSION}; prepare the text again"
            )
        values["shards"] = {
            split: tuple(Shard(**shard) for shard in values["shards"][split]) for split in SPLITS
        }
        manifest = Manifest(**values | {"skipped_places": tuple(values["skipped_places"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the text again") from error
    listed = {p.name: p for p in folder.iterdir()} if storage.in_bucket(folder) else {}
    for shard in [s for shards in manifest.shards.values() for s in shards]:
        file = listed.get(shard.file, folder / shard.file)  # listed ones know their size
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"{file} is missing, but {MANIFEST} lists it") from error
        if size != shard.size:
            what = "truncated" if size < shard.size else "not the file that was written"
            raise UserError(f"{file} has {size:,} bytes instead of {shard.size:,}: it is {what}")
    return manifest


def verify(folder: pathlib.Path) -> Iterator[Shard]:
    """Reads every shard and yields it if its checksum matches.

    Raises:
      UserError: a checksum is wrong; the first damaged record is named.
    """
    manifest = open_manifest(folder)
    for split in SPLITS:
        first = 0
        for shard in manifest.shards[split]:
            if sha256(folder / shard.file) != shard.sha256:
                reader = DocumentReader(folder, manifest, split)
                for record in range(shard.num_documents):
                    reader[first + record]  # raises where the damage is
                raise UserError(
                    f"{folder / shard.file} does not match its checksum in {MANIFEST}, although "
                    f"all of its {shard.num_documents:,} records can be read"
                )
            first += shard.num_documents
            yield shard


class ShardWriter:
    """Writes one shard under a temporary name, and renames it when it is complete.

    One for a bucket is written on this machine and copied then.
    """

    def __init__(self, folder: pathlib.Path, file: str, vocab_size: int) -> None:
        from array_record.python import array_record_module

        self._path = folder / file
        here = pathlib.Path(tempfile.gettempdir()) if storage.in_bucket(folder) else folder
        self._temporary = here / f".{file}.{os.getpid()}.tmp"
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._counts = {"num_documents": 0, "num_tokens": 0, "num_bytes": 0}
        self._digest = 0
        with _write_errors(self._path):
            # One record a chunk, which is what random access wants.
            self._writer = array_record_module.ArrayRecordWriter(
                os.fspath(self._temporary), "group_size:1,uncompressed"
            )

    def add(self, ids: list[int] | np.ndarray, num_bytes: int) -> None:
        """Appends a document.

        Args:
          ids: token ids.
          num_bytes: UTF-8 bytes of its text.

        Raises:
          ValueError: an id beyond the vocabulary.
        """
        wide = np.asarray(ids, np.int64)
        if wide.size and not 0 <= wide.min() <= wide.max() < self._vocab_size:
            raise ValueError(
                f"token id {wide.max()} is beyond the vocabulary of {self._vocab_size:,}"
            )
        payload = wide.astype(self._dtype).tobytes()
        shape = _SHAPE.pack(len(wide), self._dtype.itemsize)
        with _write_errors(self._path):
            self._writer.write(_CRC.pack(zlib.crc32(payload, zlib.crc32(shape))) + shape + payload)
        value = int.from_bytes(hashlib.blake2b(payload, digest_size=15).digest(), "little")
        self._digest = (self._digest * _BASE + value + 1) % _MODULUS
        self._counts["num_documents"] += 1
        self._counts["num_tokens"] += len(wide)
        self._counts["num_bytes"] += num_bytes

    def close(self) -> Shard:
        """Completes the shard: synced to disk, then renamed."""
        with _write_errors(self._path):
            self._writer.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            shard = Shard(
                file=self._path.name,
                **self._counts,
                size=self._temporary.stat().st_size,
                sha256=sha256(self._temporary),
                digest=f"{self._digest:032x}",
            )
            if not storage.in_bucket(self._path):
                self._temporary.rename(self._path)
                return shard
        storage.upload(self._temporary, self._path)
        self._temporary.unlink()
        return shard

    def discard(self) -> None:
        """Drops what was written."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns errors of ArrayRecord's writer into the system's."""
    try:
        yield
    except RuntimeError as error:
        if failure := re.search(r"(?:write|open|fsync|close)\(\) failed: ([^;]+)", str(error)):
            raise OSError(errno.EIO, failure[1], os.fspath(path)) from error
        raise


class DocumentReader:
    """Random access to the token ids of a split's documents, checked as they are read.

    Memory does not grow with the store: shards are opened when they are needed, and the least
    recently used one is closed when there are too many.

    Args:
      folder: that of the store.
      manifest: its manifest.
      split: which documents.
      skip_corrupt: give None for a damaged record, count it and say so on standard
        error, instead of raising.
      copies: folder for copies of shards that lie in a bucket; None is one for temporary files.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        manifest: Manifest,
        split: Split,
        *,
        skip_corrupt: bool = False,
        copies: pathlib.Path | None = None,
    ) -> None:
        self._folder = folder
        self._shards = manifest.shards[split]
        self._copies = copies or pathlib.Path(tempfile.gettempdir()) / "tlm-shards"
        self._opening = collections.defaultdict[int, threading.Lock](threading.Lock)
        self._ends = np.cumsum([s.num_documents for s in manifest.shards[split]], dtype=np.int64)
        self._vocab_size = manifest.vocab_size
        self._skip_corrupt = skip_corrupt
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.num_skipped = 0
        """Damaged records met so far."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> np.ndarray | None:
        """The ids of a document, (N,) int32.

        Raises:
          UserError: the record is damaged.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        record = index - (int(self._ends[number - 1]) if number else 0)
        try:
            return self._decode(self._reader(number).read([record])[0])
        except (RuntimeError, ValueError) as error:
            path = self._folder / self._shards[number].file
            reason = str(error) if isinstance(error, ValueError) else "it cannot be read"
            message = f"{path}, record {record}: {reason}"
            if not self._skip_corrupt:
                raise UserError(f"{message}; prepare the text again") from error
            with self._lock:
                self.num_skipped += 1
                count = self.num_skipped
            # One write a note, so that those of several threads do not mix.
            sys.stderr.write(f"note: {message}; skipped ({count} so far)\n")
            return None

    def _reader(self, number: int) -> Any:
        if (reader := self._opened(number)) is not None:
            return reader
        if not storage.in_bucket(self._folder):
            return self._open(number)
        with self._lock:
            opening = self._opening[number]
        with opening:  # one thread copies it
            return self._opened(number) or self._open(number)

    def _opened(self, number: int) -> Any:
        with self._lock:
            if number in self._readers:
                self._readers.move_to_end(number)
                return self._readers[number]
        return None

    def _open(self, number: int) -> Any:
        from array_record.python import array_record_module

        shard = self._shards[number]
        path = self._folder / shard.file
        reader = array_record_module.ArrayRecordReader(
            os.fspath(shard_cache.local(path, shard.sha256, shard.size, self._copies)),
            options="readahead_buffer_size:0",
            file_reader_buffer_size=32 * 1024,
        )
        with self._lock:
            self._readers[number] = reader
            while len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)  # closed when no thread reads it any more
        return reader

    def _decode(self, record: bytes) -> np.ndarray:
        if len(record) < _HEADER_BYTES:
            raise ValueError("it has no header")
        if _CRC.unpack_from(record)[0] != zlib.crc32(memoryview(record)[_CRC.size :]):
            raise ValueError("it does not match its checksum")
        count, width = _SHAPE.unpack_from(record, _CRC.size)
        ids = np.frombuffer(record, f"<u{width}", count, _HEADER_BYTES)
        if count and (largest := int(ids.max())) >= self._vocab_size:
            raise ValueError(f"token id {largest} is beyond the vocabulary of {self._vocab_size:,}")
        return ids.astype(np.int32)
