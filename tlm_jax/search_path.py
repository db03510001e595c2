"""Where Python looks for modules: a file in the working directory must not pass for a package."""

import sys


def installed_first() -> None:
    """Moves the folder that Python put first on `sys.path` to its end.

    That is the working directory with `python -m`, and else the script's folder. To be called
    once, by a program's own main module, before it imports more than this.
    """
    if not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))
