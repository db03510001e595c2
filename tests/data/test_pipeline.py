import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import grain
import numpy as np
import pytest

from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import Dataset, open_dataset, packing

ROOT = pathlib.Path(__file__).parents[2]
EOT = 256
Batch = dict[str, np.ndarray]


@pytest.fixture
def many(many_files: pathlib.Path, cache_dir: str) -> Dataset:
    return open_bytes(many_files, cache_dir)


def open_bytes(path: pathlib.Path, cache_dir: str, **changes: Any) -> Dataset:
    options = {"seq_len": 16, "batch_size": 4, "validation_fraction": 0.2} | changes
    return open_dataset(
        DataConfig(path=str(path), tokenizer="bytes", cache_dir=cache_dir, **options), 257
    )


def take(iterator: Any, n: int) -> list[Batch]:
    return list(itertools.islice(iterator, n))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def documents(batches: list[Batch], num_targets: int, skip: int = 0) -> list[str]:
    """The texts in the stream of targets, each of which must end with end-of-text."""
    stream = np.concatenate([b["targets"].ravel() for b in batches])[skip : skip + num_targets]
    assert len(stream) == num_targets
    assert stream[-1] == EOT
    ends = np.flatnonzero(stream == EOT)
    parts = np.split(stream, ends + 1)[:-1]
    return [bytes(p[:-1].astype(np.uint8)).decode() for p in parts]


def texts(data: Dataset, folder: pathlib.Path, split: str) -> list[str]:
    """What the files say, apart from how it was prepared."""
    from tlm_jax.data import sources

    source = sources.FilesSource(str(folder), data.config.validation_fraction)
    items = [item for unit in source.units(10**9) for item in source.items(unit)]
    return [pathlib.Path(d.place).read_text() for d in items if d.split == split]  # type: ignore[union-attr]


def check_rows(batches: list[Batch]) -> None:
    """Targets are inputs shifted by one within documents; ids and positions count up."""
    for batch in batches:
        for x, y, s, p in zip(*(batch[k] for k in ("inputs", "targets", "document_ids",
                                                   "positions")), strict=True):  # fmt: skip
            same = (s[1:] == s[:-1]) & (s[1:] > 0)
            np.testing.assert_array_equal(y[:-1][same], x[1:][same])
            np.testing.assert_array_equal(p[1:][same], p[:-1][same] + 1)
            new = (s[1:] != s[:-1]) & (s[1:] > 0)
            assert (s[1:][new] == s[:-1][new] + 1).all()
            assert (x[1:][new] == EOT).all()
            assert (y[:-1][new] == EOT).all()
            assert (p[1:][new] == 0).all()
            assert p[0] == 0
            assert s[0] in (0, 1)
            pad = s == 0
            assert not np.stack([x, y, p])[:, pad].any()


def pairs(*tokens: int) -> Batch:
    return {"pairs": np.array([(0, *tokens), (*tokens, 0)], np.int32).T}


def test_rows_of_hand_made_documents() -> None:
    source = [pairs(1, 2, 3), pairs(4), pairs(5, 6, 7, 8, 9), pairs()]
    parent = grain.MapDataset.source(source).to_iter_dataset()
    rows = list(packing.PackedRows(parent, 4))
    got = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    assert got == {
        "inputs": [[0, 1, 2, 3], [0, 4, 0, 5], [6, 7, 8, 9], [0, 0, 0, 0]],
        "targets": [[1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 9, 0], [0, 0, 0, 0]],
        "document_ids": [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 1], [1, 0, 0, 0]],
        "positions": [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]],
    }
    assert all(array.dtype == np.int32 for row in rows for array in row.values())


def test_every_train_token_once_an_epoch(many: Dataset, many_files: pathlib.Path) -> None:
    targets = many.statistics["train"].num_targets
    batches = take(many.train_iterator(), 2 * targets // 64 + 1)
    assert all(b[k].shape == (4, 16) and b[k].dtype == np.int32 for b in batches for k in b)
    assert all((b["document_ids"] > 0).all() for b in batches)
    check_rows(batches)
    first, second = (documents(batches, targets, skip) for skip in (0, targets))
    expected = sorted(texts(many, many_files, "train"))
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != expected


def test_order_depends_on_the_seed_only(many: Dataset, many_files: pathlib.Path, cache_dir: str) -> None:  # fmt: skip  # noqa: E501
    first = take(many.train_iterator(), 5)
    assert_same(first, take(many.train_iterator(), 5))
    other = open_bytes(many_files, cache_dir, seed=7)
    assert not np.array_equal(first[0]["inputs"], next(other.train_iterator())["inputs"])
    assert other.layout() | {"seed": 0} == many.layout()


@pytest.mark.parametrize("steps", range(6))
def test_resume_is_exact(equal_files: pathlib.Path, cache_dir: str, steps: int) -> None:
    """Rows end with documents here, which is where Grain alone loses one."""
    data = open_bytes(equal_files, cache_dir, batch_size=1)
    iterator = data.train_iterator()
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 20)
    resumed = data.train_iterator()
    resumed.set_state(state)
    assert_same(take(resumed, 20), expected)


def test_resume_is_exact_within_long_documents(embedded: Dataset) -> None:
    iterator = embedded.train_iterator()
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    iterator.set_state(state)
    assert_same(take(iterator, 30), expected)
    assert expected[0]["inputs"].shape == (16, 256)


def test_workers_resume_exactly(equal_files: pathlib.Path, cache_dir: str) -> None:
    data = open_bytes(equal_files, cache_dir, batch_size=1, num_workers=2)
    iterator = data.train_iterator()
    begin = take(iterator, 4)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 20)
    iterator.close()
    resumed = data.train_iterator()
    resumed.set_state(state)
    rest = take(resumed, 2 * 48 - 4)
    resumed.close()
    assert_same(rest[:20], expected)
    # The workers take turns, two rows a document: an epoch has each document once.
    check_rows(begin + rest)
    starts = [b["inputs"][0, 1:12] for b in begin + rest if b["inputs"][0, 0] == EOT]
    assert len(starts) == data.statistics["train"].num_documents == 48
    assert len({bytes(s.astype(np.uint8)) for s in starts}) == 48


@pytest.mark.parametrize("batch_size", [1, 6, 1000])
def test_validation_scores_each_target_once(
    many: Dataset, many_files: pathlib.Path, batch_size: int
) -> None:
    batches = many.validation_batches(batch_size=batch_size)
    got = list(batches)
    assert len(got) == len(batches)
    assert_same(got, list(batches))  # can be gone through again
    assert all(b[k].shape == (batch_size, 16) and b[k].dtype == np.int32 for b in got for k in b)
    check_rows(got)
    targets = many.statistics["validation"].num_targets
    scored = np.concatenate([b["document_ids"].ravel() for b in got]) > 0
    assert scored.sum() == targets
    assert scored[:targets].all()
    assert documents(got, targets) == texts(many, many_files, "validation")


def test_layout(many: Dataset) -> None:
    layout = many.layout()
    assert json.loads(json.dumps(layout)) == layout
    assert layout == {
        "dataset": many.fingerprint,
        "tokenizer": many.tokenizer.fingerprint,
        "seq_len": 16,
        "batch_size": 4,
        "num_workers": 0,
        "seed": 0,
        "packing": "concat",
        "mixture": None,
        "readers": None,
        "version": 2,
    }


def test_tokenizer_must_fit_the_model(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as error:
        open_dataset(DataConfig(tokenizer="bytes", cache_dir=str(cache)), 256)
    assert str(error.value) == (
        "tokenizer bytes has 257 tokens, but model.vocab_size is 256; use --model.vocab_size 257"
    )
    assert not cache.exists()  # nothing was prepared in vain


def test_never_needs_jax(many_files: pathlib.Path, cache_dir: str) -> None:
    """Grain imports jax where there is one; we work where there is none."""
    code = """
import sys
sys.modules["jax"] = None
import tlm_jax.data
assert not {"grain", "tensorflow_datasets", "tokenizers"} & set(sys.modules)
from tlm_jax.config import DataConfig
data = tlm_jax.data.open_dataset(DataConfig(
    path=sys.argv[1], cache_dir=sys.argv[2] + "/no_jax", tokenizer="bytes", seq_len=16,
    batch_size=2, validation_fraction=0.2), 257)
next(data.train_iterator())
next(iter(data.validation_batches()))
assert "tensorflow" not in sys.modules
assert not [m for m in sys.modules if m.startswith(("jax.", "flax", "optax"))]
"""
    command = [sys.executable, "-c", code, str(many_files), cache_dir]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
