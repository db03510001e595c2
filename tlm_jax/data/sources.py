"""Documents: the prose that the package carries, or a user's own text files."""

import abc
import dataclasses
import functools
import hashlib
import json
import lzma
import math
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Literal, TypedDict

from tlm_jax.config import DataConfig, UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
EMBEDDED = pathlib.Path(__file__).parent / "corpus" / "documents.jsonl.xz"
SUFFIXES = (".txt", ".md")
PIECE_BYTES = 64 * 1024
WHOLE_FILES_FROM = 20
MIN_SPLIT_BYTES = 256

# Where a text may be cut, best first.
_BREAKS = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb"[ \t]"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text that is read from its beginning."""

    title: str
    text: str


class Source(abc.ABC):
    """Where documents come from; each belongs to one split."""

    name: str
    """For messages."""
    fingerprint: str
    """16 hex digits that change with the text and with its division into splits."""

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""

    @abc.abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of a split, always in the same order."""


def open_source(config: DataConfig) -> Source:
    """The source that `config.path` names; None is the package's own prose.

    Raises:
      UserError: nothing there, no text in it, or too little to hold some out.
    """
    if config.path is None:
        return EmbeddedSource()
    return FilesSource(config.path, config.validation_fraction)


class _Record(TypedDict):
    title: str
    work: str
    split: Split
    text: str


class EmbeddedSource(Source):
    """Public-domain prose; whole works are held out (see corpus/README.md)."""

    name = "embedded prose"

    def __init__(self) -> None:
        # Of the packed file, because this happens at every start.
        self.fingerprint = hashlib.sha256(EMBEDDED.read_bytes()).hexdigest()[:16]

    @functools.cached_property
    def _records(self) -> list[_Record]:
        with lzma.open(EMBEDDED, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    @property
    def num_bytes(self) -> int:
        return sum(len(r["text"].encode()) for r in self._records)

    def documents(self, split: Split) -> Iterator[Document]:
        for record in self._records:
            if record["split"] == split:
                yield Document(title=record["title"], text=record["text"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    path: pathlib.Path
    name: str  # relative to the folder that was given
    size: int  # bytes


class FilesSource(Source):
    """A UTF-8 text file, or all *.txt and *.md files below a folder.

    Hidden files and folders are left out. A file is a document; one of more than
    64 KiB becomes documents of at most 64 KiB, cut at blank lines, else at line
    ends, else at spaces. Each file must fit in memory.

    What is held out is our choice: of 20 or more files, whole files, picked by a
    hash of their names; of fewer, the last part of each.

    Args:
      path: the file or folder.
      validation_fraction: share of the bytes to hold out, as nearly as can be.
    """

    def __init__(self, path: str, validation_fraction: float) -> None:
        self.name = path
        self._fraction = validation_fraction
        root = pathlib.Path(path).expanduser()
        digest = hashlib.sha256(repr(validation_fraction).encode())
        self._files: list[_File] = []
        empty = []
        for file in _text_files(root, path):
            name = file.name if file == root else file.relative_to(root).as_posix()
            content = _read(file)
            if content.strip():
                self._files.append(_File(path=file, name=name, size=len(content)))
                digest.update(f"{name}\n{hashlib.sha256(content).hexdigest()}\n".encode())
            else:
                empty.append(name)
        if not self._files:
            raise UserError(f"data.path {path} holds no text: {_listed(empty)} empty")
        if empty:
            print(f"note: in {path}, {_listed(empty)} empty and skipped", file=sys.stderr)
        self.fingerprint = digest.hexdigest()[:16]
        self._whole = len(self._files) >= WHOLE_FILES_FROM
        needed = math.ceil(MIN_SPLIT_BYTES / min(validation_fraction, 1 - validation_fraction))
        if self.num_bytes < needed:
            raise UserError(
                f"data.path {path} has {self.num_bytes:,} bytes of text; with "
                f"validation_fraction={validation_fraction} at least {needed:,} are needed"
            )

    @property
    def num_bytes(self) -> int:
        return sum(f.size for f in self._files)

    @functools.cached_property
    def _held_out(self) -> set[str]:
        return _choose(self._files, self._fraction)

    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of a split, files in order of name.

        Raises:
          UserError: a file is not UTF-8.
        """
        for file in self._files:
            if self._whole and (file.name in self._held_out) != (split == "validation"):
                continue
            content = _checked(_read(file.path), file.path)
            if not self._whole:
                head, tail = _hold_out_tail(content, self._fraction)
                content = head if split == "train" else tail
            pieces = [p.decode("utf-8") for p in cut(content) if p]
            for number, text in enumerate(pieces, 1):
                title = file.name if len(pieces) == 1 else f"{file.name} ({number}/{len(pieces)})"
                yield Document(title=title, text=text)


def _text_files(root: pathlib.Path, name: str) -> list[pathlib.Path]:
    if not root.exists():
        raise UserError(f"data.path {name} does not exist")
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise UserError(f"data.path {name} is not a text file ({' or '.join(SUFFIXES)})")
        return [root]
    found = [
        p
        for p in root.rglob("*")
        if p.suffix.lower() in SUFFIXES
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts)
    ]
    if not found:
        raise UserError(f"data.path {name} has no text files ({' or '.join(SUFFIXES)})")
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _checked(content: bytes, path: pathlib.Path) -> bytes:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}, "
            f"line {line}"
        ) from error
    return content


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


def _break_before(content: bytes, low: int, high: int) -> int:
    """The best offset in (low, high] to cut UTF-8 `content` at."""
    for pattern in _BREAKS:
        ends = [m.end() for m in pattern.finditer(content, low, high)]
        if ends and ends[-1] < len(content):
            return ends[-1]
    while high > low + 1 and content[high] & 0xC0 == 0x80:  # inside a character
        high -= 1
    return high


def _hold_out_tail(content: bytes, fraction: float) -> tuple[bytes, bytes]:
    goal = max(1, int(len(content) * (1 - fraction)))
    low = max(0, goal - (len(content) - goal) // 2)
    at = _break_before(content, low, goal)
    return content[:at], content[at:]


def cut(content: bytes, limit: int = PIECE_BYTES) -> list[bytes]:
    """Cuts UTF-8 text into pieces of at most `limit` bytes that join up to it again."""
    pieces, start = [], 0
    while len(content) - start > limit:
        # Not before the middle, so that pieces are not tiny.
        end = _break_before(content, start + limit // 2, start + limit)
        pieces.append(content[start:end])
        start = end
    return [*pieces, content[start:]]
