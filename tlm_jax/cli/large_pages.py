"""Memory in large pages for programs that compute on a CPU.

Fresh arrays cost a page fault for every 4 KiB. Where Linux gives pages of 2 MiB on request
(`madvise`, the default of most distributions), glibc requests them if an environment variable says
so when the process starts. It saves at least a tenth of a train step
(docs/notes/speed-train-step.md).
"""

import os
import pathlib
import sys
from collections.abc import Sequence

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
VERBS = ("train", "train-seeds", "eval", "generate", "align")
"""Those that compute."""
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def wanted(words: Sequence[str]) -> bool:
    """Whether a process with these words (a verb and its options) should restart itself.

    Not when the variable is already set, to any value: an empty one turns this off.
    """
    if (
        VARIABLE in os.environ
        or not words
        or words[0] not in VERBS
        or {"-h", "--help"} & set(words)
    ):
        return False
    try:
        return sys.platform == "linux" and "[madvise]" in SETTING.read_text()
    except OSError:
        return False


def restart() -> None:
    """Restarts this process with the variable set; does not return."""
    os.environ[VARIABLE] = VALUE
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
