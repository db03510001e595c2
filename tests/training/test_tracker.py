"""Experiment trackers with W&B's interface, well-behaved and not."""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import Fails
from rich.console import Console

from tlm_jax import cli
from tlm_jax.config import RunConfig
from tlm_jax.training import metrics, tracker

STAND_IN = """
import json, pathlib, time
calls = pathlib.Path({calls!r})
def _note(**call):
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\\n")
def init(**arguments):
    {init}
    _note(init=arguments)
def log(values, step):
    {log}
    _note(step=step, values=values)
def finish():
    {finish}
    _note(finish=True)
"""
HANG, FAIL = "time.sleep(3600)", "raise RuntimeError('no quota left')"


@pytest.fixture
def stand_in(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., pathlib.Path]]:
    """Makes a module `trackio` that notes its calls; returns where."""
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    (tmp_path / "modules").mkdir()

    def make(init: str = "pass", log: str = "pass", finish: str = "pass") -> pathlib.Path:
        calls = tmp_path / "calls"
        text = STAND_IN.format(calls=str(calls), init=init, log=log, finish=finish)
        (tmp_path / "modules" / "trackio.py").write_text(text)
        return calls

    yield make
    sys.modules.pop("trackio", None)


def _calls(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_tells_its_tracker_everything(
    stand_in, train: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    """The config, then every record of metrics.jsonl in order, then the end."""
    calls = stand_in()
    words = [f"--training.{name}" for name in ("num_steps=2", "log_every=1", "sample_tokens=0")]
    words += ["--training.tracker=trackio", "--model.num_layers=1", "--training.eval_batches=1"]
    assert cli.main([*train, *words, "--model.taper.schedule=uniform"]) == 0
    first, *logged, last = _calls(calls)
    assert first["init"]["project"] == "tlm-jax"
    assert first["init"]["config"]["training"]["num_steps"] == 2
    assert last == {"finish": True}
    expected = []
    for record in metrics.records(tmp_path / "run"):
        kind, step = record.pop("kind"), record.pop("step")
        record.pop("checksum", None)
        expected.append({"step": step, "values": {f"{kind}/{k}": v for k, v in record.items()}})
    assert logged == expected
    assert len(expected) >= 3


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"init": FAIL}, "cannot begin, and logs nothing: RuntimeError('no quota left')"),
        ({"init": "raise SystemExit(3)"}, "cannot begin, and logs nothing: SystemExit(3)"),
        ({"log": FAIL}, "cannot log step 0: RuntimeError('no quota left')"),
        ({"finish": FAIL}, "cannot finish: RuntimeError('no quota left')"),
        ({"init": HANG}, "has not finished after 0.3 s and is left behind"),
        ({"log": HANG}, "has not finished after 0.3 s and is left behind"),
        ({"finish": HANG}, "has not finished after 0.3 s and is left behind"),
        ({"log": "time.sleep(0.02)"}, "was too slow: "),
    ],
)
def test_a_bad_tracker_neither_stops_nor_delays(
    faults: dict[str, str], message: str, stand_in, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every record is in metrics.jsonl at once; one line says what is wrong."""
    stand_in(**faults)
    slow = "slow" in message
    monkeypatch.setattr(tracker, "_FINISH_SECONDS", 20.0 if slow else 0.3)
    monkeypatch.setattr(tracker, "_MOST_WAITING", 20)
    with (tmp_path / "said").open("w") as file:
        console = Console(file=file, width=200)
        watched = tracker.Tracker("trackio", RunConfig(), console)
        writer = metrics.MetricsWriter(tmp_path, console, tracker=watched)
        began = time.monotonic()
        for step in range(100):
            writer.write("train", step, {"loss": 1.0})
        assert time.monotonic() - began < 2
        writer.close()
        assert slow or time.monotonic() - began < 3
    assert [record["step"] for record in metrics.records(tmp_path)] == list(range(100))
    (said,) = (tmp_path / "said").read_text().splitlines()
    assert said.startswith(f"tracker trackio {message}")


def test_a_missing_package_is_named(
    train: tuple[str, ...], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained."""
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    assert fails(*train, "--training.tracker", "wandb") == (
        "training.tracker=wandb needs the package wandb; install it with: pip install wandb"
    )
