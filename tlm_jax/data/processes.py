"""Processes that this package starts: what they need, and how they end."""

import multiprocessing
import os
import signal
import threading

from tlm_jax.validation import UserError


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
