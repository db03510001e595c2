"""Bytes of files, compressed or not: from an offset, by lines, and cut into documents."""

import contextlib
import gzip
import io
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from tlm_jax import storage
from tlm_jax.config import UserError

PIECE_BYTES = 64 * 1024
BLOCK_BYTES = 4 * 1024 * 1024
"""A text is always cut near multiples of this, so that its blocks can be cut apart from others."""
_BLOCK_WINDOW = 32 * 1024
_READ_BYTES = 1024 * 1024

# Where a text may be cut, best first.
_BREAKS = (re.compile(rb"\n[ \t\r]*\n"), re.compile(rb"\n"), re.compile(rb"[ \t]"))


class _Zstandard(io.RawIOBase):
    """Reads the frames of a .zst file, and notices a missing end, unlike zstandard's own reader."""

    def __init__(self, path: pathlib.Path) -> None:
        import zstandard

        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed = b""
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            self._packed = self._packed or self._file.read(128 * 1024)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._pending = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _remote(path: pathlib.Path) -> Any:
    """A file in a bucket, opened; None for a local one, which libraries open themselves."""
    return path.open("rb") if storage.in_bucket(path) else None


_OPENERS: dict[str, Callable[[pathlib.Path], Any]] = {
    ".gz": lambda path: gzip.GzipFile(fileobj=f) if (f := _remote(path)) else gzip.GzipFile(path),
    ".xz": lambda path: lzma.LZMAFile(_remote(path) or path),  # noqa: SIM115
    ".zst": lambda path: io.BufferedReader(_Zstandard(path), _READ_BYTES),
}


def is_packed(path: pathlib.Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.suffix.lower() in _OPENERS


def kind(path: pathlib.Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    return pathlib.Path(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


@contextlib.contextmanager
def open_bytes(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for reading, decompressed.

    Raises:
      UserError: it cannot be read, or is damaged; also while it is read.
    """
    import zstandard

    try:
        opener = _OPENERS.get(path.suffix.lower())
        with opener(path) if opener else path.open("rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path} cannot be decompressed: {error}".rstrip(".")) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def measure(path: pathlib.Path) -> tuple[int, bool]:
    """Bytes of a file when decompressed, and whether there is anything but white space in it."""
    size, text = 0, False
    with open_bytes(path) as file:
        while chunk := file.read(_READ_BYTES):
            size += len(chunk)
            text = text or not chunk.isspace()
            if text and not is_packed(path):
                return path.stat().st_size, True
    return size, text


def count_lines(path: pathlib.Path, end: int) -> int:
    """Line ends in the first `end` bytes of a file."""
    lines = 0
    with open_bytes(path) as file:
        while chunk := file.read(min(_READ_BYTES, end)):
            lines += chunk.count(b"\n")
            end -= len(chunk)
    return lines


def lines(
    path: pathlib.Path, start: int, end: int | None, limit: int
) -> Iterator[tuple[int, bytes]]:
    """Lines that begin at offsets in [start, end), with their offsets.

    A line of more than `limit` bytes is cut off after limit + 1, to be known by that.
    """
    with open_bytes(path) as file:
        offset = start
        if start:  # the line that reaches over `start` began before it
            file.seek(start - 1)
            offset += _skip_line(file) - 1
        while end is None or offset < end:
            line = file.readline(limit + 1)
            if not line:
                return
            yield offset, line
            offset += len(line)
            if not line.endswith(b"\n"):
                offset += _skip_line(file)


def _skip_line(file: BinaryIO) -> int:
    """Reads on to the end of a line, in constant memory; returns the bytes read."""
    skipped = 0
    while part := file.readline(_READ_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def windows(size: int, tail: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Where a text of `size` bytes is cut before anything else: once in each (low, high].

    Near multiples of BLOCK_BYTES, and in `tail`, with which no other window overlaps.
    """
    blocks = [(high - _BLOCK_WINDOW, high) for high in range(BLOCK_BYTES, size, BLOCK_BYTES)]
    if tail is None:
        return blocks
    return sorted([tail, *((a, b) for a, b in blocks if b <= tail[0] or a >= tail[1])])


def cut_in(path: pathlib.Path, window: tuple[int, int]) -> int:
    """The offset at which an uncompressed text file is cut in a window."""
    low, high = window
    with open_bytes(path) as file:
        file.seek(low)
        return low + break_before(file.read(high + 1 - low), 0, high - low)


def sections(
    path: pathlib.Path, start: int, end: int, cuts: list[tuple[int, int]]
) -> Iterator[tuple[int, bytes]]:
    """The text in [start, end) of a file as (offset, bytes), cut once in each window of `cuts`.

    Args:
      path: the file.
      start: 0, or where `cut_in` says that the file is cut in a window.
      end: its size, or such an offset.
      cuts: all windows of the file, in order.
    """
    with open_bytes(path) as file:
        if start:  # files that are packed cannot seek
            file.seek(start)
        buffer, at = b"", start
        for low, high in cuts:
            if start <= low and high < end:
                buffer += file.read(high + 1 - at - len(buffer))
                length = break_before(buffer, low - at, high - at)
                yield at, buffer[:length]
                buffer, at = buffer[length:], at + length
        buffer += file.read(end - at - len(buffer))
        if buffer:
            yield at, buffer


def break_before(content: bytes, low: int, high: int) -> int:
    """The best offset in (low, high] to cut UTF-8 `content` at."""
    for pattern in _BREAKS:
        ends = [m.end() for m in pattern.finditer(content, low, high)]
        if ends and ends[-1] < len(content):
            return ends[-1]
    while high > low + 1 and content[high] & 0xC0 == 0x80:  # inside a character
        high -= 1
    return high


def cut(content: bytes, limit: int = PIECE_BYTES) -> list[bytes]:
    """Cuts UTF-8 text into pieces of at most `limit` bytes that join up to it again."""
    pieces, start = [], 0
    while len(content) - start > limit:
        # Not before the middle, so that pieces are not tiny.
        end = break_before(content, start + limit // 2, start + limit)
        pieces.append(content[start:end])
        start = end
    return [*pieces, content[start:]]
