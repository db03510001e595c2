"""Servers of Google Cloud Storage and of S3 for the tests of this folder, and runs in buckets."""

import contextlib
import pathlib
import signal
from collections.abc import Iterator

import gcs_server
import pytest
import s3_server
from helpers import DRIVER, NUM_STEPS, run
from s3_server import Either

from tlm_jax import cli, storage


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs the tests of a kind of bucket, for they share its server and its run."""
    for item in items:
        if item.path.parent == pathlib.Path(__file__).parent and isinstance(item, pytest.Function):
            given = item.callspec.params if hasattr(item, "callspec") else {}
            kind = given.get("server") or ("s3" if "s3" in item.fixturenames else "gcs")
            item.add_marker(pytest.mark.xdist_group(kind))


@contextlib.contextmanager
def _serving(server: Either) -> Iterator[Either]:
    """This process and those that tests start find it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture(scope="session")
def served_gcs() -> Iterator[Either]:
    """A GCS server."""
    with _serving(gcs_server.Server("bucket", "other")) as server:
        yield server


@pytest.fixture(scope="session")
def served_s3() -> Iterator[Either]:
    """Moto's S3 server."""
    with _serving(s3_server.Server("bucket", "other")) as server:
        yield server


@pytest.fixture
def gcs(served_gcs: gcs_server.Server) -> Iterator[gcs_server.Server]:
    """The GCS server, without faults at the end."""
    yield served_gcs
    served_gcs.fault = lambda method, path: None


@pytest.fixture
def s3(served_s3: s3_server.Server) -> Iterator[s3_server.Server]:
    """The same of S3."""
    yield served_s3
    served_s3.fault = lambda method, path: None


@pytest.fixture(params=["gcs", "s3"])
def server(request: pytest.FixtureRequest) -> Either:
    """Each of the two."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def gs_run(
    served_gcs: Either,
    config_file: pathlib.Path,
    text_folder: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
    """A run on data in the bucket, killed at step 13 and resumed from step 10 to its end."""
    here = tmp_path_factory.mktemp("gs")
    return _killed_and_resumed(served_gcs, config_file, text_folder, here)


@pytest.fixture(scope="session")
def s3_run(
    served_s3: Either,
    config_file: pathlib.Path,
    text_folder: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> pathlib.Path:
    """The same on S3."""
    here = tmp_path_factory.mktemp("s3")
    return _killed_and_resumed(served_s3, config_file, text_folder, here)


@pytest.fixture
def bucket_run(request: pytest.FixtureRequest, server: Either) -> pathlib.Path:
    """The run on this server."""
    return request.getfixturevalue(f"{server.scheme}_run")


def _killed_and_resumed(
    server: Either, config_file: pathlib.Path, text_folder: pathlib.Path, here: pathlib.Path
) -> pathlib.Path:
    temporary = {"TMPDIR": str(here)}
    bucket = storage.path(f"{server.scheme}://bucket")
    folder, text, data = bucket / "runs/killed", bucket / "small/text", bucket / "small/data"
    storage.upload(text_folder, text)
    split = ("--tokenizer", "bytes", "--validation_fraction", "0.05")
    assert cli.main(["prepare", str(text), "--out", str(data), *split, "--processes", "1"]) == 0
    train = ("train", "--config", config_file, "--workdir", folder, "--data.path", data)
    saved = folder / "checkpoints" / str(NUM_STEPS // 2) / storage.COMMIT
    harm = ("--at-batch", NUM_STEPS // 2 + 4, "SIGKILL", "--when-exists", saved)
    result = run(DRIVER, *harm, *train, variables=temporary)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (folder / ".lock").exists()
    result = run(DRIVER, *train, variables=temporary)
    assert result.returncode == 0, result.stderr
    assert f"Continuing from step {NUM_STEPS // 2} in {folder}." in result.stdout
    assert not (folder / ".lock").exists()
    assert list(here.iterdir()) == []  # also what was killed has left nothing there
    return folder
