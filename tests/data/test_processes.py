"""Worker processes where the machine lacks what they need."""

import errno
import multiprocessing.synchronize
import os
import pathlib

import pytest

from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import open_dataset, prepare, records


@pytest.fixture(autouse=True)
def _no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What opening a semaphore does where /dev/shm is missing."""

    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(vars(multiprocessing.synchronize)["_multiprocessing"], "SemLock", fail)


def test_readers_need_shared_memory(equal_files: pathlib.Path, cache_dir: str) -> None:
    """The error says what works instead."""
    config = DataConfig(
        path=str(equal_files),
        tokenizer="bytes",
        cache_dir=cache_dir,
        seq_len=16,
        batch_size=1,
        validation_fraction=0.2,
        num_workers=2,
    )
    data = open_dataset(config, 257)
    with pytest.raises(UserError, match=r"is /dev/shm mounted\?\); use --data.num_workers 0"):
        data.train_iterator()


def test_preparing_by_several_needs_shared_memory(
    equal_files: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One process alone prepares without it."""
    out = tmp_path / "out"
    out.mkdir()
    source = records.open_source(str(equal_files), records.Rules(validation_fraction=0.2))
    job = prepare.Job(source=source, tokenizer="bytes", shard_bytes=300)
    with pytest.raises(UserError, match=r"is /dev/shm mounted\?\); use --processes 1"):
        prepare.prepare(job, out, processes=2)
    assert prepare.prepare(job, out, processes=1).shards["train"]
