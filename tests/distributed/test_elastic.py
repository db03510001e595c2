"""A checkpoint of one mesh, or number of processes, continues on another."""

import itertools
import json
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import gcs_server
import numpy as np
import pytest
import shared_reading
from helpers import ROOT, environment, run

from tlm_jax import cli, storage
from tlm_jax.data import open_dataset
from tlm_jax.training import verification

CONFIG = """
from tlm_jax import config as c


def get_config():
    return c.RunConfig(
        model=c.ModelConfig(
            vocab_size=264,
            num_layers=3,
            d_model=32,
            mlp_width=64,
            taper=c.TaperConfig(schedule="explicit", widths=(80, 80, 32)),
            mixer=c.AttentionConfig(num_heads=4),
        ),
        data=c.DataConfig(path={text!r}, tokenizer="bytes", seq_len=64, batch_size=8),
        optimizer=c.OptimizerConfig(warmup_steps=2),
        training=c.TrainingConfig(
            num_steps=12,
            log_every=1,
            eval_every=0,
            eval_batches=1,
            checkpoint_every=6,
            sample_tokens=0,
        ),
    )
"""
BEFORE, END = 6, 12


def losses(folder: pathlib.Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"}


def test_eight_devices_then_four_or_one(text_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """fsdp=8 goes on as fsdp=2 x tensor=2 and on one device, with the losses it would have had."""
    config, straight = tmp_path / "config.py", tmp_path / "straight"
    config.write_text(CONFIG.format(text=str(text_folder)))

    def train(folder: pathlib.Path, devices: int, *mesh: object) -> str:
        result = run("train.py", "--config", config, "--workdir", folder, *mesh, devices=devices)
        assert result.returncode == 0, result.stderr
        return result.stdout

    eight = ("--config", config, "--workdir", straight, "--mesh.data", 1, "--mesh.fsdp", 8)
    assert cli.main(["train", *map(str, eight)]) == 0  # this process has as many
    expected = losses(straight)
    shutil.rmtree(straight / "checkpoints" / str(END))
    (straight / "metrics.jsonl").unlink()
    for devices, mesh in ((4, ("--mesh.data", 1, "--mesh.fsdp", 2, "--mesh.tensor", 2)), (1, ())):
        moved = shutil.copytree(straight, tmp_path / str(devices))
        assert f"Continuing from step {BEFORE}" in train(moved, devices, *mesh)
        assert losses(moved) == pytest.approx(
            {step: loss for step, loss in expected.items() if step > BEFORE}, abs=1e-5
        )


def _read(number: int, folder: pathlib.Path, text: pathlib.Path) -> list[Any]:
    """What each of several real processes prints (see shared_reading.py)."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    script = ROOT / "tests" / "distributed" / "shared_reading.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), address, *map(str, (number, index, folder, text))],
            env=environment(4 // number),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(number)
    ]
    try:
        answers = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * number, [errors for _, errors in answers]
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """On a server that the processes which a test starts find too."""
    server = gcs_server.Server("bucket")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield storage.path("gs://bucket")
    server.close()


def test_four_processes_then_two_then_one_read_the_same_batches(
    text_folder: pathlib.Path, bucket: pathlib.Path
) -> None:
    """Real ones, each on two meshes; they run the readers of their rows, and save where all are.

    They save in a bucket, each its part of the arrays.
    """
    data = shared_reading.config(str(text_folder)).data
    expected = [
        batch["targets"] for batch in itertools.islice(open_dataset(data, 257).train_iterator(), 15)
    ]
    place = 0

    def check(answers: list[Any], readers: list[list[int]]) -> None:
        nonlocal place
        assert [mine for mine, _ in answers] == readers
        for batch in range(shared_reading.BATCHES):
            rows = {int(k): v for _, found in answers for k, v in found[batch].items()}
            got = np.concatenate([rows[first] for first in sorted(rows)])
            np.testing.assert_array_equal(got, expected[place])
            place += 1

    folder = bucket / "run" / "checkpoints"
    answers = _read(4, folder, text_folder)
    check([a[0] for a in answers], [[0], [1], [2], [3]])
    check([a[1] for a in answers], [[0, 1], [0, 1], [2, 3], [2, 3]])
    assert {a[2][0] for a in answers} == {
        "data.readers=2 does not divide over 4 processes: up to 2 of the 8 rows of a batch are "
        "read by processes that do not need them. A new run with data.readers=4 would avoid this."
    }
    answers = _read(2, folder, text_folder)
    assert all(a[2] == [] for a in answers)
    check([a[0] for a in answers], [[0, 1], [2, 3]])
    check([a[1] for a in answers], [[0, 1], [2, 3]])
    mesh = shared_reading.meshes(str(text_folder))[0]
    check([shared_reading.read(str(text_folder), folder, mesh)], [[0, 1, 2, 3]])
    assert place == len(expected)

    found = list(verification.verify(folder.parent, None))
    assert [finding.verdict for finding in found] == ["whole", "whole"]
    (folder / "15" / "data" / "position-00002.json").unlink()
    damaged = next(verification.verify(folder.parent, 15))
    assert damaged.verdict == "damaged"
    assert damaged.detail.startswith("position-00002.json: ")
