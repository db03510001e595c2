"""Text, prepared text and tokenizers in a bucket."""

import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
from gcs_server import Server
from helpers import Fails, contents
from s3_server import Either

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
def gs_prepared(local: pathlib.Path, served_gcs: Server) -> pathlib.Path:
    """The same, from a bucket into a bucket."""
    return _prepared(local, storage.path("gs://bucket/data"))


@pytest.fixture(scope="module")
def s3_prepared(local: pathlib.Path, served_s3: Either) -> pathlib.Path:
    """The same on S3."""
    return _prepared(local, storage.path("s3://bucket/data"))


@pytest.fixture
def prepared(request: pytest.FixtureRequest, server: Either) -> pathlib.Path:
    """Each of the two."""
    return request.getfixturevalue(f"{server.scheme}_prepared")


def _prepared(local: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
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
    prepared: pathlib.Path, server: Either, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    """Shards that are complete are neither lost nor made again."""
    monkeypatch.setattr("tlm_jax.data.prepare.MIN_UNIT_BYTES", 20_000)
    source = prepared.parent / "lines.jsonl"
    out = storage.path(f"{server.scheme}://other/again")
    words = ("prepare", str(source), "--out", str(out), *OPTIONS, "--processes", "1")
    server.fault = lambda *_: 403 if len(server.names("again/parts", "other")) > 3 else None
    assert "permission denied" in fails(*words)
    server.fault = lambda method, path: None
    shards = _shards(server)
    assert len(shards) > 3
    assert not store.is_complete(out)
    begin = len(server.requests)
    assert cli.main(list(words)) == 0
    writes = [path for method, path in server.requests[begin:] if method in ("POST", "PUT")]
    again = [name for name in shards if any(name in path for path in writes)]
    assert len(again) <= 2  # those of the part whose note could not be written
    assert all(name in " ".join(writes) for name in set(_shards(server)) - set(shards))
    assert store.open_manifest(out).fingerprint == store.open_manifest(prepared).fingerprint


def _shards(server: Either) -> list[str]:
    return [n for n in server.names("again/", "other") if n.endswith("arrayrecord")]


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
    kept = sorted((tmp_path / "shards").glob("*.arrayrecord"))  # the next may be on its way
    assert kept
    assert all(store.sha256(path) == path.stem for path in kept)
    for iterator in iterators:
        iterator.close()  # type: ignore[union-attr]
    remote = dataclasses.replace(there.config, cache_dir=f"{prepared}/cache")
    with pytest.raises(UserError, match=r"cache_dir .* must be a folder on this machine"):
        open_dataset(remote, 257).train_iterator()


def test_copies_are_bounded_and_checked(
    local: pathlib.Path,
    gs_prepared: pathlib.Path,
    gcs: Server,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = store.open_manifest(gs_prepared)
    largest = max(shard.size for shard in manifest.shards["train"])
    monkeypatch.setattr(shard_cache, "room", lambda folder, used: 2 * largest)
    monkeypatch.setattr(store, "_OPEN_SHARDS", 1)
    reader = store.DocumentReader(gs_prepared, manifest, "train", copies=tmp_path)
    local_reader = store.DocumentReader(local / "prepared", manifest, "train")
    for number in [*range(0, len(reader), 7), 0]:
        np.testing.assert_array_equal(reader[number], local_reader[number])
        assert sum(path.stat().st_size for path in tmp_path.glob("*.arrayrecord")) <= 2 * largest
    assert capsys.readouterr().err.count("copied again and again") == 1
    shard = manifest.shards["validation"][0]
    stored = gcs.buckets["bucket"][f"data/prepared/{shard.file}"]
    monkeypatch.setattr(stored, "data", stored.data[:-1] + b"?")
    with pytest.raises(UserError, match=f"{shard.file} does not match its checksum"):
        store.DocumentReader(gs_prepared, manifest, "validation", copies=tmp_path)[0]
    monkeypatch.setattr(shard_cache, "room", lambda folder, used: 10)
    with pytest.raises(UserError, match="there is no room for a shard"):
        store.DocumentReader(gs_prepared, manifest, "train", copies=tmp_path / "new")[0]


def test_text_is_read_packed_or_not(server: Either, tmp_path: pathlib.Path) -> None:
    """Text, lines and Parquet, from a bucket as from a folder."""
    import pyarrow as pa
    from pyarrow import parquet

    for name in ("text", "packed", "table"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(TEXTS[:6]):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
        (tmp_path / "packed" / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(
        pa.table({"text": TEXTS}), tmp_path / "table/one.parquet", row_group_size=99
    )
    rules = records.Rules(validation_fraction=0.2)
    bucket = storage.path(f"{server.scheme}://bucket/texts")
    for name in ("text", "packed", "table"):
        storage.upload(tmp_path / name, bucket / name)
        found = [records.open_source(str(f / name), rules) for f in (tmp_path, bucket)]
        documents = [
            [(d.text, d.split) for u in s.units(10_000) for d in s.items(u)]  # type: ignore[union-attr]
            for s in found
        ]
        assert documents[0] == documents[1]
        assert len(documents[0]) >= 6
    assert sources.files_below(str(bucket / "text"), (".txt",), "x").keys() >= {"0.txt", "5.txt"}
    with pytest.raises(UserError, match="://bucket/nothing does not exist"):
        records.open_source(f"{server.scheme}://bucket/nothing", rules)


def test_a_tokenizer_in_a_bucket(server: Either) -> None:
    from tlm_jax.data.tokenizers import EMBEDDED

    bucket = f"{server.scheme}://bucket"
    storage.upload(EMBEDDED, storage.path(f"{bucket}/tokenizer.json"))
    found = load_tokenizer(f"{bucket}/tokenizer.json")
    assert found.fingerprint == load_tokenizer(None).fingerprint
    with pytest.raises(UserError, match=rf"{bucket}/x\.json does not exist"):
        load_tokenizer(f"{bucket}/x.json")
