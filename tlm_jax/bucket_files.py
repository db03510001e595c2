"""What buckets do not have: files that grow, and locks.

A file that grows (`Log`) becomes numbered objects, `metrics.jsonl` for example
`metrics.000001.jsonl`, `metrics.000002.jsonl` ... Each process starts one of its own, replaces it
every few seconds, and starts the next when it is large. Together they are the file
(`read_log`). A kill loses the last seconds; `Log.flush` before a checkpoint ensures that these
are steps that will be repeated.

A lock (`lease`) becomes an object with a heartbeat. It is made, renewed and taken over only under
a precondition on its generation, so that of several processes one succeeds. Whoever finds it
watches it: if it does not change for `LEASE` seconds by its own clock, the holder is gone.
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tlm_jax import storage
from tlm_jax.storage import BucketPath, tried

LEASE = 40.0
"""Seconds after which a lease that was not renewed is free."""
HEARTBEAT = 10.0
_POLL = 1.0
_SECONDS = 5.0  # between uploads of a part
_PART_BYTES = 2**20
_BOUND_BYTES = 2**25  # of what waits while the bucket cannot be written


class Sink(Protocol):
    """What a growing file is written to."""

    def write(self, data: bytes) -> None: ...
    def flush(self, seconds: float = 0.0) -> bool: ...
    def close(self) -> None: ...


def parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The objects that a growing file in a bucket consists of, in order."""
    found = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return sorted(p for p in found if _number(path, p) is not None)


def _number(path: pathlib.Path, part: pathlib.Path) -> int | None:
    middle = part.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
    return int(middle) if middle.isdigit() else None


def read_log(path: pathlib.Path) -> bytes:
    """The content of a file that `Log` writes.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    if not storage.in_bucket(path):
        return path.read_bytes()
    pieces = [p.read_bytes() for p in parts(path)]
    if not pieces or path.is_file():  # a file that was copied there, perhaps continued
        pieces.insert(0, path.read_bytes())
    return b"".join(pieces)


def remove_log(path: pathlib.Path) -> None:
    """Removes a file that `Log` writes, if it is there."""
    if storage.in_bucket(path):
        for part in parts(path):
            part.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class Log:
    """Appends to a file in a bucket, from a thread: the writer never waits for the network.

    What cannot be uploaded is kept and tried again. Beyond a bound the oldest of it is dropped.

    Args:
      path: the file.
      warn: told the first error.
    """

    def __init__(self, path: pathlib.Path, warn: Callable[[Exception], None]) -> None:
        self._path, self._warn = path, warn
        self._lock = threading.Condition()
        self._part: pathlib.Path | None = None
        self._stored = b""  # what the current part holds
        self._pending: list[bytes] = []
        self._asked = self._closed = self._warned = self._refused = False
        self.dropped = 0
        """Bytes that were lost because the bucket could not be written for too long."""
        self._thread = threading.Thread(target=self._run, name=f"log {path.name}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Adds whole lines, or records."""
        with self._lock:
            self._pending.append(bytes(data))
            while sum(map(len, self._pending)) > _BOUND_BYTES:
                self.dropped += len(self._pending.pop(0))

    def flush(self, seconds: float = 0.0) -> bool:
        """Has what was written uploaded now; waits for at most this many seconds.

        Returns:
          Whether all is uploaded.
        """
        with self._lock:
            self._asked = True
            self._lock.notify_all()
            return self._lock.wait_for(lambda: not self._pending or self._closed, seconds)

    def close(self, seconds: float = 30.0) -> None:
        """Uploads what is left, waiting for at most this many seconds, and not if it is refused."""
        with self._lock:
            self._asked, self._refused = True, False
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._pending or self._refused, seconds)
            self._closed = True
            left = self.dropped + sum(map(len, self._pending))
            self._lock.notify_all()
        if left:
            self._warn(OSError(errno.EIO, f"{left:,} bytes of it are lost", str(self._path)))

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                self._lock.wait_for(lambda: self._asked or self._closed, _SECONDS)
                self._asked = False
                taken = list(self._pending)
            if taken:
                self._upload(taken)

    def _upload(self, taken: list[bytes]) -> None:
        try:
            if self._part is None:
                numbers = [_number(self._path, p) or 0 for p in parts(self._path)]
                self._part = self._named(max(numbers, default=0) + 1)
            content = self._stored + b"".join(taken)
            self._part.write_bytes(content)
        except Exception as error:
            if not self._warned:
                self._warned = True
                self._warn(error)
            with self._lock:
                self._refused = isinstance(error, PermissionError)
                self._lock.notify_all()
            time.sleep(_POLL)
            return
        self._stored = content
        if len(content) >= _PART_BYTES:
            self._part, self._stored = self._named((_number(self._path, self._part) or 0) + 1), b""
        with self._lock:
            kept = {id(piece) for piece in taken}
            self._pending = [piece for piece in self._pending if id(piece) not in kept]
            self._lock.notify_all()

    def _named(self, number: int) -> pathlib.Path:
        return self._path.with_name(f"{self._path.stem}.{number:06d}{self._path.suffix}")


_held: set[Any] = set()  # owners in this process


class Held(Exception):
    """Another process holds a lease; its name is the message."""


@functools.cache
def _machine() -> str:
    """Tells whether a process number of another one means anything here."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


@contextlib.contextmanager
def lease(path: pathlib.Path, *, waits: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lease at `path`, an object that is removed at the end.

    A process that finds out that another one has taken it over, as may happen when it could not
    reach the bucket for `LEASE` seconds, ends at once: two may not write one folder.

    Args:
      path: in a bucket.
      waits: to wait for another holder, however long; it is told whose turn it is. None raises.

    Raises:
      Held: another process holds it and `waits` is None.
    """
    assert isinstance(path, BucketPath)
    holder = _Lease(path)
    holder.take(waits)
    try:
        yield
    finally:
        holder.release()


class _Lease:
    def __init__(self, path: BucketPath) -> None:
        self._path = path
        self._about = {
            "owner": secrets.token_hex(8),
            "who": f"process {os.getpid()} on {socket.gethostname()}",
            "process": os.getpid(),
            "machine": _machine(),
        }
        self._generation: str | None = None
        self._ended = threading.Event()

    def take(self, waits: Callable[[str], None] | None) -> None:
        told = False
        while not self._put(None):
            found = self._read()
            if found is None:
                continue
            generation, about = found
            alive = self._is_alive(about, generation)
            if not alive and self._put(generation):
                break
            if not alive:  # another one was faster
                continue
            who = str(about.get("who", "another process"))
            if waits is None:
                raise Held(who)
            if not told:
                waits(who)
                told = True
            time.sleep(_POLL)
        _held.add(self._about["owner"])
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def release(self) -> None:
        self._ended.set()
        _held.discard(self._about["owner"])
        with contextlib.suppress(OSError):
            found = self._read()
            if found is not None and found[1].get("owner") == self._about["owner"]:
                self._path.unlink(missing_ok=True)

    def _is_alive(self, about: dict[str, Any], generation: str) -> bool:
        """Whether the holder is there: known at once on this machine, else by its heartbeat."""
        if about.get("machine") == _machine():
            if about.get("process") == os.getpid():  # unless it could not be removed at the end
                return about.get("owner") in _held
            try:
                os.kill(int(about["process"]), 0)
            except ProcessLookupError:
                return False
            except (OSError, KeyError, ValueError):
                return True
            return True
        print(
            f"note: {self._path} belongs to {about.get('who')}; waiting up to {LEASE:.0f} s for a "
            "sign of life",
            file=sys.stderr,
        )
        give_up = time.monotonic() + LEASE
        while time.monotonic() < give_up:
            time.sleep(_POLL)
            found = self._read()
            if found is None or found[0] != generation:
                return found is not None
        return False

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                if self._put(self._generation):
                    continue
                found = self._read()
            except OSError:
                continue
            if self._ended.is_set():
                return
            who = "nobody" if found is None else found[1].get("who")
            print(
                f"error: {self._path} now belongs to {who}, because this process could not renew "
                "it in time; the same command resumes when it is free",
                file=sys.stderr,
                flush=True,
            )
            os._exit(os.EX_TEMPFAIL)

    def _read(self) -> tuple[str, dict[str, Any]] | None:
        """(generation, content)"""
        path = self._path
        try:
            info = tried(path, lambda: path.fs.info(path.place))
            about = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            about = {}
        generation = str(info.get("generation") or info.get("ETag"))
        return generation, about if isinstance(about, dict) else {}

    def _put(self, generation: str | None) -> bool:
        """Writes it if it still has this generation (None: if it is not there)."""
        body = json.dumps(self._about | {"renewed": time.time()}).encode()
        put = self._put_s3 if self._path.parts[0] == "s3:" else self._put_gs
        try:
            self._generation = tried(self._path, lambda: put(body, generation), writes=True)
        except FileExistsError:
            found = self._read()
            if found is None or found[1].get("owner") != self._about["owner"]:
                return False
            self._generation = found[0]  # it was we: the answer to a first try was lost
        return True

    def _put_gs(self, body: bytes, generation: str | None) -> str:
        fs = self._path.fs
        _, answer = fs.call(
            "POST",
            fs.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
            self._path.bucket,
            uploadType="media",
            name=self._path.key,
            ifGenerationMatch=generation or "0",
            data=body,
        )
        return str(json.loads(answer)["generation"])

    def _put_s3(self, body: bytes, generation: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if generation is None else {"IfMatch": generation}
        try:
            answer = self._path.fs.call_s3(
                "put_object", Bucket=self._path.bucket, Key=self._path.key, Body=body, **condition
            )
        except OSError as error:
            if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                raise FileExistsError(errno.EEXIST, str(error), str(self._path)) from None
            raise
        return str(answer["ETag"])
