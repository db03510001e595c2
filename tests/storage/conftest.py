"""Servers of Google Cloud Storage and of S3 for the tests of this folder, and runs in buckets."""

import pathlib
import signal
from collections.abc import Iterator

import pytest
from gcs_server import Server
from helpers import DRIVER, NUM_STEPS, run

from tlm_jax import storage


@pytest.fixture(scope="session")
def served() -> Iterator[Server]:
    """A GCS server; this process and those that tests start find it."""
    server = Server("bucket", "other")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def gcs(served: Server) -> Iterator[Server]:
    """The server, without faults at the end."""
    yield served
    served.fault = lambda method, path: None


@pytest.fixture(scope="session")
def s3() -> Iterator[pathlib.Path]:
    """A bucket of moto's S3 server, which this process and those that tests start find."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket = storage.path("s3://bucket-3")
        storage.filesystem(bucket).mkdir("bucket-3")
        yield bucket
    server.stop()


@pytest.fixture(scope="session")
def gs_run(served: Server, config_file: pathlib.Path) -> pathlib.Path:
    """A run that was killed at step 13 and resumed from step 10, to its end."""
    return _killed_and_resumed(storage.path("gs://bucket/runs/killed"), config_file)


@pytest.fixture(scope="session")
def s3_run(s3: pathlib.Path, config_file: pathlib.Path) -> pathlib.Path:
    """The same on S3."""
    return _killed_and_resumed(s3 / "runs/killed", config_file)


@pytest.fixture
def bucket_run(request: pytest.FixtureRequest) -> pathlib.Path:
    """One of these, by its name as the parameter."""
    return request.getfixturevalue(request.param)


def _killed_and_resumed(folder: pathlib.Path, config_file: pathlib.Path) -> pathlib.Path:
    train = ("train", "--config", config_file, "--workdir", folder)
    saved = folder / "checkpoints" / str(NUM_STEPS // 2) / storage.COMMIT
    harm = ("--at-batch", NUM_STEPS // 2 + 4, "SIGKILL", "--when-exists", saved)
    result = run(DRIVER, *harm, *train)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (folder / ".lock").exists()
    result = run(DRIVER, *train)
    assert result.returncode == 0, result.stderr
    assert f"Continuing from step {NUM_STEPS // 2} in {folder}." in result.stdout
    assert not (folder / ".lock").exists()
    return folder
