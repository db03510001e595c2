"""Sources with one document per record: JSON lines, Parquet, TFDS, Hugging Face data sets."""

import abc
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from tlm_jax import storage
from tlm_jax.config import UserError
from tlm_jax.data import streams
from tlm_jax.data.sources import (
    TEXT_SUFFIXES,
    Document,
    Fault,
    FilesSource,
    Source,
    Unit,
    fault_in,
    files_below,
    hashes,
)

LINES_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
_SOURCE = "source"
_PACKED_RATIO = 3
"""Approximate bytes of text per byte of a compressed file; only progress depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How records become documents."""

    column: str = "text"
    """The field that holds the text."""
    validation_fraction: float = 0.005
    seed: int = 0
    max_document_bytes: int = 16 * 2**20


def open_source(name: str, rules: Rules) -> Source:
    """What `tlm prepare NAME` reads.

    Args:
      name: a file or folder, tfds:NAME[:SPLIT[:COLUMN]] or
        hf:NAME[:CONFIG[:SPLIT[:COLUMN]]].
      rules: how records become documents.

    Raises:
      UserError: nothing there, of several kinds, or a package is missing.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "tfds":
        return TFDSSource(rest, rules)
    if scheme == "hf":
        return HuggingFaceSource(rest, rules)
    return open_files(name, rules, _SOURCE)


def open_files(name: str, rules: Rules, option: str) -> "FilesSource | FileRecordSource":
    """Text files, JSON lines or Parquet: a file, those below a folder, or those of a pattern.

    Args:
      name: the file, folder or pattern.
      rules: how records become documents.
      option: what to call the name in messages.

    Raises:
      UserError: nothing there, or files of several kinds.
    """
    kinds = (*TEXT_SUFFIXES, *LINES_SUFFIXES, *PARQUET_SUFFIXES)
    found = {streams.kind(file) for file in files_below(name, kinds, option).values()}
    readers = {TEXT_SUFFIXES: None, LINES_SUFFIXES: LinesSource, PARQUET_SUFFIXES: ParquetSource}
    chosen = [suffixes for suffixes in readers if found & set(suffixes)]
    if len(chosen) > 1:
        raise UserError(
            f"{option} {name} has files of several kinds ({', '.join(sorted(found))}); name one "
            "kind by a pattern such as 'FOLDER/**/*.jsonl', or prepare each kind with tlm prepare "
            "and mix the results with data.mixture"
        )
    reader = readers[chosen[0]]
    if reader is None:
        return FilesSource(name, rules.validation_fraction, option)
    return reader(name, rules, option)


class RecordSource(Source):
    """One document per record; a hash of seed and text says which ones are held out.

    So equal texts are in one split, wherever they are.
    """

    def __init__(self, name: str, rules: Rules) -> None:
        self.name = name
        self.rules = rules

    def _item(self, source: str, at: Any, value: Any) -> Document | Fault:
        """A record's text, or what is wrong with it."""
        rules = self.rules
        if not isinstance(value, str | bytes):
            return Fault(source=source, reason=f"has no text in {rules.column!r}", at=at)
        if fault := fault_in(value):
            return Fault(source=source, reason=fault[0], detail=fault[1], at=at)
        content = value if isinstance(value, bytes) else value.encode()
        if not content.strip():
            return Fault(source=source, reason="has an empty document", at=at)
        if len(content) > rules.max_document_bytes:
            return Fault(source=source, reason=too_long(rules), at=at)
        drawn = hashlib.blake2b(content, digest_size=8, key=b"%d" % rules.seed).digest()
        held_out = int.from_bytes(drawn, "little") < rules.validation_fraction * 2**64
        return Document(
            place=f"{source}, {at}" if isinstance(at, str) else f"{source}, offset {at[1]}",
            split="validation" if held_out else "train",
            text=value if isinstance(value, str) else value.decode(),
            num_bytes=len(content),
        )


def too_long(rules: Rules) -> str:
    """The reason to refuse a record."""
    return f"has a record of more than max_document_bytes={rules.max_document_bytes:,}"


class FileRecordSource(RecordSource):
    """Records in files of one kind."""

    suffixes: tuple[str, ...]

    def __init__(self, name: str, rules: Rules, option: str = _SOURCE) -> None:
        super().__init__(name, rules)
        self._files = list(files_below(name, self.suffixes, option).items())

    @property
    def identity(self) -> dict[str, Any]:
        return {name: [f.stat().st_size, f.stat().st_mtime_ns] for name, f in self._files}

    def content_identity(self) -> dict[str, Any]:
        """Like `identity`, of what the files say: reads all of them."""
        return hashes(dict(self._files)) | {"rules": dataclasses.asdict(self.rules)}


class LinesSource(FileRecordSource):
    """JSON lines, compressed or not; units are byte ranges, or whole files if compressed."""

    suffixes = LINES_SUFFIXES

    @property
    def num_bytes(self) -> int:
        return sum(
            file.stat().st_size * (_PACKED_RATIO if streams.is_packed(file) else 1)
            for _, file in self._files
        )

    def units(self, size: int) -> list[Unit]:
        units = []
        for number, (_, file) in enumerate(self._files):
            total = file.stat().st_size
            if streams.is_packed(file):
                units.append(Unit(size=total * _PACKED_RATIO, what=[number, 0, None]))
                continue
            count = max(1, round(total / size))
            ends = [total * i // count for i in range(count + 1)]
            pairs = itertools.pairwise(ends)
            units += [Unit(size=b - a, what=[number, a, b]) for a, b in pairs]
        return units

    def items(self, unit: Unit) -> Iterator[Document | Fault]:
        number, start, end = unit.what
        _, file = self._files[number]
        limit = self.rules.max_document_bytes
        for offset, line in streams.lines(file, start, end, limit):
            if line.isspace():
                continue
            at, source = (file, offset), str(file)
            if len(line) > limit and not line.endswith(b"\n"):
                yield Fault(source=source, reason=too_long(self.rules), at=at)
                continue
            if fault := fault_in(line):
                at = (file, offset + fault[2])
                yield Fault(source=source, reason=fault[0], detail=fault[1], at=at)
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                detail = str(error).split(":")[0]
                yield Fault(
                    source=source, reason="has a line that is not JSON", detail=detail, at=at
                )
                continue
            value = record.get(self.rules.column) if isinstance(record, dict) else None
            yield self._item(source, at, value if isinstance(value, str) else None)


class ParquetSource(FileRecordSource):
    """Parquet; units are ranges of row groups."""

    suffixes = PARQUET_SUFFIXES

    @property
    def num_bytes(self) -> int:
        return sum(size for groups in self._groups for _, size in groups)

    @functools.cached_property
    def _groups(self) -> list[list[tuple[int, int]]]:
        """(rows, bytes of text) of each row group of each file."""
        found = []
        for _, file in self._files:
            metadata = self._open(file).metadata
            names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            column = names.index(self.rules.column)
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            found.append([(g.num_rows, g.column(column).total_uncompressed_size) for g in groups])
        return found

    def units(self, size: int) -> list[Unit]:
        units = []
        for number, groups in enumerate(self._groups):
            start, filled, row, rows = 0, 0, 0, 0
            for group, (group_rows, group_bytes) in enumerate(groups):
                filled += group_bytes
                rows += group_rows
                if filled >= size or group + 1 == len(groups):
                    units.append(Unit(size=filled, what=[number, start, group + 1, row]))
                    start, filled, row = group + 1, 0, rows
        return units

    def items(self, unit: Unit) -> Iterator[Document | Fault]:
        import pyarrow

        number, start, end, row = unit.what
        _, file = self._files[number]
        column = self.rules.column
        batches = self._open(file).iter_batches(64, range(start, end), columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pyarrow.ArrowException) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{file} is damaged near row {row}: {reason}") from error
            if batch is None:
                return
            # As bytes, because Arrow does not check that they are UTF-8.
            for value in batch.column(0).cast(pyarrow.large_binary()):
                yield self._item(str(file), f"row {row}", value.as_py())
                row += 1

    def _open(self, file: pathlib.Path) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            reader = parquet.ParquetFile(file.open("rb") if storage.in_bucket(file) else file)
        except pyarrow.ArrowException as error:
            raise UserError(f"{file} is not Parquet, or truncated") from error
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
        schema = reader.schema_arrow
        texts = [
            field.name
            for field in schema
            if pyarrow.types.is_string(field.type)
            or pyarrow.types.is_large_string(field.type)
            or pyarrow.types.is_binary(field.type)
        ]
        if self.rules.column not in texts:
            raise UserError(
                f"{file} has no text column {self.rules.column!r}; tlm prepare --column can name "
                f"one of {', '.join(texts) or 'none'}"
            )
        return reader


class _IndexedSource(RecordSource):
    """A sequence of records; units are index ranges."""

    num_records: int

    @abc.abstractmethod
    def _values(self, start: int, end: int) -> Iterator[Any]: ...

    def units(self, size: int) -> list[Unit]:
        length, total = self.num_records, self.num_bytes
        if not length:
            raise UserError(f"{self.name} has no records")
        count = min(length, max(1, round(total / size)))
        ends = [length * i // count for i in range(count + 1)]
        pairs = itertools.pairwise(ends)
        return [Unit(size=total * (b - a) // length, what=[a, b]) for a, b in pairs]

    def items(self, unit: Unit) -> Iterator[Document | Fault]:
        start, end = unit.what
        for row, value in enumerate(self._values(start, end), start):
            yield self._item(self.name, f"record {row}", value)


class TFDSSource(_IndexedSource):
    """A TFDS data set that was prepared as ArrayRecord: NAME[:SPLIT[:COLUMN]].

    It is looked for where TFDS keeps its data sets (TFDS_DATA_DIR).
    """

    def __init__(self, spec: str, rules: Rules) -> None:
        name, split, column = (*spec.split(":"), "", "")[:3]
        super().__init__(f"tfds:{spec}", dataclasses.replace(rules, column=column or rules.column))
        self._dataset, self._split = name, split or "train"
        import tensorflow_datasets as tfds

        try:
            self._builder = tfds.builder(name)
            self.num_records = self._builder.info.splits[self._split].num_examples
            first = self._open()[0] if self.num_records else {}
        except Exception as error:  # TFDS raises all sorts
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self.name} cannot be opened: {reason} (it must have been prepared as "
                "array_record below TFDS_DATA_DIR)"
            ) from error
        if self.num_records and self.rules.column not in first:
            raise UserError(f"{self.name} has no {self.rules.column!r}; it has {', '.join(first)}")

    def __reduce__(self) -> Any:
        return TFDSSource, (self.name.partition(":")[2], self.rules)

    @property
    def identity(self) -> dict[str, Any]:
        info = self._builder.info
        counts = {"records": self.num_records, "bytes": self.num_bytes}
        return {"version": str(info.version), **counts}

    def _open(self) -> Any:
        return self._builder.as_data_source(split=self._split)

    @property
    def num_bytes(self) -> int:
        return int(self._builder.info.splits[self._split].num_bytes)

    def _values(self, start: int, end: int) -> Iterator[Any]:
        records = self._open()
        return (records[row][self.rules.column] for row in range(start, end))


class HuggingFaceSource(_IndexedSource):
    """A data set of the Hugging Face hub, or a folder: NAME[:CONFIG[:SPLIT[:COLUMN]]]."""

    def __init__(self, spec: str, rules: Rules) -> None:
        name, config, split, column = (*spec.split(":"), "", "", "")[:4]
        super().__init__(f"hf:{spec}", dataclasses.replace(rules, column=column or rules.column))
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"hf:{spec} needs the package datasets: pip install 'tlm-jax[hf]'"
            ) from error
        try:
            self._records = datasets.load_dataset(name, config or None, split=split or "train")
        except Exception as error:  # the library raises all sorts
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"hf:{spec} cannot be loaded: {reason}") from error
        if self.rules.column not in self._records.column_names:
            names = ", ".join(self._records.column_names)
            raise UserError(f"hf:{spec} has no {self.rules.column!r}; it has {names}")
        self._records = self._records.select_columns([self.rules.column])
        self.num_records = len(self._records)

    @property
    def identity(self) -> dict[str, Any]:
        return {"records": self.num_records, "bytes": self.num_bytes}

    @property
    def num_bytes(self) -> int:
        return int(self._records.data.nbytes)

    def _values(self, start: int, end: int) -> Iterator[Any]:
        for first in range(start, end, 64):
            yield from self._records[first : min(first + 64, end)][self.rules.column]
