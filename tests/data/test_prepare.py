"""`tlm prepare`: every format, reproducible, resumable."""

import gzip
import json
import lzma
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from helpers import command, contents, environment, only_error

from tlm_jax import cli, files
from tlm_jax.config import UserError
from tlm_jax.data import load_tokenizer, prepare, records, store, streams

BYTES = load_tokenizer("bytes")
TEXTS = [f"Document {i}: " + "naïve words ☃\n" * (i * 7919 % 50 + 1) for i in range(300)]


def make(path: pathlib.Path | str, out: pathlib.Path, **options: Any) -> store.Manifest:
    """Prepares as `tlm prepare` does, in this process if not told otherwise."""
    out.mkdir(exist_ok=True)
    names = ("column", "validation_fraction", "seed", "max_document_bytes")
    chosen = {"validation_fraction": 0.2} | {n: options.pop(n) for n in names if n in options}
    source = records.open_source(str(path), records.Rules(**chosen))  # type: ignore[arg-type]
    processes = options.pop("processes", 1)
    options = {"shard_bytes": 20_000} | options
    job = prepare.Job(source=source, tokenizer="bytes", rules=chosen, **options)
    return prepare.prepare(job, out, processes=processes)


def documents(folder: pathlib.Path, split: store.Split) -> list[str]:
    reader = store.DocumentReader(folder, store.open_manifest(folder), split)
    ids = [reader[i] for i in range(len(reader))]
    return [BYTES.decode(i.tolist()) for i in ids if i is not None]


def write_lines(path: pathlib.Path, texts: list[str] = TEXTS) -> pathlib.Path:
    lines = "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts))
    path.write_bytes(PACKERS[path.suffix](lines.encode()))
    return path


def zstd_frames(content: bytes) -> bytes:
    """Two frames, as files that were appended to have."""
    half = len(content) // 2
    packer = zstandard.ZstdCompressor()
    return packer.compress(content[:half]) + packer.compress(content[half:])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".txt": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd_frames,
}


def write_parquet(path: pathlib.Path, texts: list[Any] = TEXTS, column: str = "text") -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())})
    parquet.write_table(table, path, row_group_size=37)


def write_tfds(folder: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Prose(tfds.core.GeneratorBasedBuilder):
            name = "prose"
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = pathlib.Path(__file__).parent

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                return {"train": enumerate({"text": t} for t in TEXTS)}

            def _generate_examples(self) -> Any:
                raise NotImplementedError

    tfds.disable_progress_bar()
    Prose(data_dir=os.fspath(folder), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_lines(tmp_path_factory.mktemp("lines") / "a.jsonl")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, lines: pathlib.Path) -> pathlib.Path:
    """The store of TEXTS."""
    folder = tmp_path_factory.mktemp("expected")
    make(lines, folder)
    return folder


def test_documents_come_in_order_and_are_counted(expected: pathlib.Path) -> None:
    train, validation = (documents(expected, split) for split in store.SPLITS)
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [t for t in TEXTS if t in set(train)]
    assert validation == [t for t in TEXTS if t in set(validation)]
    assert 0.1 < len(validation) / len(TEXTS) < 0.3
    manifest = store.open_manifest(expected)
    for split, texts in (("train", train), ("validation", validation)):
        size = sum(len(t.encode()) for t in texts)
        assert manifest.statistics[split] == store.SplitStatistics(  # type: ignore[index]
            num_documents=len(texts), num_tokens=size, num_bytes=size
        )
    assert len(manifest.shards["train"]) > 3
    assert manifest.shards["train"][0].file == "train-00000.arrayrecord"
    assert (manifest.vocab_size, manifest.tokenizer_fingerprint) == (257, BYTES.fingerprint)
    assert sorted(p.name for p in expected.iterdir()) == sorted(
        ["manifest.json", "plan.json"]
        + [shard.file for shards in manifest.shards.values() for shard in shards]
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "it holds no JSON object"),
        (b"\xff{}", "it is not valid JSON"),
        (b"{", "it is not valid JSON"),
        (b'{"key": []}', "it holds no plan"),
    ],
)
def test_damaged_plans(
    content: bytes, reason: str, expected: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A plan.json that is no plan is named."""
    folder = tmp_path / "copy"
    shutil.copytree(expected, folder)
    plan = folder / "plan.json"
    values = json.loads(plan.read_text())
    plan.write_bytes(content)
    lines = values["key"]["source"]
    with pytest.raises(UserError, match=f"^{re.escape(str(plan))} is damaged: {reason}"):
        make(lines, folder)
    plan.write_text(json.dumps(values | {"units": [content.decode(errors="replace")]}))
    with pytest.raises(UserError, match=f"^{re.escape(str(plan))} is damaged: it has no units"):
        make(lines, folder)


@pytest.mark.parametrize("kind", ["gz", "zst", "xz", "parquet", "tfds", "hf"])
def test_every_format_gives_the_same(
    kind: str, expected: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts in another format are the same store, by its fingerprint."""
    if kind == "tfds":
        write_tfds(tmp_path / "data")
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
        import tensorflow_datasets as tfds

        tfds.core.add_data_dir(tmp_path / "data")  # as the variable does for a new process
        source = "tfds:prose"
    elif kind == "hf":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "data").mkdir()
        write_parquet(tmp_path / "data" / "train.parquet", column="content")
        source = f"hf:{tmp_path / 'data'}::train:content"
    elif kind == "parquet":
        source = str(tmp_path / "a.parquet")
        write_parquet(tmp_path / "a.parquet")
    else:
        source = str(write_lines(tmp_path / f"a.jsonl.{kind}"))
    made = make(source, tmp_path / "out", processes=2 if kind in ("hf", "tfds") else 1)
    assert made.fingerprint == store.open_manifest(expected).fingerprint
    assert documents(tmp_path / "out", "train") == documents(expected, "train")


@pytest.mark.parametrize("files", [3, 25])
def test_text_is_cut_alike_packed_or_not_and_in_any_units(
    files: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, tails and pieces of a file do not depend on how it was shared out."""
    for name, value in (("BLOCK_BYTES", 30_000), ("_BLOCK_WINDOW", 2_000)):
        monkeypatch.setattr(streams, name, value)
    rng = random.Random(0)
    texts = []
    for number in range(files):
        count = 24_000 if number == 0 or files == 3 else 500
        breaks = [" ", "\n", "\n\n", "é"]
        words = [f"w{rng.randrange(999)}{rng.choice(breaks)}" for _ in range(count)]
        texts.append("".join(words))
    seen = set()
    for suffix in ("txt", "txt.gz", "txt.xz", "txt.zst"):
        (tmp_path / suffix).mkdir()
        for number, text in enumerate(texts):
            path = tmp_path / suffix / f"{number:02d}.{suffix}"
            path.write_bytes(PACKERS[path.suffix](text.encode()))
        for size in (20_000, 70_000, 10**9):
            out = tmp_path / f"{suffix}-{size}"
            made = make(tmp_path / suffix, out, shard_bytes=size, validation_fraction=0.1)
            if files == 3 or suffix == "txt":  # names choose which of many are held out
                seen.add(made.fingerprint)
            if suffix == "txt" and size == 20_000:
                assert len(made.shards["train"]) > 3
    assert len(seen) == 1
    if files == 3:
        out = tmp_path / "txt-1000000000"
        joined = "".join(documents(out, "train")), "".join(documents(out, "validation"))
        assert sum(map(len, joined)) == sum(map(len, texts[:3]))
        share = len(joined[1].encode()) / sum(len(j.encode()) for j in joined)
        assert 0.09 < share < 0.12
        assert texts[0].startswith(documents(out, "train")[0])
        assert texts[2].endswith(documents(out, "validation")[-1])


def test_processes_do_not_change_a_byte(lines: pathlib.Path, expected: pathlib.Path) -> None:
    out = expected.with_name("two")
    make(lines, out, processes=2)
    assert contents(out) == contents(expected)


def test_long_units_are_written_in_parts(lines: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A packed file is one unit, and yet its shards are of the size that was asked for."""
    packed = write_lines(tmp_path / "a.jsonl.gz")
    made = make(packed, tmp_path / "out", shard_bytes=20_000)
    names = [shard.file for shard in made.shards["train"]]
    assert names[:2] == ["train-00000.arrayrecord", "train-00000-001.arrayrecord"]
    sizes = [a.num_bytes + b.num_bytes for a, b in zip(*made.shards.values(), strict=True)]
    assert all(20_000 <= size < 22_000 for size in sizes[:-1])


def start(source: pathlib.Path, out: pathlib.Path, *words: str) -> subprocess.Popen[str]:
    # A shell's background jobs, such as these tests may be, ignore SIGINT, and so their children.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ("prepare", str(source), "--out", str(out), "--shard_mb", "1", *words)
    return subprocess.Popen(
        [*command("train.py")[:1], "-c", script, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("packed", [False, True])
def test_sigkill_loses_and_redoes_no_shard(packed: bool, tmp_path: pathlib.Path) -> None:
    """Killed and then interrupted, the store is the same to the byte, and whole shards stay."""
    texts = [
        f"{i} a line of text that is long enough, {i * 7919 % 10007}\n" * 40 for i in range(5000)
    ]
    source = write_lines(tmp_path / ("a.jsonl.gz" if packed else "a.jsonl"), texts)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(source, whole)
    assert process.wait(300) == 0, process.communicate()
    kept: dict[str, int] = {}
    for parts, number in ((1, signal.SIGKILL), (2, signal.SIGINT)):
        process = start(source, killed, "--processes", "2")
        until = time.monotonic() + 300
        while len(list(killed.glob("parts/*.json"))) < parts:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        # Returns when the workers, which hold the pipes, are gone too.
        _, err = process.communicate(timeout=300)
        if number == signal.SIGINT:
            assert process.returncode == 130
            message = "interrupted; the same command resumes after the complete shards"
            assert only_error(err) == message
            assert not list(killed.glob(".*.tmp"))
        assert not store.is_complete(killed), "killed too late to prove anything"
        for path, modified in kept.items():
            assert (killed / path).stat().st_mtime_ns == modified, f"{path} was written again"
        for path in killed.glob("parts/*.json"):
            for shard in json.loads(path.read_text())["shards"].values():
                kept[shard["file"]] = (killed / shard["file"]).stat().st_mtime_ns
    process = start(source, killed, "--processes", "2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "MB of it already done" in err
    assert len(kept) >= 2
    for file, modified in kept.items():
        assert (killed / file).stat().st_mtime_ns == modified, f"{file} was written again"
    assert contents(killed) == contents(whole)


def test_the_seed_chooses_what_is_held_out(lines: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """By the text, so that equal documents are never in both splits."""
    doubled = write_lines(tmp_path / "doubled.jsonl", [*TEXTS, *reversed(TEXTS)])
    held_out = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}"
        make(doubled, out, seed=seed)
        train, validation = (set(documents(out, split)) for split in store.SPLITS)
        assert not train & validation
        held_out.append(validation)
        make(lines, tmp_path / f"single-{seed}", seed=seed)
        assert set(documents(tmp_path / f"single-{seed}", "validation")) == validation
    assert len(held_out[0] & held_out[1]) < 0.5 * min(map(len, held_out))


def test_another_plan_is_refused_by_name(lines: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "a.jsonl"
    shutil.copy(lines, source)
    out = tmp_path / "out"
    first = make(source, out)
    before = contents(out)
    assert make(source, out) == first
    for option, value in (("seed", 1), ("shard_bytes", 30_000), ("column", "body")):
        with pytest.raises(UserError, match=f"another plan: {option}: .* -> {value!r}"):
            make(source, out, **{option: value})
    with source.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"another plan: input a.jsonl: \["):
        make(source, out)
    assert contents(out) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x").touch()
    with pytest.raises(UserError, match="is not empty and has no plan"):
        make(source, tmp_path / "notes")


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a `tlm prepare` that fails."""
    assert cli.main(["prepare", *map(str, words)]) == 1
    return only_error(capsys.readouterr().err)


def test_the_verb(
    lines: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(lines), "--out", str(out), "--tokenizer", "bytes", "--processes", "1"]
    assert cli.main(["prepare", *words]) == 0
    said = capsys.readouterr()
    counts = store.open_manifest(out).statistics["train"]
    assert f"train: {counts.num_documents:,} documents, {counts.num_tokens:,} tokens" in said.out
    assert f"use it with --data.path {out}" in said.out
    assert "preparing" in said.err
    assert cli.main(["prepare", "--verify", str(out)]) == 0
    assert "all checksums match" in capsys.readouterr().out
    assert "needs SOURCE --out FOLDER" in fails(capsys, lines)
    assert "--processes 0" in fails(capsys, *words, "--processes", "0")
    with files.locked(out / ".lock", "in use"):
        assert fails(capsys, *words) == f"another process is preparing text in {out}"
