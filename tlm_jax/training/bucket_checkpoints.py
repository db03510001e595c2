"""Checkpoints in buckets: which are complete, and those on s3://, where Orbax does not save."""

import concurrent.futures
import contextlib
import fcntl
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import IO, Any

import jax

import tlm_jax
from tlm_jax import storage
from tlm_jax.config import UserError

_TEMPORARY = ".orbax-checkpoint-tmp"
_PREFIX = "tlm-checkpoints-"
_LOCK = ".lock"


def complete(folder: pathlib.Path) -> list[int]:
    """Steps of complete checkpoints, oldest first; in a bucket a file written last tells."""
    return sorted(
        int(entry.name)
        for entry in _entries(folder)
        if entry.name.isdigit()
        and (not storage.in_bucket(folder) or (entry / storage.COMMIT).exists())
    )


def unfinished(folder: pathlib.Path) -> list[int]:
    """Steps whose save was interrupted."""
    if storage.in_bucket(folder):
        names = {int(entry.name) for entry in _entries(folder) if entry.name.isdigit()}
        return sorted(names - set(complete(folder)))
    temporary = {e.name.split(".")[0] for e in _entries(folder) if _TEMPORARY in e.name}
    return sorted(int(name) for name in temporary if name.isdigit())


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def on_s3(folder: pathlib.Path) -> bool:
    """Whether a folder lies where Orbax does not save."""
    return storage.in_bucket(folder) and folder.parts[0] == "s3:"


def require_savable(folder: pathlib.Path) -> None:
    """Raises an error unless the processes of this job can save checkpoints in a folder.

    Raises:
      UserError: there are several, and it is on s3://: each would have only its part on its
        machine.
    """
    if on_s3(folder) and jax.process_count() > 1:
        raise UserError(
            f"{folder}: {jax.process_count()} processes cannot save checkpoints on s3://; use "
            "gs:// or a folder that all machines share (data and tokenizers can stay on s3://)"
        )


def mark_complete(step: pathlib.Path) -> None:
    """Makes a complete checkpoint on this machine one that is complete in a bucket, once copied."""
    for folder in (*(entry for entry in step.iterdir() if entry.is_dir()), step):
        (folder / storage.COMMIT).write_text(f"written by tlm-jax {tlm_jax.__version__}\n")


class Staging:
    """A folder on this machine in which Orbax saves and loads what lies on s3://.

    It holds the newest checkpoint, and the one that is being saved or was loaded. The folders of
    processes that were killed are removed.

    Args:
      folder: of the checkpoints, in a bucket.
      keep_last: newest checkpoints kept there; None is all.
      keep_every: also keep those whose step is a multiple of this.
      read_only: leave the remains of interrupted saves alone.

    Raises:
      UserError: see `require_savable`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep_last: int | None,
        keep_every: int | None,
        read_only: bool,
    ) -> None:
        if not read_only:
            require_savable(folder)
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        _remove_abandoned()
        self._place = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = _locked(self._place)
        self._loaded = self._place / "loaded"
        self.local = self._place / "saved"
        """Where Orbax saves."""
        self.local.mkdir()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "upload of checkpoints")
        if not read_only:
            for step in unfinished(folder):
                storage.remove_tree(folder / str(step))

    def readable(self, step: int) -> pathlib.Path:
        """A copy of a checkpoint, for Orbax to load."""
        copy = self._loaded / str(step)
        if not copy.exists():
            storage.download(self._folder / str(step), copy)
        return copy

    def upload(self, step: int, saved: Callable[[], Any]) -> concurrent.futures.Future[None]:
        """Copies a checkpoint to the bucket, from a thread, once `saved` returns."""
        return self._thread.submit(self._upload, step, saved)

    def _upload(self, step: int, saved: Callable[[], Any]) -> None:
        saved()
        here, there = self.local / str(step), self._folder / str(step)
        mark_complete(here)
        self._remove(step)
        storage.upload(here, there, last=[storage.COMMIT])
        steps = complete(self._folder)
        kept = set(steps[-self._keep_last :]) if self._keep_last else set(steps)
        for old in set(steps) - kept:
            if not self._keep_every or old % self._keep_every:
                self._remove(old)

    def _remove(self, step: int) -> None:
        (self._folder / str(step) / storage.COMMIT).unlink(missing_ok=True)
        storage.remove_tree(self._folder / str(step))

    def close(self) -> None:
        """Waits for the thread and removes the folder."""
        self._thread.shutdown()
        shutil.rmtree(self._place, ignore_errors=True)
        self._lock.close()


def _locked(place: pathlib.Path) -> IO[bytes]:
    """A lock in a new folder, which the kernel frees when this process ends, however it ends."""
    made = place / f"{_LOCK}.new"
    lock = made.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    made.rename(place / _LOCK)  # nobody finds it before it is locked
    return lock


def _remove_abandoned() -> None:
    """Removes the folders of processes on this machine that were killed."""
    for lock in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
