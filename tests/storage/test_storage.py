"""Paths, growing files and leases in a bucket."""

import errno
import io
import json
import pathlib
import pickle
import re
import shutil
import threading
import time

import jax.numpy as jnp
import pytest
from gcs_server import Server
from s3_server import Either

from tlm_jax import bucket_files, files, storage
from tlm_jax.config import UserError
from tlm_jax.training import profiling


def _path(server: Either, name: str) -> pathlib.Path:
    return storage.path(f"{server.scheme}://bucket/{name}")


def test_local_paths_stay_pathlibs() -> None:
    for name in ("runs/x", "~/x", "gs", "/gs/bucket/x"):
        assert type(storage.path(name)) is type(pathlib.Path(name))
    for name in ("az://bucket/x", "http://host/x", "gs://", "gs:///"):
        with pytest.raises(UserError, match="can be local, gs://BUCKET"):
            storage.path(name)


def test_a_profile_that_cannot_be_written_stays_here(gcs: Server) -> None:
    """The run that made it goes on."""
    folder = storage.path("gs://nowhere/run/profile")
    profiler = profiling.Profiler(profiling.parse("0:1"), folder)
    profiler.before_step(0)
    said = profiler.after_step(1, jnp.ones(3)) or ""
    found = re.fullmatch(r"Profile in (.*): cannot write to (gs://.*/profile): .*no bucket.*", said)
    assert found is not None
    assert found[2] == str(folder)
    assert list(pathlib.Path(found[1]).rglob("*.xplane.pb"))
    shutil.rmtree(found[1])


def test_a_path_in_a_bucket_is_a_path(server: Either) -> None:
    root = f"{server.scheme}://bucket"
    path = storage.path(f"{root}/paths/folder/a.txt")
    assert str(path) == f"{root}/paths/folder/a.txt"
    assert storage.path(pathlib.Path(f"{root}/x")) == storage.path(f"{root}/x")  # it lost a slash
    assert pickle.loads(pickle.dumps(path)) == path
    assert str(path.relative_to(path.parent.parent)) == "folder/a.txt"
    assert not path.exists()
    assert not path.parent.is_dir()
    path.write_text("early\nlate\n")
    assert path.is_file()
    assert path.parent.is_dir()
    assert not path.is_dir()
    assert path.stat().st_size == 11
    assert list(path.open(encoding="utf-8")) == ["early\n", "late\n"]
    with path.open("rb") as file:
        file.seek(6)
        assert file.read() == b"late\n"
    with pytest.raises(OSError, match="mode 'a' is not possible"):
        path.open("a")
    assert list(path.parent.iterdir()) == [path]
    assert list(path.parent.parent.glob("*/*.txt")) == [path]
    with pytest.raises(NotADirectoryError):
        path.iterdir()
    moved = path.parent.rename(path.parent.with_name("moved"))
    assert [str(p) for p in moved.parent.rglob("*")] == [f"{moved}/a.txt"]
    storage.remove_tree(moved)
    assert not moved.exists()


def test_what_goes_wrong_is_one_line(server: Either) -> None:
    nowhere, path = f"{server.scheme}://nowhere", _path(server, "x")
    for work in (
        storage.path(f"{nowhere}/x").is_dir,
        lambda: storage.path(f"{nowhere}/x").write_text("x"),
    ):
        with pytest.raises(FileNotFoundError, match=f"there is no bucket {nowhere}"):
            work()
    server.fault = lambda method, path: 403
    for work in (path.is_file, path.read_bytes, lambda: path.write_text("x")):
        with pytest.raises(PermissionError, match=r"denied \((injected|Forbidden)\)") as caught:
            work()
        assert caught.value.filename == str(path)


def test_passing_errors_are_tried_again(server: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter([503, "drop"])
    server.fault = lambda method, path: next(faults, None)
    with monkeypatch.context() as patch:
        patch.setattr("random.random", lambda: 0.0)
        _path(server, "again.txt").write_text("x")
    assert next(faults, None) is None
    assert _path(server, "again.txt").read_text() == "x"
    calls = iter([TimeoutError, TimeoutError])

    def late() -> str:
        if error := next(calls, None):
            raise error
        return "in time"

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert storage.tried(_path(server, "x"), late) == "in time"


def test_a_growing_file_is_read_back_in_order(gcs: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_files, "_PART_BYTES", 100)
    path, lines = _path(gcs, "growing/metrics.jsonl"), [f'{{"line": {i}}}\n' for i in range(30)]
    for begin in (0, 15):  # two processes, one after the other
        log = files.growing(path, lambda error: pytest.fail(str(error)))
        for line in lines[begin : begin + 15]:
            log.write(line.encode())
            assert log.flush(10)
        log.close()
    assert bucket_files.read_log(path).decode() == "".join(lines)
    assert [record["line"] for record in files.read_lines(path)] == list(range(30))
    assert len(bucket_files.parts(path)) == 4
    bucket_files.remove_log(path)
    assert gcs.names("growing") == []


def test_writing_goes_on_while_the_bucket_cannot_be_written(
    server: Either, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_files, "_POLL", 0.01)
    monkeypatch.setattr(bucket_files, "_BOUND_BYTES", 1000)
    server.fault = lambda method, path: 403 if method in ("POST", "PUT") else None
    warned: list[Exception] = []
    log = bucket_files.Log(_path(server, "refused/log.txt"), warned.append)
    begin = time.monotonic()
    for i in range(30):
        log.write(f"{i:049d}\n".encode())
        assert not log.flush()
    assert not log.flush(0.2)
    assert time.monotonic() - begin < 5
    assert len(warned) == 1
    assert log.dropped == 500
    server.fault = lambda method, path: None
    assert log.flush(10)
    log.close()
    kept = bucket_files.read_log(_path(server, "refused/log.txt")).decode().split()
    assert [int(line) for line in kept] == list(range(10, 30))
    assert "500 bytes of it are lost" in str(warned[-1])


def test_what_is_refused_is_not_waited_for_at_the_end(gcs: Server) -> None:
    """No permission is no passing error."""
    gcs.fault = lambda method, path: 403 if method in ("POST", "PUT") else None
    warned: list[Exception] = []
    log = bucket_files.Log(_path(gcs, "refused/end.txt"), warned.append)
    log.write(b"one line\n")
    begin = time.monotonic()
    log.close(20)
    assert time.monotonic() - begin < 10
    assert [type(error) for error in warned] == [PermissionError, OSError]
    assert "9 bytes of it are lost" in str(warned[-1])


def test_one_of_two_gets_the_lease(server: Either) -> None:
    path = _path(server, "leases/.lock")
    taken: list[str] = []

    def hold() -> None:
        try:
            with bucket_files.lease(path):
                taken.append("held")
                done.wait(10)
        except bucket_files.Held as held:
            taken.append(str(held))
            done.set()

    done = threading.Event()
    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken[0] == "held"
    assert taken[1].startswith("process ")
    assert not path.exists()
    with (
        files.locked(path, "in use"),
        pytest.raises(UserError, match=r"process \d+ .* has it"),
        files.locked(path, "{who} has it"),
    ):
        pass


def test_a_lease_without_heartbeat_is_taken_over(
    server: Either, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A holder elsewhere is gone if its lease does not change; one that lives keeps it."""
    monkeypatch.setattr(bucket_files, "LEASE", 1.0)
    monkeypatch.setattr(bucket_files, "_POLL", 0.1)
    path = _path(server, "stale/.lock")
    about = {"owner": "x", "who": "process 7 on far", "process": 7, "machine": "far"}
    path.write_text(json.dumps(about))
    begin = time.monotonic()
    with bucket_files.lease(path):
        assert time.monotonic() - begin >= 1.0
        assert json.loads(path.read_bytes())["owner"] != "x"
    assert "process 7 on far; waiting up to 1 s" in capsys.readouterr().err
    path.write_text(json.dumps(about))
    renewed = json.dumps(about | {"renewed": 1})
    renewing = threading.Timer(0.3, lambda: path.write_text(renewed))
    renewing.start()
    with pytest.raises(bucket_files.Held, match="process 7 on far"), bucket_files.lease(path):
        pass
    renewing.join()


def test_a_holder_that_lost_its_lease_ends(
    server: Either, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bucket_files, "HEARTBEAT", 0.05)
    ended: list[int] = []
    monkeypatch.setattr("os._exit", lambda status: ended.append(status) or time.sleep(0.5))
    path = _path(server, "lost/.lock")
    with bucket_files.lease(path):
        first = json.loads(path.read_bytes())["renewed"]
        time.sleep(0.5)
        assert json.loads(path.read_bytes())["renewed"] > first  # its heartbeat
        assert not ended
        path.write_text(json.dumps({"owner": "y", "who": "process 8 on far"}))
        time.sleep(0.4)
    assert ended[0] == 75
    assert "now belongs to process 8 on far" in capsys.readouterr().err
    assert json.loads(path.read_bytes())["owner"] == "y"


def test_a_folder_becomes_valid_last(gcs: Server, tmp_path: pathlib.Path) -> None:
    with files.new_folder(_path(gcs, "made")) as part:
        (part / "deep").mkdir()
        for name in ("config.json", "weights", f"deep/{storage.COMMIT}", "deep/z"):
            (part / name).write_text(name)
    stored = gcs.buckets["bucket"]
    uploads = sorted(gcs.names("made/"), key=lambda name: stored[name].generation)
    assert set(uploads[:2]) == {"made/weights", "made/deep/z"}
    assert uploads[2:] == [f"made/deep/{storage.COMMIT}", "made/config.json"]
    with (
        pytest.raises(UserError, match="is not an empty folder"),
        files.new_folder(_path(gcs, "made")),
    ):
        pass
    with pytest.raises(ZeroDivisionError), files.new_folder(_path(gcs, "failed")):
        1 / 0  # noqa: B018
    assert gcs.names("failed") == []
    with storage.local(_path(gcs, "made")) as copy:
        assert (copy / "deep/z").read_text() == "deep/z"
        assert not storage.in_bucket(copy)
    with storage.local(tmp_path) as same:
        assert same == tmp_path


def test_what_a_library_is_told_is_no_damage() -> None:
    from gcsfs.retry import HttpError

    assert "cannot be reached" in storage.refused(HttpError({"code": 503, "message": "busy"}))
    assert "permission denied" in storage.refused(OSError("Forbidden: x\nno right"))
    assert storage.refused(FileNotFoundError(errno.ENOENT, "x")) == ""
    assert storage.refused(ValueError("x")) == storage.refused(io.UnsupportedOperation()) == ""
