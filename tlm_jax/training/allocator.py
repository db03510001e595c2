"""Memory that is freed but still this process's."""

import ctypes


def release_freed_memory() -> None:
    """Gives memory that the C library holds in reserve back to the system, if it is glibc.

    A compiler leaves hundreds of MiB of it behind, for which a train step has no use.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    trim(0)
