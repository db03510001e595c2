"""`tlm report`: what was measured alike stands together; what was not, apart, and says so."""

import pathlib
import random
from typing import Any

import pytest
from helpers import ROOT, Fails

from tlm_jax import cli, files
from tlm_jax.config import UserError
from tlm_jax.evaluation import result_files, suites
from tlm_jax.evaluation.options import NeedleConfig, SuiteConfig

FULL = {"limit": None, "num_fewshot": None, "max_length": None}
CONDITIONS = {
    "params_id": "a",
    "max_length": 1024,
    "trained_length": 1024,
    "precision": "float32",
    "tokenizer": "t" * 16,
}
ACCURACIES = [(t, n) for t, names in suites.COLUMNS.items() for n in names if "acc" in n]


def write(
    path: pathlib.Path,
    values: dict[tuple[str, str], tuple[float, int]],
    *,
    name: str = "runs/a",
    settings: dict[str, Any] | None = None,
    conditions: dict[str, Any] | None = None,
    data: str = "d" * 16,
) -> pathlib.Path:
    """A record as `tlm eval` writes it, of (task, metric): (value, documents)."""
    metrics = [
        {"task": t, "name": n, "value": v, "standard_error": None, "rows": rows}
        for (t, n), (v, rows) in values.items()
    ]
    record = {"checkpoint": name, "step": 20, "metrics": metrics}
    record["settings"] = FULL | (settings or {})
    record["conditions"] = CONDITIONS | {"data": {t: data for t, _ in values}} | (conditions or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, record)
    return path


def report(capsys: pytest.CaptureFixture[str], *paths: pathlib.Path) -> tuple[list[str], str]:
    """(rows of the Markdown table, what is below it)."""
    capsys.readouterr()
    assert cli.main(["report", "--markdown", *map(str, paths)]) == 0
    above, _, below = capsys.readouterr().out.partition("\n\n")
    return above.splitlines(), below.strip()


def row(lines: list[str], task: str, metric: str) -> list[str]:
    (line,) = [x for x in lines if x.startswith(f"| {task} | {metric} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_a_limit_changes_no_average(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four documents of BoolQ stand in a column of their own, whatever was measured last."""
    everything = dict.fromkeys(ACCURACIES, (0.5, 1838))
    write(tmp_path / "a" / "eval" / "paper-20.json", everything)
    write(
        tmp_path / "a" / "eval" / "boolq-20-limit4.json",
        {("boolq", "acc"): (1.0, 4)},
        settings={"limit": 4},
    )
    lines, below = report(capsys, tmp_path / "a")
    assert sorted(row(lines, "setting", "limit")) == ["4", "all"]
    assert sorted(row(lines, "average", "of eight accuracies")) == ["", "0.5000"]
    assert "**" not in "".join(lines)
    assert below.startswith("Neither averaged nor compared, because they were not measured alike")
    assert "limit: " in below
    assert "documents: " in below


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"num_fewshot": 5}}, "shots: the task's own, 5"),
        ({"conditions": {"max_length": 512}}, "length: 1,024, 512"),
        ({"conditions": {"precision": "bfloat16"}}, "precision: float32, bfloat16"),
        ({"conditions": {"tokenizer": "u" * 16}}, "tokenizer: tttttttt, uuuuuuuu"),
        ({"data": "e" * 16}, "data: dddddddd, eeeeeeee"),
        ({"documents": 3}, "documents: 1,838, 3"),
    ],
)
def test_unlike_runs_are_not_compared(
    change: dict[str, Any],
    said: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only the two that were measured alike have a best mark."""
    key = ("piqa", "acc")
    one = write(tmp_path / "a.json", {key: (0.6, 1838)})
    two = write(
        tmp_path / "b.json", {key: (0.7, 1838)}, name="runs/b", conditions={"params_id": "b"}
    )
    other = change | {"conditions": {"params_id": "c"} | change.get("conditions", {})}
    values = {key: (0.9, other.pop("documents", 1838))}
    three = write(tmp_path / "c.json", values, name="runs/c", **other)
    lines, below = report(capsys, one, two, three)
    assert row(lines, *key) == ["0.6000", "**0.7000**", "0.9000"]
    assert said in below
    assert "\n" not in below
    lines, below = report(capsys, one, two)
    assert row(lines, *key) == ["0.6000", "**0.7000**"]
    assert below == ""


def test_a_run_by_two_paths_is_one_column(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parameters say that it is the same; new ones in the same folder are another."""
    folder = tmp_path / "a" / "eval"
    write(folder / "piqa-20.json", {("piqa", "acc"): (0.5, 9)}, name="runs/a")
    write(folder / "boolq-20.json", {("boolq", "acc"): (0.6, 9)}, name="./../here/runs/a")
    lines, _ = report(capsys, tmp_path / "a")
    assert len(row(lines, "boolq", "acc")) == 1
    retrained = {"conditions": {"params_id": "new"}}
    write(folder / "arc_easy-20.json", {("arc_easy", "acc"): (0.7, 9)}, **retrained)
    lines, _ = report(capsys, tmp_path / "a")
    assert len(row(lines, "arc_easy", "acc")) == 2


def test_older_records_are_read(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What they do not say is unknown: like each other, unlike those that say it."""
    old = sorted((ROOT / "docs" / "results" / "suites").glob("*.json"))[:2]
    lines, below = report(capsys, *old)
    assert row(lines, "setting", "length") == ["256", "256"]
    assert "**" in "".join(lines)
    assert below == ""
    key = ("wikitext", "word_perplexity")
    new = write(tmp_path / "new.json", {key: (1.0, 62)}, conditions={"max_length": 256})
    lines, below = report(capsys, *old, new)
    assert row(lines, *key)[2] == "1.0000"
    assert "tokenizer: unknown, tttttttt; data: unknown, dddddddd" in below


def test_a_damaged_record_changes_no_figure(tmp_path: pathlib.Path, fails: Fails) -> None:
    """Each of 100 flipped bytes is an error, or leaves everything as it was."""
    path = write(tmp_path / "eval" / "piqa-20.json", {("piqa", "acc"): (0.61, 1838)})
    (whole,) = result_files.read(tmp_path)
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for position in rng.sample(range(len(content)), 100):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = result_files.read(tmp_path)
        except UserError:
            refused += 1
        else:
            assert found == [whole]
    assert refused > 80
    path.write_bytes(content.replace(b"0.61", b"0.91"))
    assert "its values do not match its checksum" in fails("report", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"7",
        b"{}",
        b'{"checkpoint": "a", "step": 1, "settings": [], "metrics": []}',
        b'{"checkpoint": "a", "step": 1, "settings": {"limit": []}, "metrics": []}',
        b'{"checkpoint": "a", "step": 1, "settings": {}, "metrics": [{"task": "a", "name": "b", '
        b'"value": "x", "standard_error": null, "rows": 1}]}',
        b"\xff",
    ],
)
def test_what_is_no_record_is_one_line(
    content: bytes, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """It names the file."""
    path = tmp_path / "some.json"
    path.write_bytes(content)
    assert fails("report", path).startswith(str(path))


def test_names_of_files_tell_measurements_apart() -> None:
    """What makes another measurement is in the name."""
    known = {key: value for key, value in CONDITIONS.items() if key != "data"}

    def name(data: str = "d", precision: str = "float32", **how: Any) -> str:
        conditions = result_files.Conditions(
            **{**known, "precision": precision},  # type: ignore[arg-type]
            data={"boolq": data},
        )
        return result_files.file_name(SuiteConfig(tasks=("boolq", "niah"), **how), 20, conditions)

    assert name() == "boolq+niah-20"
    assert name(limit=4, num_fewshot=0, max_length=9) == "boolq+niah-20-limit4-shots0-length9"
    assert name(precision="bfloat16") == "boolq+niah-20-bfloat16"
    needles = [name(needle=NeedleConfig(num_depths=n)) for n in (10, 40, 41)]
    assert needles[0] == "boolq+niah-20"
    assert len(set(needles)) == 3
    folder = pathlib.Path("rows")
    assert name(data_dir=folder) != name(data_dir=folder, data="e")
    assert name(data_dir=folder).startswith("boolq+niah-20-data")
