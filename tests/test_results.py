"""Every number of docs/results.md comes from the files under docs/results/."""

import json
import pathlib
import re

import pytest
from helpers import ROOT

from tlm_jax import cli
from tlm_jax.analysis import sweep_report

RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
SWEEPS = sorted(
    path for path in RESULTS.glob("*.jsonl") if "arm" in json.loads(path.open().readline())
)
THE_PAPERS = {"16.28", "14.44"}
PART = re.compile(r"<!-- (?!end )([a-z0-9-]+) -->\n(.*?)\n<!-- end \1 -->", re.DOTALL)


def parts() -> dict[str, str]:
    """The tables of the page, by name."""
    return dict(PART.findall(PAGE.read_text()))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_tables_of_sweeps_are_what_report_writes(path: pathlib.Path, tmp_path: pathlib.Path):
    page = tmp_path / "results.md"
    page.write_text(PAGE.read_text())
    assert cli.main(["report", str(path), "--page", str(page)]) == 0
    assert page.read_text() == PAGE.read_text()
    assert sweep_report.read(path)[0]["sweep"] == path.stem  # it is this file's own part


@pytest.mark.parametrize("name", ["smollm2", "suites", "needle", "alignment"])
def test_other_tables_are_what_report_writes(name: str, tmp_path: pathlib.Path):
    page = tmp_path / "results.md"
    page.write_text(PAGE.read_text())
    one = RESULTS / f"{name}.json"
    files = [one] if one.exists() else sorted((RESULTS / name).glob("*.json"))
    assert cli.main(["report", *map(str, files), "--page", str(page), "--part", name]) == 0
    assert page.read_text() == PAGE.read_text()


def test_prose_has_no_figure_that_is_in_no_table():
    tables = " ".join(parts().values())
    prose = PART.sub("", PAGE.read_text())
    words = re.sub(r"^    .*$|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.MULTILINE)
    figures = set(re.findall(r"[+-]?\d+\.\d{2,}", words))
    assert figures - THE_PAPERS  # the pattern finds some
    assert {figure for figure in figures if figure not in tables} <= THE_PAPERS
