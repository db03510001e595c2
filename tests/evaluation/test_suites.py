"""Suites through lm-eval, offline, by the command line: tables, resuming, mistakes."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import rows
from helpers import Fails, command, environment, run

from tlm_jax import cli, files
from tlm_jax.config import UserError
from tlm_jax.evaluation import suites
from tlm_jax.evaluation.journal import Journal
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


def record(folder: pathlib.Path, name: str = "paper-20*") -> dict[str, Any]:
    (file,) = (folder / "eval").glob(f"{name}.json")
    return files.read_json(file)


def metrics(folder: pathlib.Path, name: str = "paper-20*") -> dict[tuple[str, str], float]:
    return {(m["task"], m["name"]): m["value"] for m in record(folder, name)["metrics"]}


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
    accuracies = [v for (t, n), v in expected.items() if (t, n) in PAPER_METRICS and "acc" in n]
    found = record(folder)
    assert found["average"] == pytest.approx(np.mean(accuracies))
    assert found["config"]["model"]["num_layers"] == 4
    assert found["versions"]["lm_eval"]

    # The samples say what was asked, and of which document.
    (file,) = (folder / "eval").glob("paper-20*.samples.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert {s["task"] for s in samples} == set(suites.SUITES["paper"])
    (first,) = [s for s in samples if s["task"] == "piqa" and s["doc_id"] == 0]
    assert first["doc"]["goal"] == "What is layer two?"
    assert first["arguments"] == [
        ["Question: What is layer two?\nAnswer:", f" {choice}"] for choice in ("wide", "width")
    ]

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
    names = sorted(file.name for file in (folder / "eval").glob("*.json"))
    assert [name.partition("-data")[0] for name in names] == ["lambada+piqa-10", "lambada+piqa-20"]
    assert cli.main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "step 10" in out
    assert "step 20" in out
    for task, name in (("lambada_openai", "perplexity"), ("piqa", "acc_norm")):
        assert any(task in line and name in line and "±" in line for line in out.splitlines())


def test_what_is_cut_is_noticed(
    folder: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for requests that lose their beginning, and one for texts in pieces."""
    words = ["eval", "--checkpoint", str(folder), "--data_dir", str(data_dir)]
    words += ["--max_length", "16", "--limit", "2"]
    assert cli.main([*words, "--tasks", "lambada", "wikitext"]) == 0
    notes = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert notes == [
        "note: 2 of 2 requests are longer than the 16 tokens that the model reads, and lose their "
        "beginning",
        "note: 2 of 2 texts are longer than the 16 tokens that the model reads, and are scored in "
        "pieces",
    ]


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


def test_a_quick_look_replaces_no_full_evaluation(
    folder: pathlib.Path, data_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Limit and data stand in the names and the table; a path more is no column more."""
    tasks = ("eval", "--checkpoint", str(folder), "--tasks", "boolq", "--data_dir")
    assert cli.main([*tasks, str(data_dir)]) == 0
    whole = {file: file.read_bytes() for file in (folder / "eval").glob("*.json")}
    other = shutil.copytree(data_dir, data_dir.with_name("other"))
    boolq = other / "boolq" / "validation.jsonl"
    boolq.write_text(boolq.read_text().replace("early", "late"))
    assert cli.main([*tasks, str(data_dir), "--limit", "1"]) == 0
    assert cli.main([*tasks, str(other)]) == 0
    assert {file: file.read_bytes() for file in whole} == whole
    names = sorted(file.name.split("-data")[0] for file in (folder / "eval").glob("*.json"))
    assert names == ["boolq-20", "boolq-20", "boolq-20-limit1"]
    link = folder.with_name("link")
    link.symlink_to(folder)
    (before,) = whole
    known = json.loads(before.read_text())["conditions"]
    assert known["data"].keys() == {"boolq"}
    assert known["max_length"] == known["trained_length"] == 64
    assert known["precision"] == "float32"
    capsys.readouterr()
    assert cli.main(["report", "--markdown", str(folder), str(link)]) == 0
    out = capsys.readouterr().out
    (limits,) = [line for line in out.splitlines() if "| limit |" in line]
    assert sorted(limits.strip("| ").split(" | ")[2:]) == ["1", "all", "all"]
    (apart,) = [line for line in out.splitlines() if "measured alike" in line]
    assert "limit: " in apart
    assert "data: " in apart
    assert "**" not in out


def test_needles_longer_than_the_training(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengths are those asked for; the table has the trained length beside them."""
    few = ["--needle.num_depths", "1", "--needle.samples", "1", "--needle.lengths", "1100"]
    few += ["--mesh.data", "1"]  # else each of the eight devices does everything
    variants = ["--needle.variants", "niah_single_1", "niah_multiquery"]
    assert cli.main(["eval", "--checkpoint", str(folder), "--tasks", "niah", *few, *variants]) == 0
    capsys.readouterr()
    assert cli.main(["report", "--markdown", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| setting | trained length | 64 |" in lines
    cells = [line.split(" | ")[:2] for line in lines]
    for variant in ("niah_single_1", "niah_multiquery"):
        assert [f"| {variant}", "acc@1100"] in cells
    assert list((folder / "eval").glob("niah-20-needles*.png"))


def test_a_model_imported_anew_is_asked_anew(
    finished_run: pathlib.Path,
    data_dir: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers that another model of equal step and shapes left in the folder are not used."""
    model, kept = tmp_path / "model", tmp_path / "kept"
    answers = model / "eval" / "lambada-0.answers.jsonl"
    words = ["eval", "--checkpoint", str(model), "--tasks", "lambada", "--data_dir", str(data_dir)]
    for step in ("10", "20"):
        exported = tmp_path / f"exported-{step}"
        export = ["--checkpoint", str(finished_run), "--step", step, "--out", str(exported)]
        assert cli.main(["export", *export]) == 0
        shutil.rmtree(model, ignore_errors=True)
        assert cli.main(["import", "--model", str(exported), "--out", str(model)]) == 0
        if step == "10":
            with monkeypatch.context() as patch:  # as a kill would leave it
                patch.setattr(Journal, "close", lambda _: shutil.copy(answers, kept))
                assert cli.main(words) == 0
    answers.parent.mkdir()
    kept.rename(answers)
    assert cli.main(words) == 0
    found = metrics(model, "lambada-0*")
    assert cli.main(words) == 0
    assert metrics(model, "lambada-0*") == found


def test_a_second_evaluation_is_refused_at_its_start(
    folder: pathlib.Path, data_dir: pathlib.Path, fails: Fails
) -> None:
    """Not at its end, when the first one has taken the answers away."""
    words = ("eval", "--checkpoint", folder, "--tasks", "lambada", "--data_dir", data_dir)
    (folder / "eval").mkdir()
    with files.locked(folder / "eval" / ".lambada-20.lock", "in use"):
        message = fails(*words)
    assert message.startswith(f"{folder} is in use: process ")
    assert "evaluates the same tasks there (lambada-20); wait for it" in message
    assert not list((folder / "eval").glob("*.json*"))


def _set(column: str, value: object, row: int = 1) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[row].__setitem__(column, value)


def _without(column: str, first: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: [row.pop(column) for row in rows[first:]] and None


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("piqa", _without("sol1"), "piqa has no column 'sol1'"),
        ("piqa", _without("label"), "piqa has no column 'label'"),
        ("piqa", _without("sol1", 1), "validation.jsonl, line 2: it has no column 'sol1', which"),
        ("piqa", _set("label", 7), "piqa, document 2: its label is 7, which is none of its 2"),
        ("piqa", _set("label", -1), "piqa, document 2: its label is -1, which is none of its 2"),
        ("piqa", _set("label", None), "piqa, document 2: its label is None, which is none of"),
        ("piqa", _set("label", "x"), "piqa does not hold the rows of piqa (ArrowInvalid: "),
        ("hellaswag", _without("endings"), "does not hold the rows of hellaswag (KeyError: 'endi"),
        ("winogrande", _set("answer", "3"), "winogrande, document 2: it cannot be asked (KeyError"),
        ("wikitext", _without("page"), "does not hold the rows of wikitext"),
    ],
)
def test_rows_that_do_not_fit_a_task(
    task: str,
    change: Callable[[list[dict[str, Any]]], None],
    said: str,
    data_dir: pathlib.Path,
) -> None:
    """A missing column or label is an error, not a stack trace or a wrong answer of the model."""
    (file,) = (data_dir / task).glob("*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    change(found)
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    with pytest.raises(UserError, match=re.escape(said)):
        suites.load_tasks([task], data_dir)


def test_mistakes_are_one_line(folder: pathlib.Path, data_dir: pathlib.Path, fails: Fails) -> None:
    """Unknown tasks, missing and broken files, numbers that mean nothing."""
    base = ("eval", "--checkpoint", folder, "--data_dir", data_dir, "--tasks")
    assert "limit is 0; it must be at least 1, or None" in fails(*base, "piqa", "--limit", "0")
    assert "it is -3" in fails(*base, "piqa", "--limit", "-3")
    unknown = fails(*base, "lambda")
    assert unknown.startswith("unknown task or suite 'lambda'; did you mean lambada, ")
    assert "has no SPLIT.jsonl" in fails(*base, "openbookqa")
    (data_dir / "piqa" / "validation.jsonl").write_text('{"goal": "x"}\n{"goal"\n')
    assert "validation.jsonl, line 2: not JSON" in fails(*base, "piqa")
    (data_dir / "boolq" / "validation.jsonl").write_text("[1]\n")
    assert "line 1: not an object" in fails(*base, "boolq")
    (data_dir / "piqa" / "validation.jsonl").rename(data_dir / "piqa" / "train.jsonl")
    (data_dir / "piqa" / "train.jsonl").write_text('{"goal": "x"}\n')
    assert "neither the test nor the validation split of piqa" in fails(*base, "piqa")
    nowhere = ("eval", "--checkpoint", folder, "--tasks", "piqa", "--data_dir", data_dir / "no")
    assert "is not a folder" in fails(*nowhere)
    assert "has no results" in fails("report", folder)
    short = ("eval", "--checkpoint", folder, "--tasks", "niah")
    assert "does not fit into 64 tokens" in fails(*short)


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
