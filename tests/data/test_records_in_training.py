"""JSON lines and Parquet as `data.path`, without `tlm prepare`."""

import gzip
import hashlib
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import open_dataset, prepare, records, sources

FRACTION = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """40 text files, and the same documents as JSON lines and Parquet.

    Of text files, those are held out that a hash of their names chooses; of records, those that a
    hash of the text does. A number in each text is chosen so that both choose the same.
    """
    root = tmp_path_factory.mktemp("records")
    (root / "texts").mkdir()
    files = {f"{i:02d}.txt": f"document {i:02d} number %03d " + "x" * i for i in range(40)}
    for name, text in files.items():
        (root / "texts" / name).write_text(text % 0)
    held_out = sources.FilesSource(str(root / "texts"), FRACTION)._held_out
    texts = []
    for name, text in files.items():
        numbered = (text % number for number in itertools.count())
        texts.append(next(t for t in numbered if _is_held_out(t) == (name in held_out)))
        (root / "texts" / name).write_text(texts[-1])
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    (root / "all.jsonl").write_text("".join(lines))
    (root / "all.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    parquet.write_table(pyarrow.table({"text": texts}), root / "all.parquet")
    (root / "parts" / "deep").mkdir(parents=True)
    (root / "parts" / "0.jsonl").write_text("".join(lines[:25]))
    (root / "parts" / "deep" / "1.jsonl").write_text("".join(lines[25:]))
    return root


def _is_held_out(text: str) -> bool:
    drawn = hashlib.blake2b(text.encode(), digest_size=8, key=b"0").digest()
    return int.from_bytes(drawn, "little") < FRACTION * 2**64


def _config(path: object, cache: pathlib.Path, **changes: Any) -> DataConfig:
    values = {"tokenizer": "bytes", "seq_len": 16, "batch_size": 4} | changes
    return DataConfig(path=str(path), cache_dir=str(cache), validation_fraction=FRACTION, **values)


def _batches(config: DataConfig) -> list[dict[str, np.ndarray]]:
    data = open_dataset(config, 257)
    train = data.train_iterator()
    return [*itertools.islice(train, 40), *data.validation_batches()]


@pytest.mark.parametrize(
    "path", ["all.jsonl", "all.jsonl.gz", "all.parquet", "parts", "parts/**/*.jsonl", "prepared"]
)
def test_batches_are_those_of_text_files(
    path: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Of the same documents in the same order, whatever files hold them."""
    source = folder / path
    if path == "prepared":
        source = tmp_path / path
        source.mkdir()
        rules = records.Rules(validation_fraction=FRACTION)
        lines = records.open_source(str(folder / "all.jsonl"), rules)
        prepare.prepare(prepare.Job(source=lines, tokenizer="bytes"), source)
    found = _batches(_config(source, tmp_path / "cache"))
    expected = _batches(_config(folder / "texts", tmp_path / "cache"))
    assert len(found) == len(expected) > 40
    for one, two in zip(found, expected, strict=True):
        for name in two:
            np.testing.assert_array_equal(one[name], two[name])


def test_prepared_once_per_content(
    folder: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cache knows the files by what they say, and the share that is held out."""
    path = tmp_path / "a.jsonl"
    content = (folder / "all.jsonl").read_text()
    for text, changes, prepared in (
        (content, {}, True),
        (content, {"seq_len": 8}, False),
        (content.replace("document", "Document"), {}, True),
    ):
        path.write_text(text)
        open_dataset(_config(path, tmp_path / "cache", **changes), 257)
        assert ("preparing" in capfd.readouterr().err) == prepared


def test_what_cannot_be_read_is_one_line(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Files of several kinds, no text, nothing that matches, nothing held out."""
    (tmp_path / "few.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp_path / "other.jsonl").write_text('{"content": "a"}\n')
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "other.parquet")
    for path, message in (
        (folder, f"data.path {folder} has files of several kinds (.jsonl, .parquet, .txt); name"),
        (
            tmp_path / "other.jsonl",
            "has no text in 'text' at offset 0, line 1",
        ),
        (tmp_path / "other.parquet", "no text column 'text'; tlm prepare --column can name one of"),
        (f"{tmp_path}/no*.jsonl", "no*.jsonl matches no text files (.txt, .md, .jsonl, "),
        (
            tmp_path / "few.jsonl",
            "few.jsonl has no train documents at validation_fraction",
        ),
    ):
        with pytest.raises(UserError) as error:
            open_dataset(_config(path, tmp_path / "cache"), 257)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
