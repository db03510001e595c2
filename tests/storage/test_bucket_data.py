"""Text, prepared text and tokenizers in a bucket."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from gcs_server import Server
from helpers import Fails, contents

from tlm_jax import cli, storage
from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import load_tokenizer, open_dataset, records, shard_cache, sources, store

TEXTS = [f"Document {i}: " + "naïve words ☃\n" * (i * 7919 % 50 + 1) for i in range(300)]
OPTIONS = ("--tokenizer", "bytes", "--validation_fraction", "0.2", "--shard_mb", "1")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Lines of JSON beside what `tlm prepare` makes of them, on this machine."""
    folder = tmp_path_factory.mktemp("local")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "lines.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlm_jax.data.prepare.MIN_UNIT_BYTES", 20_000)
        words = (str(folder / "lines.jsonl"), "--out", str(folder / "prepared"), *OPTIONS)
        assert cli.main(["prepare", *words, "--processes", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def prepared(local: pathlib.Path, served: Server) -> pathlib.Path:
    """The same, from a bucket into a bucket."""
    folder = storage.path("gs://bucket/data")
    storage.upload(local / "lines.jsonl", folder / "lines.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlm_jax.data.prepare.MIN_UNIT_BYTES", 20_000)
        words = (str(folder / "lines.jsonl"), "--out", str(folder / "prepared"), *OPTIONS)
        assert cli.main(["prepare", *words, "--processes", "1"]) == 0
    return folder / "prepared"


def _config(folder: pathlib.Path, cache: pathlib.Path) -> DataConfig:
    return DataConfig(
        path=str(folder), tokenizer="bytes", seq_len=64, batch_size=4, cache_dir=str(cache)
    )


def test_prepared_text_is_the_same_to_the_byte(
    local: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    storage.download(prepared, tmp_path / "copy")
    here, there = contents(local / "prepared"), contents(tmp_path / "copy")
    assert len([name for name in here if name.endswith("arrayrecord")]) > 8
    for name in ("plan.json", "manifest.json"):  # they name the source
        del here[name], there[name]
    here.pop(".lock", None)
    assert there == here
    prints = [store.open_manifest(f).fingerprint for f in (local / "prepared", prepared)]
    assert prints[0] == prints[1]
    assert cli.main(["prepare", "--verify", str(prepared)]) == 0


def test_an_interrupted_preparation_resumes(
    prepared: pathlib.Path, gcs: Server, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    """Shards that are complete are neither lost nor made again."""
    monkeypatch.setattr("tlm_jax.data.prepare.MIN_UNIT_BYTES", 20_000)
    source, out = prepared.parent / "lines.jsonl", storage.path("gs://other/again")
    words = ("prepare", str(source), "--out", str(out), *OPTIONS, "--processes", "1")
    gcs.fault = lambda method, path: 403 if len(gcs.names("again/parts", "other")) > 3 else None
    assert "permission denied" in fails(*words)
    gcs.fault = lambda method, path: None
    old = dict(gcs.buckets["other"])
    assert not store.is_complete(out)
    assert cli.main(list(words)) == 0
    shards = [n for n in old if n.endswith("arrayrecord")]
    assert len(shards) > 3
    new = gcs.buckets["other"]
    again = [name for name in shards if new[name].generation != old[name].generation]
    assert len(again) <= 2  # those of the part whose note could not be written
    assert store.open_manifest(out).fingerprint == store.open_manifest(prepared).fingerprint


def test_batches_from_a_bucket_are_those_from_a_folder(
    local: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    here = open_dataset(_config(local / "prepared", tmp_path), 257)
    there = open_dataset(_config(prepared, tmp_path), 257)
    assert there.layout() == here.layout()
    iterators = here.train_iterator(), there.train_iterator()
    for _ in range(20):
        one, other = map(next, iterators)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    kept = sorted((tmp_path / "shards").iterdir())
    assert kept
    assert all(store.sha256(path) == path.stem for path in kept)
    for iterator in iterators:
        iterator.close()  # type: ignore[union-attr]


def test_copies_are_bounded_and_checked(
    local: pathlib.Path,
    prepared: pathlib.Path,
    gcs: Server,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = store.open_manifest(prepared)
    largest = max(shard.size for shard in manifest.shards["train"])
    monkeypatch.setattr(shard_cache, "room", lambda folder, used: 2 * largest)
    monkeypatch.setattr(store, "_OPEN_SHARDS", 1)
    reader = store.DocumentReader(prepared, manifest, "train", copies=tmp_path)
    local_reader = store.DocumentReader(local / "prepared", manifest, "train")
    for number in [*range(0, len(reader), 7), 0]:
        np.testing.assert_array_equal(reader[number], local_reader[number])
        assert sum(path.stat().st_size for path in tmp_path.glob("*.arrayrecord")) <= 2 * largest
    assert capsys.readouterr().err.count("copied again and again") == 1
    shard = manifest.shards["validation"][0]
    stored = gcs.buckets["bucket"][f"data/prepared/{shard.file}"]
    monkeypatch.setattr(stored, "data", stored.data[:-1] + b"?")
    with pytest.raises(UserError, match=f"{shard.file} does not match its checksum"):
        store.DocumentReader(prepared, manifest, "validation", copies=tmp_path)[0]
    monkeypatch.setattr(shard_cache, "room", lambda folder, used: 10)
    with pytest.raises(UserError, match="there is no room for a shard"):
        store.DocumentReader(prepared, manifest, "train", copies=tmp_path / "new")[0]


def test_text_is_read_packed_or_not(gcs: Server, tmp_path: pathlib.Path) -> None:
    """Text, lines and Parquet, from a bucket as from a folder."""
    import pyarrow as pa
    from pyarrow import parquet

    for name in ("text", "packed", "table"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(TEXTS[:30]):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
        (tmp_path / "packed" / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(
        pa.table({"text": TEXTS}), tmp_path / "table/one.parquet", row_group_size=99
    )
    rules = records.Rules(validation_fraction=0.2)
    bucket = storage.path("gs://bucket/texts")
    for name in ("text", "packed", "table"):
        storage.upload(tmp_path / name, bucket / name)
        found = [records.open_source(str(f / name), rules) for f in (tmp_path, bucket)]
        documents = [
            [(d.text, d.split) for u in s.units(10_000) for d in s.items(u)]  # type: ignore[union-attr]
            for s in found
        ]
        assert documents[0] == documents[1]
        assert len(documents[0]) >= 30
    assert sources.files_below(str(bucket / "text"), (".txt",), "x").keys() >= {"0.txt", "29.txt"}
    with pytest.raises(UserError, match="gs://bucket/nothing does not exist"):
        records.open_source("gs://bucket/nothing", rules)


def test_a_tokenizer_in_a_bucket(gcs: Server) -> None:
    from tlm_jax.data.tokenizers import EMBEDDED

    storage.upload(EMBEDDED, storage.path("gs://bucket/tokenizer.json"))
    found = load_tokenizer("gs://bucket/tokenizer.json")
    assert found.fingerprint == load_tokenizer(None).fingerprint
    with pytest.raises(UserError, match=r"gs://bucket/x\.json does not exist"):
        load_tokenizer("gs://bucket/x.json")
