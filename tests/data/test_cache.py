import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import cache, open_dataset, prepare, store
from tlm_jax.data import tokenizers as tokenizers_lib

ROOT = pathlib.Path(__file__).parents[2]

OPEN = """
import json, sys
from tlm_jax.config import DataConfig, UserError
from tlm_jax.data import open_dataset
path, tokenizer, cache = sys.argv[1:4]
exec(sys.argv[4])
try:
    data = open_dataset(
        DataConfig(path=path, tokenizer=tokenizer or None, cache_dir=cache, seq_len=64), 4096)
except UserError as error:
    sys.exit(str(error))
batches = [b["targets"].tolist() for b in data.validation_batches()]
print(json.dumps([data.fingerprint, data.statistics["train"].num_bytes, batches]))
"""


def start(
    path: pathlib.Path, tokenizer: str, cache: pathlib.Path, first: str = ""
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(path), tokenizer, str(cache), first],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """1.5 MB, which takes the embedded tokenizer a second."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    lines = (f"line {i} of a text, with {i * 7919 % 10007} words\n\n" for i in range(38_000))
    path.write_text("".join(lines))
    return path


def test_killed_while_preparing(text_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    process = start(text_file, "", tmp_path)
    until = time.monotonic() + 60
    while not (files := list(tmp_path.glob("*.incomplete-*/.*.arrayrecord.*"))):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = files[0].relative_to(tmp_path).parts[0]
    assert (tmp_path / left).is_dir(), "killed too late to prove anything"

    config = DataConfig(path=str(text_file), cache_dir=str(tmp_path))
    data = open_dataset(config, 4096)
    assert sum(s.num_bytes for s in data.statistics.values()) == text_file.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        folder := data.parts[0].folder.name,
        f"{folder}.lock",
    ]
    decoded = [data.tokenizer.decode(b["targets"].ravel()) for b in data.validation_batches()]
    assert text_file.read_text().endswith("".join(decoded).rstrip("\0")[-1000:])


def test_two_prepare_at_once(text_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    both = [start(text_file, "bytes", tmp_path) for _ in range(2)]
    results = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert json.loads(results[0][0])[1] > 1_000_000
    assert sum("prepared in" in err for _, err in results) == 1
    assert len(list(tmp_path.glob("*"))) == 2  # the folder and the lock


def test_another_was_first_without_locks(
    many_files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(path=str(many_files), tokenizer="bytes", cache_dir=str(tmp_path))
    tokenizer = tokenizers_lib.load_tokenizer("bytes")
    real, others = prepare.prepare, []

    def prepare_late(job: prepare.Job, folder: pathlib.Path) -> store.Manifest:
        made = real(job, folder)
        final = folder.with_name(folder.name.split(".")[0])
        shutil.copytree(folder, final)
        others.append(final.with_name(f"{final.name}.incomplete-1"))
        others[0].mkdir()
        return made

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prepare, "prepare", prepare_late)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = cache.prepare_cached(config, tokenizer)
    assert store.open_manifest(folder).statistics["train"].num_documents > 0
    assert list(tmp_path.glob("*incomplete*")) == others


def test_is_done_once(
    many_files: pathlib.Path, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(path=str(many_files), tokenizer="bytes", cache_dir=str(tmp_path))
    first = open_dataset(config, 257)
    lines = capfd.readouterr()
    assert lines.out == ""  # TFDS keeps quiet
    assert lines.err.splitlines()[0] == f"preparing {many_files}: 0.0 MB of text (only once)"
    assert len(lines.err.splitlines()) == 2
    second = open_dataset(config, 257)
    assert capfd.readouterr() == ("", "")
    assert second.parts == first.parts

    # Someone cleans up half of it.
    (first.parts[0].folder / store.MANIFEST).unlink()
    assert open_dataset(config, 257).parts == first.parts
    assert "preparing" in capfd.readouterr().err


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_root(None) == tmp_path / "tlm_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root(None) == tmp_path / ".cache" / "tlm_jax"
    assert cache.cache_root("~/there") == tmp_path / "there"


def test_cache_that_cannot_be_written(many_files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    places = [(str(file), "File exists")]
    if os.path.isdir("/proc/self"):  # where even root may not write
        places.append(("/proc/tlm", "No such file or directory"))
    for place, reason in places:
        with pytest.raises(UserError) as error:
            open_dataset(DataConfig(path=str(many_files), cache_dir=place), 4096)
        assert str(error.value) == (
            f"prepared text cannot be written to {place}: {reason}; "
            "choose another folder with --data.cache_dir"
        )


def test_full_disk(text_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A limit on the size of files fails a write in the way that a full disk does."""
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    )
    process = start(text_file, "bytes", tmp_path, limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        f"prepared text cannot be written to {tmp_path}: File too large; "
        "choose another folder with --data.cache_dir"
    )
    assert not list(tmp_path.glob("*incomplete*"))
