"""Suites through lm-eval, offline, by the command line: tables, resuming, mistakes."""

import json
import pathlib
import shutil
import signal
import subprocess
import time
from typing import Any, cast

import numpy as np
import pytest
import rows
from helpers import command, environment, run

from tlm_jax import cli
from tlm_jax.config import UserError
from tlm_jax.evaluation import suites
from tlm_jax.evaluation.suites import Metric

pytest.importorskip("lm_eval", reason="lm-eval is in the extra eval")

PAPER_METRICS = {(task, name) for task, names in suites.COLUMNS.items() for name in names}


@pytest.fixture
def data_dir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A few rows of each task."""
    return rows.write(tmp_path / "rows")


@pytest.fixture
def folder(tmp_path: pathlib.Path, finished_run: pathlib.Path) -> pathlib.Path:
    """A run folder of one's own."""
    return pathlib.Path(shutil.copytree(finished_run, tmp_path / "finished"))


def metrics(folder: pathlib.Path, name: str = "paper-20") -> dict[tuple[str, str], float]:
    found = json.loads((folder / "eval" / f"{name}.json").read_text())["metrics"]
    return {(m["task"], m["name"]): m["value"] for m in found}


def test_all_columns_offline_and_resumed_after_a_kill(
    folder: pathlib.Path, data_dir: pathlib.Path, finished_run: pathlib.Path
) -> None:
    """The nine tasks; a run that is killed gives the same table when it goes on."""
    words = ("--tasks", "paper", "--data_dir", data_dir, "--log_samples")
    whole = run("eval.py", "--checkpoint", folder, *words)
    assert whole.returncode == 0, whole.stderr
    expected = metrics(folder)
    assert expected.keys() >= PAPER_METRICS
    assert not list((folder / "eval").glob("*.answers.jsonl"))
    assert "scored" in whole.stderr
    record = json.loads((folder / "eval" / "paper-20.json").read_text())
    accuracies = [v for (t, n), v in expected.items() if (t, n) in PAPER_METRICS and "acc" in n]
    assert record["average"] == pytest.approx(np.mean(accuracies))
    assert record["config"]["model"]["num_layers"] == 4
    assert record["versions"]["lm_eval"]

    # The log-likelihoods of the samples are those of the model.
    lines = (folder / "eval" / "paper-20.samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert {s["task"] for s in samples} == set(suites.SUITES["paper"])

    # Killed after some answers are on disk, and begun again.
    again = folder.with_name("again")
    shutil.copytree(finished_run, again)
    process = subprocess.Popen(
        command("eval.py", "--checkpoint", again, *words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    answers = again / "eval" / "paper-20.answers.jsonl"
    deadline = time.monotonic() + 200
    while not (answers.is_file() and answers.stat().st_size > 2000):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if answers.is_file():  # it may have come to its end just before
        resumed = run("eval.py", "--checkpoint", again, *words)
        assert resumed.returncode == 0, resumed.stderr
        assert whole.stderr.startswith("scored 0 of")
        assert not resumed.stderr.startswith("scored 0 of")
    assert metrics(again) == expected


def test_report_puts_checkpoints_side_by_side(
    folder: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of a run in one table, the better one marked; standard errors."""
    for step in (10, 20):
        how = ["--step", str(step), "--tasks", "lambada", "piqa", "--data_dir", str(data_dir)]
        assert cli.main(["eval", "--checkpoint", str(folder), *how]) == 0
    capsys.readouterr()
    files = sorted((folder / "eval").glob("*.json"))
    assert [f.name for f in files] == ["lambada+piqa-10.json", "lambada+piqa-20.json"]
    assert cli.main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "step 10" in out
    assert "step 20" in out
    for task, name in (("lambada_openai", "perplexity"), ("piqa", "acc_norm")):
        assert any(task in line and name in line and "±" in line for line in out.splitlines())


def test_average_is_the_plain_mean_of_eight() -> None:
    """LAMBADA's accuracy counts, perplexities do not; one missing gives none."""
    values = {key: (i + 1) / 100 for i, key in enumerate(sorted(PAPER_METRICS))}
    some = [
        Metric(task=t, name=n, value=v, standard_error=None, rows=1) for (t, n), v in values.items()
    ]
    accuracies = [v for (_, n), v in values.items() if n.startswith("acc")]
    assert len(accuracies) == 8
    assert suites.average(some) == pytest.approx(sum(accuracies) / 8)
    assert suites.average(some[1:]) is None


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line.removeprefix("error: ")


def test_mistakes_are_one_line(
    folder: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown tasks, missing and broken files."""
    base = ("eval", "--checkpoint", folder, "--data_dir", data_dir, "--tasks")
    unknown = fails(capsys, *base, "lambda")
    assert unknown.startswith("unknown task or suite 'lambda'; did you mean lambada, ")
    assert "has no SPLIT.jsonl" in fails(capsys, *base, "openbookqa")
    (data_dir / "piqa" / "validation.jsonl").write_text('{"goal": "x"}\n{"goal"\n')
    assert "validation.jsonl, line 2: not JSON" in fails(capsys, *base, "piqa")
    (data_dir / "boolq" / "validation.jsonl").write_text("[1]\n")
    assert "line 1: not an object" in fails(capsys, *base, "boolq")
    (data_dir / "piqa" / "validation.jsonl").rename(data_dir / "piqa" / "train.jsonl")
    (data_dir / "piqa" / "train.jsonl").write_text('{"goal": "x"}\n')
    assert "neither the test nor the validation split of piqa" in fails(capsys, *base, "piqa")
    nowhere = ("eval", "--checkpoint", folder, "--tasks", "piqa", "--data_dir", data_dir / "no")
    assert "is not a folder" in fails(capsys, *nowhere)
    assert "has no results" in fails(capsys, "report", folder)
    short = ("eval", "--checkpoint", folder, "--tasks", "niah")
    assert "does not fit into 64 tokens" in fails(capsys, *short)


def test_suites_while_training(
    folder: pathlib.Path, data_dir: pathlib.Path, config_file: pathlib.Path
) -> None:
    """Figures of a suite are logged like losses, at their steps and at the end.

    Step 20, which the run continues from, is one of them and lacks them.
    """
    words = ["--training.suites", "lambada", "piqa", "--training.suites_data_dir", str(data_dir)]
    words += ["--training.suites_every", "2", "--training.suites_limit", "2"]
    train = ["train", "--config", str(config_file), "--workdir", str(folder)]
    assert cli.main([*train, "--training.num_steps", "23", *words]) == 0
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if line["kind"] == "suites"]
    assert [line["step"] for line in logged] == [20, 22, 23]
    assert logged[0].keys() >= {"lambada_openai/perplexity", "piqa/acc", "piqa/acc_norm"}
    assert logged[1]["lambada_openai/perplexity"] != logged[2]["lambada_openai/perplexity"]


def test_tasks_that_draw_at_random_are_refused() -> None:
    """They would be answered greedily without a word."""
    from lm_eval.api.instance import Instance

    from tlm_jax.data import load_tokenizer
    from tlm_jax.evaluation.harness import HarnessModel
    from tlm_jax.evaluation.journal import Journal

    model: Any = HarnessModel(
        cast(Any, None),
        cast(Any, None),
        load_tokenizer(None),
        prefix=(),
        journal=Journal(None, {}),
        advance=lambda *_: None,
    )
    how = {"until": ["."], "do_sample": True, "temperature": 0.7}
    request = Instance("generate_until", {}, ("The", how), 0, ("poems", 0, 1))
    with pytest.raises(UserError, match=r"task poems draws its texts at random"):
        model.generate_until([request])
