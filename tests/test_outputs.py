"""No command replaces a file that it did not write; its own it replaces."""

import json
import pathlib

import pytest
from helpers import ROOT, Fails

from tlm_jax import cli

SHAPES = ROOT / "docs" / "results" / "shapes.jsonl"
SWEEP = ROOT / "configs" / "sweeps" / "shapes.py"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("plan", "--config", "CONFIG", "--png", "OUT/a.png"), "a.png"),
        (("report", SHAPES, "--out", "OUT"), "report.md"),
        (("report", SHAPES, "--out", "OUT"), "index.html"),
        (("report", SHAPES, "--out", "OUT"), "losses.png"),
        (("train", "--config", "CONFIG", "--workdir", "OUT"), "config.json"),
        (("sweep", SWEEP, "--out", "OUT"), "results.jsonl"),
        (("align", "--checkpoint", "RUN", "--tokens", "64", "--out", "OUT"), "alignment.json"),
        (("align", "--checkpoint", "RUN", "--tokens", "64", "--out", "OUT"), "alignment.png"),
        (("export", "--checkpoint", "RUN", "--out", "OUT"), "config.json"),
    ],
)
def test_a_users_file_is_not_replaced(
    words: tuple[object, ...],
    name: str,
    config_file: pathlib.Path,
    finished_run: pathlib.Path,
    tmp_path: pathlib.Path,
    fails: Fails,
) -> None:
    """One line names the file or the folder, and the file is as it was."""
    places = {"CONFIG": config_file, "RUN": finished_run, "OUT": tmp_path}
    named = [str(word) for word in words]
    for key, place in places.items():
        named = [word.replace(key, str(place)) for word in named]
    path = tmp_path / name
    path.write_text(json.dumps({"my": "work"}))
    message = fails(*named)
    assert str(tmp_path if words[0] == "export" else path) in message
    assert path.read_text() == json.dumps({"my": "work"})


def test_its_own_files_are_replaced(config_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Picture and pages of an earlier call."""
    plan = ["plan", "--config", str(config_file), "--png", str(tmp_path / "a.png")]
    report = ["report", str(SHAPES), "--out", str(tmp_path)]
    for words in (plan, report):
        assert cli.main(words) == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert cli.main(words) == 0
        changed = {p for p, t in before.items() if p.stat().st_mtime_ns != t}
        assert changed == (
            {tmp_path / "a.png"} if words is plan else before.keys() - {tmp_path / "a.png"}
        )
