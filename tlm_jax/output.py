"""What the verbs print: consoles, and standard streams that no reader, disk or encoding breaks."""

import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any, TextIO

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

_WORD = 12
"""Characters of the longest word that a header keeps whole; a path may have more."""
_NARROW = 80
"""Characters of the narrowest terminal that tables are made for."""


class _Console(Console):
    def print(self, *objects: Any, soft_wrap: bool | None = None, **how: Any) -> None:
        """Leaves lines of text whole, so that paths in them can be copied; tables fit the width."""
        if soft_wrap is None:
            soft_wrap = all(isinstance(one, str) for one in objects)
        super().print(*objects, soft_wrap=soft_wrap, **how)

    def on_broken_pipe(self) -> None:
        """Leaves the decision to the caller (rich's own ends the process)."""
        raise


def console(
    *,
    stderr: bool = False,
    file: IO[str] | None = None,
    quiet: bool = False,
) -> Console:
    """The console that every verb prints with.

    Text is printed as it is: paths, names and errors may hold brackets and colons, so neither
    markup nor emoji codes are read, in table cells neither. Colour is given with `style`, or by
    a `rich.text.Text`.

    Args:
      stderr: print to standard error.
      file: print to this one instead.
      quiet: print nothing.
    """
    return _Console(
        stderr=stderr,
        file=file,
        quiet=quiet,
        markup=False,
        highlight=False,
        emoji=False,
    )


def table(*header: str, title: str | None = None, texts: int = 1) -> Table:
    """A table of which no word of the header is cut off on a narrow terminal; long ones are folded.

    Args:
      header: of the columns.
      title: above it.
      texts: first columns that hold text; the others hold numbers.
    """
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    words = [min(_WORD, max(map(len, name.split()), default=0)) for name in header]
    fits = sum(words) + 3 * len(words) <= _NARROW  # else rich would leave out the last columns
    for index, (name, word) in enumerate(zip(header, words, strict=True)):
        justify: JustifyMethod = "left" if index < texts else "right"
        least = word if fits else None
        result.add_column(name, justify=justify, min_width=least, overflow="fold")
    return result


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def protect(*, vital: bool) -> None:
    """Makes writing to this process's standard output and error unable to fail.

    What cannot be written (nobody reads, the disk is full) is left out, and later text is tried
    again; what the encoding lacks is written as an escape such as \\xe9.

    Args:
      vital: standard output is the result and not a log: its first failure is raised, as an
        OSError of the file "standard output".
    """
    for number in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _protected(sys.stdout, 1, vital=vital)
    sys.stderr = _protected(sys.stderr, 2, vital=False)


def _protected(stream: TextIO | None, number: int, *, vital: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, vital=vital)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


class _Descriptor(io.FileIO):
    """A file descriptor that takes everything, whatever becomes of it."""

    def __init__(self, number: int, *, vital: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._vital = vital

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if self._vital:
                self._vital = False  # once: Python flushes again at its end
                error.filename = "standard output"
                raise
            written = None
        # None, too, if it does not block and is full.
        return len(data) if written is None else written
