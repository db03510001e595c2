"""Batches that several readers make are the same, whichever processes run them."""

import hashlib
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
from test_pipeline import Batch, assert_same, check_rows, documents, open_bytes, take, texts

from tlm_jax.data import Dataset, store
from tlm_jax.data.shares import Share, shares

ROWS = 8
EVEN = {n: [range(ROWS * i // n, ROWS * (i + 1) // n) for i in range(n)] for n in (1, 2, 4, 8)}
"""Rows by process, as on a mesh whose data and fsdp axes split the batch over all of them."""
TWICE = [range(4), range(4), range(4, 8), range(4, 8)]
"""As on one whose sequence or tensor axis spans two processes."""


class Job:
    """The iterators of several processes.

    Args:
      data: what they read.
      rows: the rows that each of them needs.
    """

    def __init__(self, data: Dataset, rows: Sequence[Collection[int]]) -> None:
        self.rows = rows
        self.shares = shares(rows, num_readers=data.config.readers, batch_size=ROWS)
        self.iterators = [data.train_iterator(share) for share in self.shares]

    def take(self, n: int) -> list[Batch]:
        """Batches, each row from one of the processes that need it; they agree on what it is."""
        batches = []
        for parts in zip(*(take(iterator, n) for iterator in self.iterators), strict=True):
            whole: dict[tuple[str, int], np.ndarray] = {}
            for rows, part in zip(self.rows, parts, strict=True):
                for name, array in part.items():
                    for row in rows:
                        known = whole.setdefault((name, row), array[row])
                        np.testing.assert_array_equal(known, array[row])
            batches.append(
                {name: np.stack([whole[name, row] for row in range(ROWS)]) for name in parts[0]}
            )
        return batches

    def save(self) -> dict[str, Any]:
        """The positions in a checkpoint, each written by one process."""
        files: dict[str, Any] = {}
        for iterator, share in zip(self.iterators, self.shares, strict=True):
            state = json.loads(json.dumps(iterator.get_state()))
            for reader in share.saves:
                assert str(reader) not in files
                files[str(reader)] = state[str(reader)]
        return files

    def load(self, files: dict[str, Any]) -> "Job":
        for iterator, share in zip(self.iterators, self.shares, strict=True):
            iterator.set_state({str(reader): files[str(reader)] for reader in share.readers})
        return self

    def close(self) -> None:
        for iterator in self.iterators:
            iterator.close()


def open_shared(path: pathlib.Path, cache_dir: str, **changes: Any) -> Dataset:
    return open_bytes(path, cache_dir, **{"batch_size": ROWS, "readers": 4} | changes)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize(
    "rows", [EVEN[2], EVEN[4], EVEN[8], TWICE, [range(3), range(3, 8)]], ids=str
)
def test_batches_do_not_depend_on_who_reads(
    rows: Sequence[range], packing: str, many_files: pathlib.Path, cache_dir: str
) -> None:
    """Nor on how many read: of 1, 2, 4 and 8 processes, also such that share rows."""
    data = open_shared(many_files, cache_dir, packing=packing)
    expected = take(data.train_iterator(), 12)
    assert all(b[k].shape == (ROWS, 16) and b[k].dtype == np.int32 for b in expected for k in b)
    assert_same(Job(data, rows).take(12), expected)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resume_with_another_number_of_processes(
    packing: str, equal_files: pathlib.Path, cache_dir: str
) -> None:
    """8, then 4, 1, 2 that share rows with another two, and 8 again; rows end with documents."""
    data = open_shared(equal_files, cache_dir, packing=packing)
    expected = take(data.train_iterator(), 25)
    job, got = Job(data, EVEN[8]), []
    for rows in (EVEN[4], EVEN[1], TWICE, EVEN[8]):
        got += job.take(5)
        job = Job(data, rows).load(job.save())
    assert_same(got + job.take(5), expected)


def test_reader_processes_resume_with_another_number_of_processes(
    equal_files: pathlib.Path, cache_dir: str
) -> None:
    """What reader processes say of a reader does not depend on the others that they run."""
    data = open_shared(equal_files, cache_dir, readers=2, num_workers=2)
    alone = Job(data, EVEN[1])
    begin = alone.take(3)
    files, expected = alone.save(), alone.take(4)
    assert_same(alone.load(files).take(4), expected)
    alone.close()
    half = Job(data, EVEN[2]).iterators[1]
    second = [{name: a[4:] for name, a in b.items()} for b in take(half, 3)]
    assert_same(second, [{name: a[4:] for name, a in b.items()} for b in begin])
    assert json.loads(json.dumps(half.get_state())) == {"1": files["1"]}
    half.close()


def test_a_process_reads_its_documents_only(
    many_files: pathlib.Path, cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = store.DocumentReader.__getitem__
    monkeypatch.setattr(
        store.DocumentReader, "__getitem__", lambda self, i: read.append(i) or real(self, i)
    )
    data = open_shared(many_files, cache_dir)
    counts = []
    for rows in (EVEN[1], EVEN[4]):
        read.clear()
        iterator = Job(data, rows).iterators[0]
        take(iterator, 400)
        iterator.close()
        counts.append(len(read))
    assert counts[1] < counts[0] / 3


def test_readers_go_through_the_text_together(many_files: pathlib.Path, cache_dir: str) -> None:
    """Two epochs of documents, dealt to three readers, are each document twice."""
    data = open_shared(many_files, cache_dir, readers=3, batch_size=3)
    batches = take(data.train_iterator(), data.statistics["train"].num_targets // 20)
    dealt = []
    for reader in range(3):
        rows = [{name: a[reader : reader + 1] for name, a in b.items()} for b in batches]
        targets = np.concatenate([b["targets"].ravel() for b in rows])
        end = int(np.flatnonzero(targets == 256)[-1]) + 1
        check_rows(rows)
        dealt.append(documents(rows, end))
    number = data.statistics["train"].num_documents
    order = [dealt[n % 3][n // 3] for n in range(2 * number)]
    expected = sorted(texts(data, many_files, "train"))
    assert sorted(order[:number]) == sorted(order[number:]) == expected
    assert order[:number] != order[number:]
    # The same order as that of a single reader.
    targets = 2 * data.statistics["train"].num_targets
    alone = take(open_bytes(many_files, cache_dir).train_iterator(), targets // 64 + 1)
    assert documents(alone, targets) == order


def test_one_reader_reads_what_it_always_has(many_files: pathlib.Path, cache_dir: str) -> None:
    """Runs from before there were readers continue with the same batches."""
    digests = {}
    for packing in ("concat", "best_fit"):
        data = open_bytes(many_files, cache_dir, packing=packing)
        digest = hashlib.sha256()
        for batch in take(data.train_iterator(), 20):
            for name in ("inputs", "positions", "document_ids", "targets"):
                digest.update(batch[name].tobytes())
        digests[packing] = digest.hexdigest()[:16]
    assert digests == {"concat": "8c29b4a95d61f040", "best_fit": "0fff879ccfc8c0ba"}


def test_who_runs_and_saves_which_reader() -> None:
    assert shares(TWICE, num_readers=4, batch_size=ROWS) == (
        Share(readers=(0, 1), saves=(0, 1)),
        Share(readers=(0, 1), saves=()),
        Share(readers=(2, 3), saves=(2, 3)),
        Share(readers=(2, 3), saves=()),
    )
    assert shares([range(3), range(3, 8)], num_readers=4, batch_size=ROWS) == (
        Share(readers=(0, 1), saves=(0, 1), spare=1),
        Share(readers=(1, 2, 3), saves=(2, 3), spare=1),
    )
    assert [s.spare for s in shares(EVEN[4], num_readers=1, batch_size=ROWS)] == [6] * 4
