"""Every number of docs/results*.md comes from the files under docs/results/."""

import json
import pathlib
import re

import pytest
from helpers import ROOT

from tlm_jax import cli
from tlm_jax.analysis import sweep_report

RESULTS = ROOT / "docs" / "results"
PAGES = sorted((ROOT / "docs").glob("results*.md"))
SWEEPS = sorted(
    path for path in RESULTS.glob("*.jsonl") if "arm" in json.loads(path.open().readline())
)
THE_PAPERS = {"16.28", "14.44"}
PART = re.compile(r"<!-- (?!end )([a-z0-9_-]+) -->\n(.*?)\n<!-- end \1 -->", re.DOTALL)


def parts() -> dict[str, str]:
    """The tables of the pages, by name."""
    return {name: text for page in PAGES for name, text in PART.findall(page.read_text())}


def same_after(name: str, words: list[str], tmp_path: pathlib.Path, verb: str = "report") -> None:
    """`tlm report` (or another verb) writes the table that the page of that name has."""
    [page] = [page for page in PAGES if f"<!-- {name} -->" in page.read_text()]
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    assert cli.main([verb, *words, "--page", str(copy)]) == 0
    assert copy.read_text() == page.read_text()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_tables_of_sweeps_are_what_report_writes(path: pathlib.Path, tmp_path: pathlib.Path):
    same_after(path.stem, [str(path)], tmp_path)
    assert sweep_report.read(path)[0]["sweep"] == path.stem  # it is this file's own part


def test_the_line_over_compute_is_what_ladder_writes(tmp_path: pathlib.Path):
    names = ("ladder-cpu", "schedules-micro", "shapes", "shapes-medium")
    same_after("ladder", [f"{RESULTS}/{name}.jsonl" for name in names], tmp_path, verb="ladder")


@pytest.mark.parametrize("name", ["smollm2", "suites", "needle", "alignment", "alignment-steps"])
def test_other_tables_are_what_report_writes(name: str, tmp_path: pathlib.Path):
    one = RESULTS / f"{name}.json"
    files = [one] if one.exists() else sorted((RESULTS / name).glob("*.json"))
    same_after(name, [*map(str, files), "--part", name], tmp_path)


def test_prose_has_no_figure_that_is_in_no_table():
    tables = " ".join(parts().values())
    prose = "\n".join(PART.sub("", page.read_text()) for page in PAGES)
    words = re.sub(r"^    .*$|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.MULTILINE)
    figures = set(re.findall(r"[+-]?\d+\.\d{2,}", words))
    assert figures - THE_PAPERS  # the pattern finds some
    assert {figure for figure in figures if figure not in tables} <= THE_PAPERS
