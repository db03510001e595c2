"""Finds the store of a source that was prepared before in the cache, or has it prepared."""

import hashlib
import json
import os
import pathlib
import secrets
import shutil
from typing import Any

from tlm_jax import files, output, storage
from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import prepare as prepare_lib
from tlm_jax.data import records, store
from tlm_jax.data.sources import EmbeddedSource, Source
from tlm_jax.data.tokenizers import Tokenizer


def cache_root(cache_dir: str | None) -> pathlib.Path:
    """`cache_dir`, or $XDG_CACHE_HOME/tlm_jax, or ~/.cache/tlm_jax.

    Raises:
      UserError: `cache_dir` is in a bucket.
    """
    if cache_dir is not None:
        folder = storage.path(cache_dir)
        if storage.in_bucket(folder):
            raise UserError(f"data.cache_dir {cache_dir} must be a folder on this machine")
        return folder.expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "tlm_jax"


def prepare_cached(config: DataConfig, tokenizer: Tokenizer) -> pathlib.Path:
    """The store of the text that `config.path` names (None: the package's own prose).

    A killed process leaves nothing that could be mistaken for a complete store. If several
    start at once, one works and the others wait.

    Raises:
      UserError: the cache folder cannot be written, or the source has a fault.
    """
    source: Source
    if config.path is None:
        source = EmbeddedSource()
        content = source.identity
    else:
        rules = records.Rules(validation_fraction=config.validation_fraction)
        source = found = records.open_files(config.path, rules, "data.path")
        content = found.content_identity()
    job = prepare_lib.Job(source=source, tokenizer=config.tokenizer)
    root = cache_root(config.cache_dir)
    folder = root / _key(content, tokenizer)
    if not store.is_complete(folder):
        try:
            root.mkdir(parents=True, exist_ok=True)
            waiting = "waiting for another process that is preparing the same text"
            say = output.console(stderr=True).print
            with files.locked(root / f"{folder.name}.lock", waiting, waits=say) as locked:
                if not store.is_complete(folder):
                    if locked:
                        _sweep(folder)
                    _make(job, folder)
        except OSError as error:
            raise UserError(
                f"prepared text cannot be written to {root}: {error.strerror or error}; "
                "choose another folder with --data.cache_dir"
            ) from error
    return folder


def _key(content: dict[str, Any], tokenizer: Tokenizer) -> str:
    """16 hex digits that change with text, splits, tokenizer and format."""
    key = json.dumps([store.FORMAT_VERSION, content, tokenizer.fingerprint])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _sweep(folder: pathlib.Path) -> None:
    """Removes what a killed process left, and a folder that someone deleted part of."""
    for stale in (folder, *folder.parent.glob(f"{folder.name}.incomplete-*")):
        shutil.rmtree(stale, ignore_errors=True)


def _make(job: prepare_lib.Job, folder: pathlib.Path) -> None:
    work = folder.with_name(f"{folder.name}.incomplete-{secrets.token_hex(4)}")
    work.mkdir()
    try:
        prepare_lib.prepare(job, work)
        try:
            work.rename(folder)
        except OSError:
            if not store.is_complete(folder):  # without locks, another process may be first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
