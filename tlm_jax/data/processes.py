"""What processes share: a console, locks, and how those that this package starts begin and end."""

import contextlib
import fcntl
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator

from rich.console import Console

from tlm_jax import bucket_files, output, storage
from tlm_jax.validation import UserError


def stderr_console() -> Console:
    """Where progress is shown."""
    return output.console(stderr=True, soft_wrap=True)


@contextlib.contextmanager
def lock(path: pathlib.Path, waiting: str | None) -> Iterator[bool]:
    """Locks out other processes until this one leaves or dies; yields whether it could.

    Args:
      path: the file to lock.
      waiting: what to say before waiting for another; None refuses instead.

    Raises:
      BlockingIOError: another one has it and `waiting` is None.
    """
    if storage.in_bucket(path):
        say = None if waiting is None else lambda _: stderr_console().print(waiting)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(bucket_files.lease(path, waits=say))
            except bucket_files.Held as held:
                raise BlockingIOError(str(held)) from None
            yield True
        return
    with path.open("a") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            stderr_console().print(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False  # no locks on this file system: work is done twice, not wrongly
        yield locked


def require_semaphores(instead: str) -> None:
    """Makes sure that processes can share a lock, which they cannot without /dev/shm.

    Args:
      instead: what works without, for the error.

    Raises:
      UserError: they cannot.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"worker processes need semaphores in shared memory, which this machine does not "
            f"provide ({reason}; is /dev/shm mounted?); {instead}"
        ) from error


def end_with_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this process with it even if that is killed."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
