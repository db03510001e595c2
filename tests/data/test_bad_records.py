"""What is wrong with an input is said in one line with file and record, or skipped and counted."""

import gzip
import json
import lzma
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import zstandard
from helpers import ROOT, environment, only_error

from tlm_jax import cli
from tlm_jax.config import UserError
from tlm_jax.data import records, sources, store

GOOD = [json.dumps({"text": f"good document {i}"}).encode() for i in range(3)]
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "empty": (b'{"text": " \\n"}', "has an empty document at offset {o}, line 4"),
    "nul": (b'{"text": "a\\u0000b"}', "has a NUL character at offset {o}, line 4"),
    "raw nul": (b'{"text": "a\0b"}', "has a NUL character at offset {o+11}, line 4"),
    "latin-1": (b'{"text": "caf\xe9"}', "is not UTF-8: byte 0xe9 at offset {o+13}, line 4"),
    "surrogate": (b'{"text": "a\\ud800"}', "is not Unicode: \\ud800 at offset {o}, line 4"),
    "not JSON": (b"{'text': 1}", "has a line that is not JSON: "),
    "no field": (b'{"body": "x"}', "has no text in 'text' at offset {o}, line 4"),
    "number": (b'{"text": 1}', "has no text in 'text' at offset {o}, line 4"),
    "list": (b'["text"]', "has no text in 'text' at offset {o}, line 4"),
    "long": (
        b'{"text": "' + b"x" * 2**20 + b'"}',
        "has a record of more than max_document_bytes=1,048,576 at offset {o}, line 4",
    ),
}


def prepare(source: object, out: pathlib.Path, *words: str) -> int:
    fixed = ("--tokenizer", "bytes", "--processes", "1", "--validation_fraction", "0.3")
    return cli.main(["prepare", str(source), "--out", str(out), *fixed, *words])


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with file and line; with --skip_corrupt, counted, listed and all others kept."""
    line, message = BAD_LINES[kind]
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(b"\n".join([*GOOD, line, *GOOD]) + b"\n")
    start = sum(len(good) + 1 for good in GOOD)
    for spelled, offset in (("{o}", start), ("{o+11}", start + 11), ("{o+13}", start + 13)):
        message = message.replace(spelled, str(offset))
    words = ("--max_document_mb", "1")
    assert prepare(source, out, *words) == 1
    said = only_error(capsys.readouterr().err)
    assert said.startswith(f"{source} {message}")
    assert "line 4" in said
    assert prepare(source, out, *words, "--skip_corrupt") == 0
    told = capsys.readouterr().out
    assert "skipped: 1 records, each of which " in told
    assert said in told
    manifest = store.open_manifest(out)
    assert list(manifest.skipped.values()) == [1]
    assert manifest.skipped_places == (said,)
    assert sum(s.num_documents for s in manifest.statistics.values()) == 6


def test_lines_are_counted_in_the_file_not_in_the_unit(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*GOOD * 50, b"{}", *GOOD]))
    lines = records.open_source(str(source), records.Rules())
    units = lines.units(500)
    assert len(units) > 5
    items = [item for unit in units for item in lines.items(unit)]
    assert len(items) == 154
    faults = [item.message for item in items if isinstance(item, sources.Fault)]
    assert len(faults) == 1
    assert faults[0].endswith("line 151")


def test_bad_rows_of_parquet(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffx")]
    )
    texts = pa.concat_arrays([pa.array(["fine", "", None, "a\0b", "fine too"]), broken])
    source, out = tmp_path / "a.parquet", tmp_path / "out"
    parquet.write_table(pa.table({"text": texts, "n": range(6)}), source, row_group_size=2)
    assert prepare(source, out) == 1
    assert only_error(capsys.readouterr().err) == f"{source} has an empty document at row 1"
    assert prepare(source, out, "--skip_corrupt") == 0
    assert store.open_manifest(out).skipped_places == (
        f"{source} has an empty document at row 1",
        f"{source} has no text in 'text' at row 2",
        f"{source} has a NUL character at row 3",
        f"{source} is not UTF-8: byte 0xff at row 5",
    )
    assert prepare(source, tmp_path / "2", "--column", "n") == 1
    said = only_error(capsys.readouterr().err)
    assert said == f"{source} has no text column 'n'; tlm prepare --column can name one of text"
    content = source.read_bytes()
    source.write_bytes(content[:-10])
    assert prepare(source, tmp_path / "3") == 1
    assert only_error(capsys.readouterr().err) == f"{source} is not Parquet, or truncated"


def test_bad_text(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A piece of a file is its record; the others are kept."""
    source, out = tmp_path / "a.txt", tmp_path / "out"
    good = b"A line of text.\n" * 10_000
    source.write_bytes(good + b"a \0\n" + good)
    assert prepare(source, out) == 1
    said = only_error(capsys.readouterr().err)
    assert said == f"{source} has a NUL character at offset {len(good) + 2}, line 10001"
    assert prepare(source, out, "--skip_corrupt") == 0
    manifest = store.open_manifest(out)
    assert manifest.skipped_places == (said,)
    kept = sum(s.num_bytes for s in manifest.statistics.values())
    assert len(good) < kept < 2 * len(good)


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_packed_files_that_end_too_soon(
    suffix: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = {
        "gz": gzip.compress,
        "xz": lzma.compress,
        "zst": zstandard.ZstdCompressor().compress,
    }[suffix]
    content = os.urandom(50_000).hex().encode()
    for kind, plain in (("txt", content), ("jsonl", b"\n".join(GOOD * 1000) + b"\n")):
        source = tmp_path / f"a.{kind}.{suffix}"
        source.write_bytes(pack(plain)[:-20])  # type: ignore[operator]
        assert prepare(source, tmp_path / f"{kind}.out", "--skip_corrupt") == 1
        said = only_error(capsys.readouterr().err)
        assert said.startswith(f"{source} cannot be decompressed: ")


def test_sources_that_cannot_be_opened(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    both = tmp_path / "both"
    both.mkdir()
    (both / "a.txt").write_text("text")
    (both / "b.jsonl").write_text("{}")

    def fails(source: object) -> str:
        assert prepare(source, out) == 1
        return only_error(capsys.readouterr().err)

    assert fails(tmp_path / "gone") == f"source {tmp_path / 'gone'} does not exist"
    assert fails(both) == (
        f"source {both} has files of several kinds (.jsonl, .txt); name one kind by a pattern such "
        "as 'FOLDER/**/*.jsonl', or prepare each kind with tlm prepare and mix the results with "
        "data.mixture"
    )
    assert fails("tfds:no_such_data_set").startswith("tfds:no_such_data_set cannot be opened: ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants", "datasets.config"):
        pytest.importorskip(module)
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    assert fails("hf:nobody/nothing").startswith("hf:nobody/nothing cannot be loaded: ")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert fails("hf:x/y") == "hf:x/y needs the package datasets: pip install 'tlm-jax[hf]'"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_line_of_100_mb_in_bounded_memory(tmp_path: pathlib.Path) -> None:
    """It is refused, or skipped, without being held in memory."""
    source = tmp_path / "a.jsonl"
    with source.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + b"\n".join(GOOD))
    code = r"""
import pathlib, re, sys
from tlm_jax.data import records, prepare, store
import array_record.python.array_record_module, tlm_jax.data.tokenizers, numpy, zstandard
status = pathlib.Path("/proc/self/status")  # getrusage begins with the parent's peak
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
before = peak()
source = records.open_source(sys.argv[1], records.Rules(max_document_bytes=2**20))
for unit in source.units(2**30):
    print(len([item for item in source.items(unit)]), peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    count, grown = done.stdout.split()
    assert int(count) == 4
    assert float(grown) < 20, "MB"
    # And where it is allowed, it is a document like others.
    rules = records.Rules(max_document_bytes=200 * 2**20)
    lines = records.open_source(str(source), rules)
    items: list[Any] = [i for unit in lines.units(2**30) for i in lines.items(unit)]
    assert [i.num_bytes for i in items] == [100 * 2**20] + [15] * 3


def test_faults_are_raised_where_the_records_are_read(tmp_path: pathlib.Path) -> None:
    """Also from another process."""
    from tlm_jax.data import prepare as prepare_lib

    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([*GOOD * 50, b"{}", *GOOD]))
    job = prepare_lib.Job(
        source=records.open_source(str(source), records.Rules()), tokenizer="bytes", shard_bytes=900
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a.jsonl has no text in 'text' at offset \d+, line 151$"):
        prepare_lib.prepare(job, tmp_path / "out", processes=2)
