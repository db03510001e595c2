"""Shards of a store in a bucket, kept on this machine while they are read.

ArrayRecord's reader wants local files. A process copies those shards that hold documents of its
own readers, when it needs the first of them, and compares each copy with the SHA-256 in the
manifest. The copies take at most half of the disk that would be free without them; the ones that
were not opened for longest go first.
"""

import os
import pathlib
import shutil
import sys
import threading

from tlm_jax import files, storage
from tlm_jax.config import UserError

_TRIES = 2
_copied: set[str] = set()
_noted: set[pathlib.Path] = set()


def local(path: pathlib.Path, sha256: str, size: int, folder: pathlib.Path) -> pathlib.Path:
    """The shard itself, or a copy of one in a bucket.

    Args:
      path: the shard.
      sha256: what the manifest says it has.
      size: its bytes.
      folder: where copies are kept, for all processes and stores.

    Raises:
      UserError: it is not the file that was written, or there is no room.
      OSError: it cannot be read, or written here.
    """
    if not storage.in_bucket(path):
        return path
    copy = folder / f"{sha256}.arrayrecord"
    try:
        os.utime(copy)
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, size)
        _fetch(path, sha256, copy)
        _note_again(sha256, folder)
    return copy


def _fetch(path: pathlib.Path, sha256: str, copy: pathlib.Path) -> None:
    part = copy.with_name(f".{copy.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        for _ in range(_TRIES):
            storage.download(path, part)
            if files.sha256(part) == sha256:
                part.replace(copy)
                return
    finally:
        part.unlink(missing_ok=True)
    raise UserError(f"{path} does not match its checksum in the manifest; prepare the text again")


def room(folder: pathlib.Path, used: int) -> int:
    """Bytes that copies may take, `used` of them now."""
    return (shutil.disk_usage(folder).free + used) // 2


def _make_room(folder: pathlib.Path, size: int) -> None:
    found = []
    for copy in folder.glob("*.arrayrecord"):
        try:
            about = copy.stat()
        except FileNotFoundError:  # another process makes room too
            continue
        found.append((about.st_mtime, about.st_size, copy))
    used = sum(taken for _, taken, _ in found)
    most = room(folder, used)
    if size > most:
        raise UserError(
            f"there is no room for a shard of {size:,} bytes in {folder}; choose another folder "
            "with --data.cache_dir"
        )
    for _, taken, copy in sorted(found):
        if used + size <= most:
            return
        copy.unlink(missing_ok=True)  # a reader that has it open can continue
        used -= taken


def _note_again(sha256: str, folder: pathlib.Path) -> None:
    """Says once that shards are copied which this process had copied before."""
    if sha256 in _copied and folder not in _noted:
        _noted.add(folder)
        print(
            f"note: {folder} is too small for the prepared text, whose shards are copied again "
            "and again; a larger disk for --data.cache_dir is faster",
            file=sys.stderr,
        )
    _copied.add(sha256)
