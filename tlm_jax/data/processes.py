"""What processes that this package starts do first."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this process with it even if that is killed."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
