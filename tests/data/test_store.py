"""Shards and their manifest: what is damaged is named, with the record where there is one."""

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from helpers import only_error

from tlm_jax import cli
from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import Dataset, load_tokenizer, open_dataset, store

COUNT = 200


def write(folder: pathlib.Path, vocab_size: int = 257, shards: int = 3) -> store.Manifest:
    """A store of COUNT train documents of some 60 tokens in so many shards, and 20 to validate."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    made: dict[store.Split, list[store.Shard]] = {"train": [], "validation": []}
    for split, count, number in (("train", COUNT, shards), ("validation", 20, 1)):
        ids = [rng.integers(0, 256, rng.integers(20, 100)) for _ in range(count)]
        for part in range(number):
            file = f"{split}-{part:05d}.arrayrecord"
            writer = store.ShardWriter(folder, file, vocab_size)
            for document in ids[count * part // number : count * (part + 1) // number]:
                writer.add(document, len(document))
            made[split].append(writer.close())  # type: ignore[index]
    tokenizer = load_tokenizer("bytes")
    manifest = store.Manifest(
        source="test",
        tokenizer="bytes",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=vocab_size,
        rules={},
        shards={split: tuple(found) for split, found in made.items()},
    )
    manifest.save(folder)
    return manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("store") / "whole"
    write(folder)
    return folder


@pytest.fixture
def folder(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to be damaged."""
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def dataset(folder: pathlib.Path, **options: object) -> Dataset:
    config = DataConfig(path=str(folder), tokenizer="bytes", seq_len=32, batch_size=4)
    return open_dataset(dataclasses.replace(config, **options), 257)  # type: ignore[arg-type]


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        dataset(folder)
    return str(error.value)


def flip(path: pathlib.Path, record: int) -> None:
    """Changes one byte of the tokens of a record."""
    reader = store.DocumentReader(path.parent, store.open_manifest(path.parent), "train")
    content = bytearray(path.read_bytes())
    at = content.index(reader[record].astype("<u2").tobytes())  # type: ignore[union-attr]
    content[at + 6] ^= 1
    path.write_bytes(content)


def test_ids_come_back(tmp_path: pathlib.Path) -> None:
    """At the ends of both widths, and none at all."""
    for vocab_size, width in ((2**16, 2), (2**16 + 1, 4), (200_000, 4)):
        writer = store.ShardWriter(tmp_path, "train-00000.arrayrecord", vocab_size)
        documents = [[0, vocab_size - 1], [], list(range(1000))]
        for ids in documents:
            writer.add(ids, 1)
        with pytest.raises(ValueError, match=f"token id {vocab_size} is beyond the vocabulary"):
            writer.add([vocab_size], 1)
        shard = writer.close()
        assert shard.num_tokens == 1002
        assert shard.size >= 1002 * width
        manifest = store.Manifest(
            source="", tokenizer="", tokenizer_fingerprint="", vocab_size=vocab_size, rules={},
            shards={"train": (shard,), "validation": ()},
        )  # fmt: skip
        reader = store.DocumentReader(tmp_path, manifest, "train")
        assert [reader[i].tolist() for i in range(3)] == documents  # type: ignore[union-attr]
        assert reader[0].dtype == np.int32  # type: ignore[union-attr]


def test_shards_do_not_matter_to_what_is_read(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The same documents in other shards: same fingerprint, same batches, states are exchanged."""
    other = write(tmp_path / "other", shards=7)
    assert other.fingerprint == store.open_manifest(whole).fingerprint
    one, two = dataset(whole), dataset(tmp_path / "other")
    assert one.layout() == two.layout()
    iterator = one.train_iterator()
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = two.train_iterator()
    resumed.set_state(state)
    for left, right in zip(itertools.islice(iterator, 50), resumed, strict=False):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_fingerprint_follows_documents_and_their_order(tmp_path: pathlib.Path) -> None:
    def fingerprint(*documents: list[int]) -> str:
        shards = []
        for number, ids in enumerate(documents):
            writer = store.ShardWriter(tmp_path, f"train-{number:05d}.arrayrecord", 257)
            writer.add(ids, 1)
            shards.append(writer.close())
        return store.Manifest(
            source="", tokenizer="", tokenizer_fingerprint="", vocab_size=257, rules={},
            shards={"train": tuple(shards), "validation": ()},
        ).fingerprint  # fmt: skip

    assert len({fingerprint([1], [2, 3]), fingerprint([2, 3], [1]), fingerprint([1, 2], [3]),
                fingerprint([1], [2, 4])}) == 4  # fmt: skip


def test_open_shards_are_few(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_OPEN_SHARDS", 3)
    manifest = write(tmp_path / "many", shards=20)
    reader = store.DocumentReader(tmp_path / "many", manifest, "train")
    assert all(reader[i] is not None for i in (*range(0, COUNT, 3), 0, 5))
    assert len(reader._readers) == 3


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1000]), "it is truncated"),
        (lambda shard: shard.write_bytes(shard.read_bytes() + b"x"), "not the file that was"),
        (lambda shard: shard.unlink(), "is missing, but manifest.json lists it"),
    ],
)
def test_shards_that_are_not_whole(
    harm: Callable[[pathlib.Path], None], message: str, folder: pathlib.Path
) -> None:
    """Noticed when the store is opened."""
    shard = folder / "train-00001.arrayrecord"
    harm(shard)
    assert message in refusal(folder)
    assert refusal(folder).startswith(f"{shard} ")


def test_flipped_byte(
    folder: pathlib.Path, capfd: pytest.CaptureFixture[str], whole: pathlib.Path
) -> None:
    """Noticed when the record is read, and by --verify; skipped and counted if asked."""
    shard, record = folder / "train-00001.arrayrecord", 10
    first = store.open_manifest(folder).shards["train"][0].num_documents
    flip(shard, first + record)
    data = dataset(folder)
    message = f"{shard}, record {record}: "
    iterator, states = data.train_iterator(), list[str]()

    def go_on() -> None:
        while len(states) < 200:
            states.append(json.dumps(iterator.get_state()))
            next(iterator)

    with pytest.raises(UserError) as error:
        go_on()
    before = len(states) - 1
    assert before > 5
    assert str(error.value).startswith(message)
    assert cli.main(["prepare", "--verify", str(folder)]) == 1
    assert only_error(capfd.readouterr().err).startswith(message)

    epoch = data.statistics["train"].num_targets
    skipping = dataset(folder, skip_corrupt=True)
    assert skipping.layout() == data.layout()
    batches = list(itertools.islice(skipping.train_iterator(), 2 * epoch // 128 + 2))
    notes = capfd.readouterr().err.splitlines()
    assert notes[0].startswith(f"note: {message}")
    assert notes[0].endswith("skipped (1 so far)")
    assert notes[1].endswith("skipped (2 so far)")  # in the second epoch
    # A run that stopped at the record goes on with what comes after it.
    resumed = skipping.train_iterator()
    resumed.set_state(json.loads(states[-1]))
    for expected, got in zip(batches[before : before + 5], resumed, strict=False):
        np.testing.assert_array_equal(got["inputs"], expected["inputs"])


def test_damaged_validation_document(
    folder: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Skipped, it leaves as many batches as were announced."""
    path = folder / "validation-00000.arrayrecord"
    data = dataset(folder, skip_corrupt=True)
    reader = store.DocumentReader(folder, store.open_manifest(folder), "validation")
    content, ids = bytearray(path.read_bytes()), reader[5]
    content[content.index(ids.astype("<u2").tobytes())] ^= 1  # type: ignore[union-attr]
    path.write_bytes(content)
    batches = list(data.validation_batches())
    assert len(batches) == len(data.validation_batches())
    scored = sum(int((b["document_ids"] > 0).sum()) for b in batches)
    assert scored == data.statistics["validation"].num_targets - len(ids) - 1  # type: ignore[arg-type]
    assert f"{path}, record 5: " in capfd.readouterr().err
    with pytest.raises(UserError, match="record 5"):
        list(dataset(folder).validation_batches())


def test_our_own_checksum_notices_what_the_format_does_not(folder: pathlib.Path) -> None:
    """A record that was rewritten with other tokens under the old header."""
    reader = store.DocumentReader(folder, store.open_manifest(folder), "train")
    raw = reader._reader(0).read([3])[0]
    with pytest.raises(ValueError, match="does not match its checksum"):
        reader._decode(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match="no header"):
        reader._decode(raw[:5])


def test_wrong_checksum_in_the_manifest(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"]["train"][2]["sha256"] = "0" * 64
    path.write_text(json.dumps(values))
    assert cli.main(["prepare", "--verify", str(folder)]) == 1
    message = only_error(capsys.readouterr().err)
    assert message.startswith(f"{folder / 'train-00002.arrayrecord'} does not match its checksum")
    assert "all of its 67 records can be read" in message


def test_token_beyond_the_vocabulary(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"vocab_size": 100}))
    with pytest.raises(UserError) as error:
        next(dataset(tmp_path / "store").train_iterator())
    message = str(error.value)
    assert ".arrayrecord, record " in message
    assert "is beyond the vocabulary of 100" in message


def test_manifests_that_do_not_fit(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())

    def with_(**changes: object) -> str:
        path.write_text(json.dumps(values | changes))
        return refusal(folder)

    ours = load_tokenizer("bytes").fingerprint
    assert with_(tokenizer="gpt2.json", tokenizer_fingerprint="0123") == (
        f"{path} was made with tokenizer gpt2.json (0123), but data.tokenizer is bytes ({ours}); "
        "give the same --data.tokenizer, or prepare the text again"
    )
    assert "has format 1, this version of tlm-jax reads 2" in with_(format_version=1)
    path.write_text("{")
    assert refusal(folder).startswith(f"{path} is damaged")
    validation = values["shards"] | {"validation": []}
    assert "has no validation documents" in with_(shards=validation)
    path.unlink()
    (folder / "plan.json").touch()
    assert "is not finished; the same tlm prepare command resumes it" in refusal(folder)
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="has no manifest"):
        dataset(folder, path=None, mixture=((str(empty), 1.0),))
