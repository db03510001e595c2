"""Files that survive kills and show damage: JSON with a checksum, replacement in one step, locks.

Standard library only; every other module may use it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator
from typing import Any

from tlm_jax.validation import UserError

CHECKSUM = "checksum"
_PART = ".part"


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
      UserError: a value is not the one that was sealed.
    """
    if CHECKSUM in record and record[CHECKSUM] != _digest(record):
        raise UserError(
            f"{what} is damaged: its values do not match its checksum (if the change is "
            f'intended, remove the "{CHECKSUM}" entry)'
        )
    return _unsealed(record)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, checked against its checksum if it has one.

    Raises:
      UserError: the file cannot be read, is not valid UTF-8 or JSON, holds no object, or
        its checksum does not match.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise UserError(f"{path} is damaged: it is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return verified(value, str(path))


def write_json(path: pathlib.Path, record: dict[str, Any], *, indent: int | None = 1) -> None:
    """Replaces a file by the sealed record, in one step (see `write_text`)."""
    write_text(path, json.dumps(sealed(record), indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def named(path: pathlib.Path | str) -> Iterator[None]:
    """Names `path` in what the system refuses without naming a file, such as to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one step: a reader finds the old text or the new one, never a part.

    Raises:
      OSError: it cannot be written; the old file is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with named(path), part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes `path` when the block ends without an error.

    A kill leaves only a hidden folder beside `path`, which the next call removes. The caller
    has made sure that nothing is at `path`.
    """
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
def locked(path: pathlib.Path, in_use: str) -> Iterator[None]:
    """Holds an exclusive lock on the file at `path`, which is made and stays.

    The kernel frees it when the process ends, however it ends. File systems without locks
    are trusted.

    Args:
      path: the lock file.
      in_use: the error if another process holds the lock; `{who}` becomes its name.

    Raises:
      UserError: another process holds the lock.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise UserError(in_use.replace("{who}", who)) from None
        except OSError:
            pass
        with contextlib.suppress(OSError):  # the name is a courtesy; the disk may be full
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _unsealed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != CHECKSUM}


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(_unsealed(record), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
