"""A Google Cloud Storage server for the tests of this folder, and a run in its bucket."""

import pathlib
import signal
from collections.abc import Iterator

import pytest
from gcs_server import Server
from helpers import DRIVER, NUM_STEPS, run

from tlm_jax import storage


@pytest.fixture(scope="session")
def served() -> Iterator[Server]:
    """The server; this process and those that tests start find it."""
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
def bucket_run(served: Server, config_file: pathlib.Path) -> pathlib.Path:
    """A run in a bucket that was killed at step 13 and resumed from step 10, to its end."""
    folder = storage.path("gs://bucket/runs/killed")
    train = ("train", "--config", config_file, "--workdir", folder)
    saved = folder / "checkpoints" / str(NUM_STEPS // 2) / storage.COMMIT
    harm = ("--at-batch", NUM_STEPS // 2 + 4, "SIGKILL", "--when-exists", saved)
    result = run(DRIVER, *harm, *train)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert "runs/killed/.lock" in served.names("runs/killed")
    result = run(DRIVER, *train)
    assert result.returncode == 0, result.stderr
    assert f"Continuing from step {NUM_STEPS // 2} in {folder}." in result.stdout
    assert served.names("runs/killed/.lock") == []
    return folder
