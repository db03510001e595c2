"""Real processes: one killed and resumed, a coordinator that is not there, a folder in use."""

import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest
from helpers import DRIVER, ROOT, command, environment, only_error, run

from tlm_jax.config import UserError
from tlm_jax.distributed.agreement import differences
from tlm_jax.distributed.start import ProcessesConfig, expected


def test_a_killed_process_ends_the_job_which_resumes_exactly() -> None:
    """Two processes, one killed: the other ends with a message; the losses are those of one."""
    words = [sys.executable, "tests/faults/kills.py", "--kills", "1"]
    result = subprocess.run(
        words, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "survived 1/1" in result.stdout


def test_no_coordinator_is_one_line(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Nobody answers, within the time given."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    words = f"--processes.coordinator {address} --processes.count 2 --processes.index 1"
    train = ("train.py", "--config", config_file, "--workdir", tmp_path / "run", *words.split())
    begin = time.monotonic()
    result = run(*train, "--processes.timeout", 3)
    assert result.returncode == 1
    message = only_error(result.stderr)
    assert f"no coordinator answers at {address} within 3 s" in message
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--processes.join always", "cannot join the processes of this job: "),
        ("--processes.count 2", "count=2 and processes.index=None go together"),
        ("--processes.coordinator here", "here is not HOST:PORT"),
        ("--processes.count 2 --processes.index 2", "must be from 0 to 1"),
    ],
)
def test_wrong_processes_are_one_line(
    words: str, message: str, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    train = ("train.py", "--config", config_file, "--workdir", tmp_path / "run")
    result = run(*train, *words.split())
    assert result.returncode == 1
    assert message in only_error(result.stderr)


@pytest.mark.parametrize("differ", ["config", "data"])
def test_processes_that_differ_end_with_what_differs(
    differ: str, config_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Status 1 in both, soon, with one and the same line, and nothing is saved."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    words = (
        *("--workdir", tmp_path / "run", "--data.path", "text.txt"),
        *("--processes.coordinator", address, "--processes.count", 2, "--processes.index"),
    )
    other = ("--optimizer.learning_rate", 0.002, "--training.num_steps", 30)
    processes = []
    for index, more in enumerate(((), other if differ == "config" else ())):
        here = tmp_path / str(index)
        here.mkdir()
        text = "Another one.\n\n" if index and differ == "data" else "One text.\n\n"
        (here / "text.txt").write_text(text * 2000)
        processes.append(
            subprocess.Popen(
                command("train.py", "--config", config_file, *words, index, *more),
                cwd=here,
                env=environment() | {"JAX_PLATFORMS": "cpu"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], errors
    first, second = map(only_error, errors)
    assert first == second
    assert first.startswith("the processes of this job differ: ")
    if differ == "config":
        assert "optimizer.learning_rate: 0.004 on process 0, 0.002 on process 1; " in first
        assert "training.num_steps: 20 on process 0, 30 on process 1; " in first
    else:
        assert re.search(r"data, dataset: '\w+' on process 0, '\w+' on process 1; start", first)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_differs_between_processes_is_short() -> None:
    facts = [{"same": "1", "seed": "0"}, {"same": "1", "seed": "7"}, {"same": "1"}]
    assert differences(facts) == ["seed: 0 on process 0, 7 on process 1, absent on process 2"]
    assert differences([*facts[:2], *facts[1:2] * 2]) == [
        "seed: 0 on process 0, 7 on processes 1, 2 and 3"
    ]
    assert differences([facts[0]] * 4 + [facts[1]] * 9) == [
        "seed: 0 on processes 0, 1, 2 and 3, 7 on process 4 and 8 others"
    ]


def test_what_the_environment_says_of_other_processes() -> None:
    auto = ProcessesConfig()
    assert not expected(auto, {})
    assert not expected(auto, {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"})
    assert not expected(auto, {"TPU_WORKER_HOSTNAMES": "t1v-0"})
    assert expected(auto, {"SLURM_STEP_NUM_TASKS": "4"})
    assert expected(auto, {"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"})
    assert expected(auto, {"MEGASCALE_COORDINATOR_ADDRESS": "host:1"})
    assert expected(auto, {"JAX_COORDINATOR_ADDRESS": "host:1"})
    assert expected(ProcessesConfig(count=2, index=0), {})
    assert not expected(ProcessesConfig(join="never"), {"JAX_COORDINATOR_ADDRESS": "host:1"})


@pytest.mark.parametrize(
    "name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES"]
)
@pytest.mark.parametrize("value", ["many", "", "-1", "2(x3)", "1e3", "²"])
def test_counts_in_the_environment_that_are_none(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^the environment variable {name}=.* is not a number"):
        expected(ProcessesConfig(), {name: value})
    assert not expected(ProcessesConfig(join="never"), {name: value})


def test_a_folder_in_use_is_one_line(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Two runs on one folder: the second says who is there; the first goes on."""
    folder = tmp_path / "run"
    train = ("train", "--config", str(config_file), "--workdir", str(folder))
    slow = ("--pause-from-batch", "1")
    with subprocess.Popen(
        command(DRIVER, *slow, *train), env=environment(1), stdout=subprocess.DEVNULL
    ) as first:
        give_up = time.monotonic() + 90
        while not (folder / "metrics.jsonl").exists():
            assert first.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.1)
        result = run("train.py", *train[1:])
        first.kill()
    assert result.returncode == 1
    assert f"{folder} is in use: process {first.pid} on {socket.gethostname()}" in only_error(
        result.stderr
    )


def test_a_hung_step_ends_the_process(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Status 75, a message with the step, and where each thread is."""
    folder = tmp_path / "run"
    train = ("train", "--config", config_file, "--workdir", folder)
    result = run(
        DRIVER, "--pause-from-batch", 3, "--pause", 60, *train, "--training.hang_timeout", 2
    )
    assert result.returncode == 75
    assert "error: no progress for " in result.stderr
    assert "while waiting for step 2 (training.hang_timeout=2)" in result.stderr
    assert "to_devices" in result.stderr
