"""Files that survive kills and show damage: JSON with a checksum, replacement in one step, locks.

Paths may be local or in a bucket (`storage.path`). Nearly every other module uses this one.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tlm_jax import bucket_files, storage
from tlm_jax.validation import UserError

CHECKSUM = "checksum"
MARK = "written by tlm-jax"
"""Stands near the beginning of pictures and pages; see `refuse_foreign`."""
_PART = ".part"
_LAST = (storage.COMMIT, "config.json")
"""Files without which a checkpoint, a run folder or a model's folder is none."""
_UNFINISHED = ".unfinished"
_SHOWN = 8
_HEAD = 4096
_SEALED = re.compile(rb'"checksum": "[0-9a-f]{16}"\s*\}\s*$')


class DamagedFileError(UserError):
    """A file whose content is not what was written."""


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a checksum over all its other values, as its last entry.

    The values must be JSON values: what `verified` reads back must be what was sealed.
    """
    return {**_unsealed(record), CHECKSUM: _digest(record)}


def verified(record: dict[str, Any], what: str) -> dict[str, Any]:
    """The record without its checksum; a record that never had one passes.

    Args:
      record: as parsed from JSON.
      what: how to name it in the error, such as the path of its file.

    Raises:
      DamagedFileError: a value is not the one that was sealed.
    """
    if CHECKSUM in record and record[CHECKSUM] != _digest(record):
        raise DamagedFileError(
            f"{what} is damaged: its values do not match its checksum (if the change is "
            f'intended, remove the "{CHECKSUM}" entry)'
        )
    return _unsealed(record)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, checked against its checksum if it has one.

    Raises:
      UserError: the file cannot be read.
      DamagedFileError: it is not valid UTF-8 or JSON, holds no object, or its checksum does
        not match.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise DamagedFileError(f"{path} is damaged: it is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged: it holds no JSON object")
    return verified(value, str(path))


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that others append to, each checked like `read_json`.

    A line that is damaged (not UTF-8, not JSON, another checksum than its values have) is left
    out, and the first reading of this process says so in one line on standard error. A line that
    was cut off, as a killed process leaves it, is left out without a word.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        lines = bucket_files.read_log(path).split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
            records.append(verified(record, f"{path}, line {number}"))
        except (ValueError, RecursionError, UserError):
            if _whole(line):
                damaged.append(number)
    if damaged:
        numbers = ", ".join(map(str, damaged[:_SHOWN]))
        more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        what = f"line {numbers} is" if len(damaged) == 1 else f"lines {numbers}{more} are"
        _note(f"note: {path}, {what} damaged and left out")
    return records


def _whole(line: bytes) -> bool:
    """Whether a line was written to its end: it has that of a record, or a whole checksum."""
    return line.rstrip().endswith(b"}") or re.search(rb'"[0-9a-f]{16}"', line) is not None


@functools.cache
def _note(text: str) -> None:
    """Says something once."""
    print(text, file=sys.stderr)


def write_json(path: pathlib.Path, record: dict[str, Any], *, indent: int | None = 1) -> None:
    """Replaces a file by the sealed record, in one step (see `write_text`)."""
    write_text(path, json.dumps(sealed(record), indent=indent, ensure_ascii=False) + "\n")


def write_lines(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    """Replaces a file by sealed records, one per line, in one step; `read_lines` reads them."""
    write_text(path, "".join(json.dumps(sealed(record)) + "\n" for record in records))


def growing(path: pathlib.Path, warn: Callable[[Exception], None]) -> bucket_files.Sink:
    """Opens a file of lines that others may read meanwhile, to append to it.

    Args:
      path: local: every line is there when `write` returns, which raises what goes wrong. In a
        bucket: see `bucket_files.Log`; read it with `bucket_files.read_log`.
      warn: told what goes wrong in a bucket.
    """
    return bucket_files.Log(path, warn) if storage.in_bucket(path) else _Appended(path)


class _Appended:
    """Opened for each write, so that it can be moved and a full disk can recover."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def write(self, data: bytes) -> None:
        with self._path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a killed run left half a line
                    file.write(b"\n")
            file.write(data)

    def flush(self, seconds: float = 0.0) -> bool:
        return True

    def close(self) -> None:
        pass


@contextlib.contextmanager
def named(path: pathlib.Path | str) -> Iterator[None]:
    """Adds `path` to errors of the system that name no file, such as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one step: a reader finds the old text or the new one, never a part.

    The text is on the disk when this returns.

    Raises:
      OSError: it cannot be written; the old file is untouched.
    """
    if storage.in_bucket(path):
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with named(path), part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256(path: pathlib.Path) -> str:
    """Hex digits of a file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_foreign(path: pathlib.Path, mark: str = MARK) -> None:
    """Raises an error unless a file may be written at `path` without losing somebody's work.

    That is where there is none, an empty one, or one of ours: with `mark` near its beginning or
    a checksum at its end. What is not a regular file is left to the writer.

    Raises:
      FileExistsError: the file was not written by tlm.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(0, path.stat().st_size - _HEAD))
        tail = file.read()
    if mark.encode() not in head and not _SEALED.search(tail):
        reason = "it was not written by tlm and is not replaced; move it or choose another name"
        raise FileExistsError(errno.EEXIST, reason, str(path))


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes `path` when the block ends without an error.

    A kill leaves only a hidden folder beside `path`, which the next call removes. For a bucket it
    is filled on this machine and then copied, `_LAST` after all others; a file in it says that
    this is not finished, and then the next call removes it.

    Raises:
      UserError: something other than an empty folder is at `path`, or it cannot be replaced.
    """
    if storage.in_bucket(path) and (path / _UNFINISHED).exists():
        storage.remove_tree(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; choose another --out")
    if storage.in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="tlm-") as name:
            yield pathlib.Path(name)
            (path / _UNFINISHED).write_text(f"{MARK}; a copy is under way, or was interrupted\n")
            storage.upload(pathlib.Path(name), path, last=_LAST)
            (path / _UNFINISHED).unlink()
        return
    path = path.resolve()
    if path.is_mount():
        raise UserError(f"{path} is a mount point; choose a folder in it")
    part = path.with_name(f".{path.name}{_PART}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def locked(
    path: pathlib.Path, in_use: str, *, waits: Callable[[str], None] | None = None
) -> Iterator[bool]:
    """Holds an exclusive lock on the file at `path`, which is made and stays; yields if it could.

    The kernel frees it when the process ends, however it ends. File systems without locks
    are trusted. In a bucket it is a lease (`bucket_files.lease`).

    Args:
      path: the lock file.
      in_use: the error if another process holds the lock; `{who}` becomes its name.
      waits: to wait for another process, however long; it is told the text of the error. None
        raises it.

    Raises:
      UserError: another process holds the lock and `waits` is None.
    """
    tell = None if waits is None else lambda who: waits(in_use.replace("{who}", who))
    if storage.in_bucket(path):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(bucket_files.lease(path, waits=tell))
            except bucket_files.Held as held:
                raise UserError(in_use.replace("{who}", str(held))) from None
            yield True
        return
    with path.open("a+", encoding="utf-8") as file:
        is_locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            if tell is None:
                raise UserError(in_use.replace("{who}", who)) from None
            tell(who)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            is_locked = False
        with contextlib.suppress(OSError):  # the name is a courtesy; the disk may be full
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            yield is_locked
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _unsealed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != CHECKSUM}


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(_unsealed(record), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
