"""Documents and where they come from; here the prose that the package carries, and text files."""

import abc
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import json
import lzma
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from tlm_jax import storage
from tlm_jax.config import UserError
from tlm_jax.data import streams
from tlm_jax.data.store import Split
from tlm_jax.files import sha256

EMBEDDED = pathlib.Path(__file__).parent / "corpus" / "documents.jsonl.xz"
TEXT_SUFFIXES = (".txt", ".md")
WHOLE_FILES_FROM = 20
MIN_SPLIT_BYTES = 256
_TAIL_WINDOW = 64 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text that is read from its beginning."""

    place: str
    """File and record, for messages."""
    split: Split
    text: str
    num_bytes: int
    """Of the text in UTF-8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A record that cannot be used."""

    source: str
    """File or data set."""
    reason: str
    """What it is or has, in words that faults of a kind share."""
    detail: str = ""
    """More on this one."""
    at: str | tuple[pathlib.Path, int]
    """The record; or a file and an offset in it, whose line is counted when it is asked for."""

    @property
    def message(self) -> str:
        """One line that names file and record."""
        if isinstance(self.at, str):
            where = self.at
        else:
            path, offset = self.at
            where = f"offset {offset}, line {streams.count_lines(path, offset) + 1}"
        return f"{self.source} {self.reason}{self.detail and ': '}{self.detail} at {where}"


def fault_in(content: bytes | str) -> tuple[str, str, int] | None:
    """What is wrong with a document's text: reason, detail and offset; None if nothing is."""
    if isinstance(content, str):
        try:
            content = content.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
            return "is not Unicode", repr(error.object[error.start])[1:-1], error.start
    else:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            return "is not UTF-8", f"byte 0x{content[error.start]:02x}", error.start
    if (nul := content.find(b"\0")) >= 0:
        return "has a NUL character", "", nul
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a source that one process prepares by itself."""

    size: int
    """Bytes of text, about."""
    what: list[Any]
    """JSON values that mean something to the source."""


class Source(abc.ABC):
    """Documents in a fixed order; each belongs to one split. Can be pickled."""

    name: str
    """For messages."""

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values by name that change when the source does, without reading all of it."""

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int:
        """Bytes of text, about."""

    @abc.abstractmethod
    def units(self, size: int) -> list[Unit]:
        """The source in parts of about `size` bytes; the order of documents is that of units."""

    @abc.abstractmethod
    def items(self, unit: Unit) -> Iterator[Document | Fault]:
        """The records of a unit, always the same ones in the same order."""


class _Record(TypedDict):
    title: str
    work: str
    split: Split
    text: str


class EmbeddedSource(Source):
    """Public-domain prose; whole works are held out (see corpus/README.md)."""

    name = "embedded prose"

    @property
    def identity(self) -> dict[str, Any]:
        # Of the packed file, because this happens at every start.
        return {"sha256": sha256(EMBEDDED)}

    @property
    def num_bytes(self) -> int:
        return sum(len(r["text"].encode()) for r in self._records)

    def units(self, size: int) -> list[Unit]:
        return [Unit(size=self.num_bytes, what=[])]

    def texts(self, split: Split) -> list[str]:
        """The documents of a split."""
        return [r["text"] for r in self._records if r["split"] == split]

    def items(self, unit: Unit) -> Iterator[Document | Fault]:
        for record in self._records:
            text = record["text"]
            yield Document(
                place=record["title"],
                split=record["split"],
                text=text,
                num_bytes=len(text.encode()),
            )

    @functools.cached_property
    def _records(self) -> list[_Record]:
        with lzma.open(EMBEDDED, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    path: pathlib.Path
    name: str  # relative to the folder that was given
    size: int  # bytes when unpacked


class FilesSource(Source):
    """A UTF-8 text file, or all text files below a folder, compressed (.gz, .xz, .zst) or not.

    Hidden files and folders are left out. A file is a document; one of more than
    64 KiB becomes documents of at most 64 KiB, cut at blank lines, else at line
    ends, else at spaces.

    What is held out is our choice: of 20 or more files, whole files, picked by a
    hash of their names; of fewer, the last part of each.

    Args:
      path: the file or folder.
      validation_fraction: share of the bytes to hold out, as closely as possible.
      option: what to call the path in messages.
    """

    def __init__(self, path: str, validation_fraction: float, option: str = "data.path") -> None:
        self.name = path
        self._fraction = validation_fraction
        self._files: list[_File] = []
        empty = []
        found = files_below(path, TEXT_SUFFIXES, option)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # to unpack them
            measured = list(pool.map(streams.measure, found.values()))
        for (name, file), (size, has_text) in zip(found.items(), measured, strict=True):
            if has_text:
                self._files.append(_File(path=file, name=name, size=size))
            else:
                empty.append(name)
        if not self._files:
            raise UserError(f"{option} {path} holds no text: {_listed(empty)} empty")
        if empty:
            print(f"note: in {path}, {_listed(empty)} empty and skipped", file=sys.stderr)
        self._whole = len(self._files) >= WHOLE_FILES_FROM
        self._held_out = _choose(self._files, validation_fraction) if self._whole else set()
        needed = math.ceil(MIN_SPLIT_BYTES / min(validation_fraction, 1 - validation_fraction))
        if self.num_bytes < needed:
            raise UserError(
                f"{option} {path} has {self.num_bytes:,} bytes of text; with "
                f"validation_fraction={validation_fraction} at least {needed:,} are needed"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {f.name: [f.path.stat().st_size, f.path.stat().st_mtime_ns] for f in self._files}

    @property
    def num_bytes(self) -> int:
        return sum(f.size for f in self._files)

    def content_identity(self) -> dict[str, Any]:
        """Like `identity`, of what the files say: reads all of them."""
        found = hashes({file.name: file.path for file in self._files})
        return found | {"validation_fraction": self._fraction}

    def units(self, size: int) -> list[Unit]:
        """Ranges of large files and groups of small ones, as [file, start, end]."""
        units, pieces, filled = list[Unit](), list[Any](), 0

        def close() -> None:
            nonlocal pieces, filled
            if pieces:
                units.append(Unit(size=filled, what=pieces))
            pieces, filled = [], 0

        for number, file in enumerate(self._files):
            start = 0
            if not streams.is_packed(file.path):
                for window in self._cuts(file):
                    if filled + window[1] - start >= size and window[1] < file.size:
                        end = streams.cut_in(file.path, window)
                        pieces.append([number, start, end])
                        filled, start = filled + end - start, end
                        close()
            pieces.append([number, start, file.size])
            filled += file.size - start
            if filled >= size:
                close()
        close()
        return units

    def items(self, unit: Unit) -> Iterator[Document | Fault]:
        for number, start, end in unit.what:
            file = self._files[number]
            tail = self._tail(file)
            for offset, section in streams.sections(file.path, start, end, self._cuts(file)):
                held_out = file.name in self._held_out or (tail is not None and offset > tail[0])
                for piece in streams.cut(section):
                    if piece:
                        yield self._item(file, offset, piece, "validation" if held_out else "train")
                    offset += len(piece)

    def _cuts(self, file: _File) -> list[tuple[int, int]]:
        return streams.windows(file.size, self._tail(file))

    def _tail(self, file: _File) -> tuple[int, int] | None:
        """The window in which the part that is held out begins."""
        if self._whole:
            return None
        goal = max(1, int(file.size * (1 - self._fraction)))
        return max(0, goal - (file.size - goal) // 2, goal - _TAIL_WINDOW), goal

    def _item(self, file: _File, offset: int, piece: bytes, split: Split) -> Document | Fault:
        if fault := fault_in(piece):
            reason, detail, start = fault
            at = (file.path, offset + start)
            return Fault(source=str(file.path), reason=reason, detail=detail, at=at)
        place = f"{file.path}, offset {offset}" if offset else str(file.path)
        return Document(place=place, split=split, text=piece.decode(), num_bytes=len(piece))


def hashes(files: Mapping[str, pathlib.Path]) -> dict[str, Any]:
    """SHA-256 of each file by name."""
    return {name: sha256(path) for name, path in files.items()}


def files_below(path: str, suffixes: tuple[str, ...], option: str) -> dict[str, pathlib.Path]:
    """A file, or those below a folder whose kind is one of `suffixes`, by name in order.

    Args:
      path: the file or folder; or a pattern of files, whose ** is any folders.
      suffixes: without those of compression.
      option: what to call the path in messages.

    Raises:
      UserError: nothing there, or nothing of that kind.
    """
    kinds = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if suffixes[1:] else suffixes[0]
    root = storage.path(path).expanduser()
    above, candidates, verb = root, root.rglob("*"), "has"
    if root.is_file():
        if streams.kind(root) not in suffixes:
            raise UserError(f"{option} {path} is not a text file ({kinds})")
        return {root.name: root}
    if not root.exists():
        if not glob.has_magic(str(root)):
            raise UserError(f"{option} {path} does not exist")
        above = next(p for p in root.parents if not glob.has_magic(str(p)))
        candidates, verb = above.glob(root.relative_to(above).as_posix()), "matches"
    found = {
        p.relative_to(above).as_posix(): p
        for p in candidates
        if streams.kind(p) in suffixes
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(above).parts)
    }
    if not found:
        raise UserError(f"{option} {path} {verb} no text files ({kinds})")
    return dict(sorted(found.items()))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _choose(files: list[_File], fraction: float) -> set[str]:
    """Names of the files to hold out: a draw that only depends on names and sizes."""
    target = fraction * sum(f.size for f in files)
    drawn = sorted(files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
    chosen, total = set[str](), 0
    for file in drawn[:-1]:  # the last one drawn always stays in train
        if abs(total + file.size - target) < abs(total - target):
            chosen.add(file.name)
            total += file.size
    return chosen or {min(files, key=lambda f: (abs(f.size - target), f.name)).name}
