"""What a checkpoint holds is what was saved, or it says so; a fault of the machine is no damage."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, environment

from tlm_jax import cli, files
from tlm_jax.config import (
    AttentionConfig,
    MeshConfig,
    MLPConfig,
    ModelConfig,
    OptimizerConfig,
    TaperConfig,
)
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.models import skeleton
from tlm_jax.training import checkpoint, step, updates
from tlm_jax.validation import UserError, lacks_resources, system_errors

pytestmark = [  # Orbax leaves coroutines and event loops behind where it fails
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]
METADATA: dict[str, Any] = {"config": {"seed": 3}}


class _Iterator:
    """Counts batches, as far as a checkpoint knows."""

    def __init__(self, place: int = 0) -> None:
        self.place = place

    def get_state(self) -> dict[str, Any]:
        return {"place": self.place}

    def set_state(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def _state(value: float) -> step.TrainState:
    zero = jnp.zeros((), jnp.int32)
    params = {"embedding": jnp.full((16, 8), float(value)), "scale": jnp.full((8,), float(value))}
    return step.TrainState(
        step=zero,
        params=params,
        opt_state=(jax.tree.map(jnp.zeros_like, params),),
        skipped=zero,
        skipped_in_a_row=zero,
        typical_norm=jnp.zeros(()),
    )


def _shapes(state: step.TrainState) -> step.TrainState:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    with checkpoint.Checkpoints(folder) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, _state(number), _Iterator(number), METADATA)
    return folder


def _restore(folder: pathlib.Path, number: int) -> tuple[step.TrainState, _Iterator]:
    iterator = _Iterator()
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(number, _shapes(_state(0)), iterator), iterator


def test_what_is_saved_is_loaded(saved: pathlib.Path) -> None:
    state, iterator = _restore(saved, 2)
    assert float(state.params["embedding"][3, 4]) == 2.0
    assert iterator.place == 2


def _other_arrays(saved: pathlib.Path) -> None:
    (saved / "2" / "state").rename(saved / "away")
    (saved / "1" / "state").rename(saved / "2" / "state")


def _other_config(saved: pathlib.Path) -> None:
    path = saved / "2" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))


def _other_position(saved: pathlib.Path) -> None:
    path = saved / "2" / "data" / "position.json"
    path.write_text(path.read_text().replace('"place": 2', '"place": 3'))


def _other_checksum(saved: pathlib.Path) -> None:
    path = saved / "2" / "checksums" / "checksums.json"
    path.write_text(path.read_text().replace("000", "001", 1))


def _no_checksums(saved: pathlib.Path) -> None:
    shutil.rmtree(saved / "2" / "checksums")


def _position_without_checksum(saved: pathlib.Path) -> None:
    (saved / "2" / "data" / "position.json").write_text('{"place": 3}')


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_arrays, "params/embedding does not match its checksum, nor do 1 other arrays"),
        (_other_config, "its metadata is damaged"),
        (_other_checksum, "its list of checksums is damaged"),
        (_no_checksums, "No such file or directory"),
        (_other_position, "the data's position is damaged"),
        (_position_without_checksum, "the checksum over the data's position is missing"),
    ],
)
def test_values_that_were_not_saved_are_damage(
    change: Callable[[pathlib.Path], None], named: str, saved: pathlib.Path
) -> None:
    """Files that are well-formed, and say something else than what was saved."""
    change(saved)
    with pytest.raises(checkpoint.DamagedCheckpointError) as error:
        _restore(saved, 2)
    assert named in str(error.value)


def test_the_identity_of_parameters_is_their_values(saved: pathlib.Path) -> None:
    with checkpoint.Checkpoints(saved) as checkpoints:
        checkpoints.save(3, _state(2), _Iterator(9), METADATA)
        checkpoints.wait()
        checkpoints.save_params(4, _state(2).params, METADATA)
        ids = [checkpoint.params_id(checkpoints.metadata(number)) for number in (1, 2, 3, 4)]
    assert None not in ids
    assert ids[0] != ids[1] == ids[2] == ids[3]
    assert checkpoint.params_id(METADATA) is None


def test_checkpoints_from_before_there_were_checksums(saved: pathlib.Path) -> None:
    """They load; a state of another kind is still refused, not taken for damage."""
    path = saved / "2" / "_CHECKPOINT_METADATA"
    record = json.loads(path.read_text())
    del record["custom_metadata"]["state_shapes"], record["custom_metadata"][files.CHECKSUM]
    path.write_text(json.dumps(record))
    shutil.rmtree(saved / "2" / "checksums")
    position = saved / "2" / "data" / "position.json"
    position.write_text('{"place": 2}')
    state, iterator = _restore(saved, 2)
    assert float(state.params["scale"][0]) == 2.0
    assert iterator.place == 2
    other = dataclasses.replace(_state(0), opt_state=())
    with checkpoint.Checkpoints(saved) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(2, _shapes(other), _Iterator())
    assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
    assert "opt_state/0/embedding: float32[16,8] -> absent" in str(error.value)


def test_another_optimizer_state_is_refused_and_nothing_is_damaged(tmp_path: pathlib.Path) -> None:
    """Update periods change the optimizer's state only: the parameters' shapes are the same."""
    mesh = mesh_lib.device_mesh(MeshConfig(data=1, fsdp=1))

    def states(periods: tuple[int, ...]) -> tuple[step.TrainState, Callable[[], step.TrainState]]:
        model = skeleton(
            ModelConfig(
                vocab_size=8,
                num_layers=1,
                d_model=8,
                mlp_width=16,
                taper=TaperConfig(schedule="uniform"),
                mixer=AttentionConfig(num_heads=1),
                mlp=MLPConfig(periods=periods),
            )
        )
        about = updates.About.of(model)
        tx = updates.make_optimizer(OptimizerConfig(), 10, about, MLPConfig(periods=periods))
        shapes = step.abstract_state(model, tx, mesh)
        init = jax.jit(lambda: step.init_state(model, tx, jax.random.key(0)))
        return shapes, init

    (_, init), (shapes, _) = states((1, 1)), states((1, 2))
    with jax.set_mesh(mesh), checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, init(), _Iterator(), METADATA)
        checkpoints.wait()
        with pytest.raises(UserError) as error:
            checkpoints.restore(1, shapes, _Iterator())
    assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
    assert "the state of step 1" in str(error.value)
    assert "does not fit this config: opt_state/1/" in str(error.value)


@contextlib.contextmanager
def _no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, limits[1]))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextlib.contextmanager
def _no_permission(folder: pathlib.Path) -> Iterator[None]:
    """Nobody may read the files of a checkpoint; root becomes somebody else."""
    user = os.geteuid()
    paths = [folder / "2", folder / "2" / "_CHECKPOINT_METADATA"]
    modes = [path.stat().st_mode for path in paths]
    for path in paths[::-1]:
        path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["metadata", "arrays"])
def test_a_lack_of_descriptors_is_no_damage(what: str, saved: pathlib.Path) -> None:
    with checkpoint.Checkpoints(saved) as checkpoints:
        shapes = _shapes(_state(0))
        everything = {"state": checkpoint._as_dict(shapes)}
        load = {
            "metadata": lambda: checkpoints.metadata(2),
            "arrays": lambda: checkpoints._load(2, {}, everything),
        }[what]
        with _no_descriptor_left(), pytest.raises(UserError) as error:
            load()
        assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
        assert lacks_resources(error.value)
        assert "Too many open files" in str(error.value)
        checkpoints.restore(2, shapes, _Iterator())


def test_files_that_may_not_be_read_are_no_damage(saved: pathlib.Path) -> None:
    with checkpoint.Checkpoints(saved) as checkpoints:
        shapes = _shapes(_state(0))
        with _no_permission(saved), pytest.raises(UserError) as error:
            checkpoints.restore(2, shapes, _Iterator())
        assert not isinstance(error.value, checkpoint.DamagedCheckpointError)
        assert system_errors(error.value) == {errno.EACCES}
        assert "Permission denied" in str(error.value)
        checkpoints.restore(2, shapes, _Iterator())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saves_leave_nothing_behind(tmp_path: pathlib.Path) -> None:
    """No descriptor and no thread more after each; a run of many saves would die of them."""

    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    seen = []
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=1) as checkpoints:
        for number in range(1, 9):
            checkpoints.save(number, _state(number), _Iterator(), METADATA)
            checkpoints.wait()
            seen.append(used())
    assert seen[-1] == seen[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_lack_of_descriptors_ends_with_the_status_to_run_again(
    config_file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _no_descriptor_left():
        assert cli.main(["plan", "--config", str(config_file)]) == 75
    assert "Too many open files" in capsys.readouterr().err


def test_processes_agree_on_what_is_wrong(tmp_path: pathlib.Path) -> None:
    """Only one of two processes reads the damaged file; neither waits for ever, both say so."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    script = ROOT / "tests" / "training" / "two_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), address, str(index), str(tmp_path / "checkpoints")],
            env=environment(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    said = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said.append([line for line in output.splitlines() if not line.startswith("[Gloo]")])
    elsewhere = "process 1 cannot read it, and says why"
    assert said[0] == [
        "whole",
        f"UserError, to run again: {elsewhere}",
        f"DamagedCheckpointError: {elsewhere}; use --step 1",
    ]
    assert said[1][:2] == ["whole", "UserError, to run again: Too many open files"]
    assert said[1][2].startswith("DamagedCheckpointError: ")
    assert elsewhere not in said[1][2]
