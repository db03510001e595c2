"""The lines of metrics.jsonl: what they count, and damage to them."""

import importlib
import io
import json
import pathlib
import sys

import jax.numpy as jnp
import pytest
from rich.console import Console

from tlm_jax import files
from tlm_jax.analysis import plots
from tlm_jax.config import RunConfig
from tlm_jax.training import metrics

VALUES = {"loss": 3.25, "tokens": 512, "learning_rate": 4e-4}


@pytest.fixture
def log(tmp_path: pathlib.Path) -> pathlib.Path:
    """Three lines."""
    writer = metrics.MetricsWriter(tmp_path, Console(quiet=True))
    for step in (10, 20, 30):
        writer.write("train", step, VALUES | {"loss": 40 / step})
    writer.close()
    return tmp_path / metrics.METRICS_FILE


def test_no_flipped_bit_changes_a_figure(
    log: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line is left out and named, unless what is damaged is only the word `checksum`."""
    whole = log.read_bytes()
    expected = plots.series(log, "train")
    assert [(r["step"], r["loss"]) for r in expected] == [(s, 40 / s) for s in (10, 20, 30)]
    unnamed = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        log.write_bytes(damaged)
        read = plots.series(log, "train")
        found = [{k: r[k] for k in r if k in expected[0]} for r in read]
        assert all(record in expected for record in found), place
        if len(found) < 3:
            files._note.cache_clear()
            plots.series(log, "train")
            said = capsys.readouterr().err
            assert f"note: {log}, line" in said, place
            assert "damaged and left out" in said
        else:
            unnamed += 1
    assert unnamed <= 3 * len("checksum") + 1


def test_a_damaged_line_is_no_figure(log: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In curves and in what a run says of itself; old lines and torn ones are as ever."""
    lines = log.read_text().splitlines(keepends=True)
    old = '{"kind": "train", "step": 5, "loss": 9.0}\n'
    torn = '{"kind": "train", "step": 6, "lo\n'
    wrong = lines[2].replace("1.33", "1.32")
    bad = lines[1].encode().replace(b"train", b"tr\xffin")
    log.write_bytes("".join([old, torn, lines[0]]).encode() + bad + wrong.encode() + b'{"ki')
    series = plots.series(log, "train")
    assert [(row["step"], row["loss"]) for row in series] == [(5, 9.0), (10, 4.0)]
    assert capsys.readouterr().err == f"note: {log}, lines 4, 5 are damaged and left out\n"
    newest = metrics.last_record(log.parent, "train")
    assert newest is not None
    assert newest["step"] == 10
    plots.plot_curves(log, log.parent / "curves.png")
    assert capsys.readouterr().err == ""


def test_tokens_count_the_targets_of_the_run(tmp_path: pathlib.Path) -> None:
    """Not positions: a batch can hold padding. A run that continues counts on."""
    writer = metrics.MetricsWriter(tmp_path, Console(quiet=True))
    quiet = Console(quiet=True)
    log = metrics.TrainLog(RunConfig(), tmp_path, writer, quiet, 9, 1000, 0.0, enabled=False)
    for step, tokens in ((10, 300), (11, 17), (20, 8)):
        log.push(
            step,
            {
                "loss": jnp.ones(()),
                "tokens": jnp.asarray(tokens),
                "learning_rate": jnp.asarray(0.5),
                "skipped_in_a_row": jnp.asarray(0),
            },
        )
    log.flush()
    writer.close()
    logged = [(r["step"], r["tokens"]) for r in metrics.records(tmp_path)]
    assert logged == [(10, 1300), (20, 1325)]
    assert log.tokens == 1325


def test_what_is_not_used_is_not_imported() -> None:
    """tensorboardX would import PyTorch where it is installed, which takes seconds."""
    with metrics._unused("tabnanny", "json"), pytest.raises(ImportError):  # json is there already
        importlib.import_module("tabnanny")
    assert importlib.import_module("tabnanny")
    assert sys.modules["json"] is json


def test_a_log_line_has_no_control_characters_and_counts_hours() -> None:
    file = io.StringIO()
    progress = metrics.TrainProgress(Console(file=file, width=200), 0, 57_200, enabled=True)
    progress.show(100, {"loss": 3.0, "tokens_per_second": 1e6, "mfu": 0.4}, 30 * 3600 + 61)
    progress.close()
    assert file.getvalue().strip() == (
        "step    100/57200  loss 3.000  1,000,000 tok/s  MFU 40%  left 1 day, 6:01:01"
    )
