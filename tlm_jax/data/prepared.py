"""Tokenises a source once, and finds it again at the next start."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.console
import rich.progress

from tlm_jax.config import UserError
from tlm_jax.data.sources import SPLITS, Source, Split
from tlm_jax.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
TFDS_NAME = "tokenised_text"
TFDS_VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """What a split holds."""

    num_documents: int
    num_tokens: int
    """Without separators."""
    num_bytes: int
    """UTF-8 bytes of the text."""

    @property
    def num_targets(self) -> int:
        """Tokens to predict in one pass: those of the text and an end-of-text a document."""
        return self.num_tokens + self.num_documents

    @property
    def bytes_per_target(self) -> float:
        """Divide a loss in nats by this and by ln 2 to get bits per byte."""
        return self.num_bytes / self.num_targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tokenised source on disk."""

    folder: pathlib.Path
    fingerprint: str
    """16 hex digits that change with text, splits, tokenizer and format."""
    statistics: dict[Split, SplitStatistics]
    """By split."""


def cache_root(cache_dir: str | None) -> pathlib.Path:
    """`cache_dir`, or $XDG_CACHE_HOME/tlm_jax, or ~/.cache/tlm_jax."""
    if cache_dir is not None:
        return pathlib.Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "tlm_jax"


def prepare(source: Source, tokenizer: Tokenizer, cache_dir: str | None) -> Prepared:
    """Finds the tokenised form of `source`, or makes it.

    A process that is killed leaves nothing that could be taken for the whole, and
    of several that start at once one works while the others wait.

    Raises:
      UserError: the cache folder cannot be written, or the source has a fault.
    """
    fingerprint = fingerprint_of(source, tokenizer)
    root = cache_root(cache_dir)
    folder = root / fingerprint
    if not _is_complete(folder):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _lock(root / f"{fingerprint}.lock") as locked:
                if not _is_complete(folder):
                    if locked:
                        _sweep(folder)
                    _make(source, tokenizer, folder)
        except OSError as error:
            raise _unwritable(root, error.strerror or str(error)) from error
    metadata = json.loads(_metadata_file(folder).read_text())
    statistics = {split: SplitStatistics(**metadata[split]) for split in SPLITS}
    return Prepared(folder=folder, fingerprint=fingerprint, statistics=statistics)


def fingerprint_of(source: Source, tokenizer: Tokenizer) -> str:
    """16 hex digits that change with text, splits, tokenizer and format."""
    key = f"{FORMAT_VERSION}\n{source.fingerprint}\n{tokenizer.fingerprint}"
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _metadata_file(folder: pathlib.Path) -> pathlib.Path:
    return folder / TFDS_NAME / TFDS_VERSION / "metadata.json"


def _is_complete(folder: pathlib.Path) -> bool:
    return _metadata_file(folder).is_file()


def _unwritable(root: pathlib.Path, reason: str) -> UserError:
    return UserError(
        f"prepared text cannot be written to {root}: {reason}; "
        "choose another folder with --data.cache_dir"
    )


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[bool]:
    """Locks out other processes until this one leaves or dies; yields whether it could."""
    with path.open("a") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _console().print("waiting for another process that prepares the same text")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False  # no locks on this file system: work is done twice, not wrongly
        yield locked


def _console() -> rich.console.Console:
    return rich.console.Console(stderr=True, highlight=False, soft_wrap=True)


def _sweep(folder: pathlib.Path) -> None:
    """Removes what a killed process left, and a folder that someone deleted part of."""
    for stale in (folder, *folder.parent.glob(f"{folder.name}.incomplete-*")):
        shutil.rmtree(stale, ignore_errors=True)


def _make(source: Source, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    from tlm_jax.data import builder

    work = folder.with_name(f"{folder.name}.incomplete-{secrets.token_hex(4)}")
    work.mkdir()
    metadata: dict[str, Any] = {
        "source": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "format_version": FORMAT_VERSION,
    }
    try:
        with _progress(source) as advance:
            builder.build(work, source, tokenizer, metadata, advance)
        try:
            work.rename(folder)
        except OSError:
            if not _is_complete(folder):  # without locks, another process may be first
                raise
    except RuntimeError as error:  # ArrayRecord's writer has errors of its own
        if failure := re.search(r"write\(\) failed: ([^;]+)", str(error)):
            raise _unwritable(folder.parent, failure[1]) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _progress(source: Source) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line before and one after elsewhere; both on stderr."""
    console, start, total = _console(), time.monotonic(), source.num_bytes
    what = f"preparing {source.name}"
    if console.is_terminal:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda size: bar.advance(task, size)
    else:
        console.print(f"{what}: {total / 1e6:.1f} MB of text, once")
        yield lambda size: None
        console.print(f"prepared in {time.monotonic() - start:.1f} s")
