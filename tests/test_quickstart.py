"""The notebook runs from top to bottom, with fewer steps, and is kept without outputs."""

import pathlib

import nbclient
import nbformat
import pytest
from helpers import ROOT, environment


def test_the_notebook_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert "num_steps=100" in cells[0].source
    cells[0].source = cells[0].source.replace("num_steps=100", "num_steps=20")
    for name, value in environment(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = ["".join(str(output) for output in cell.outputs) for cell in cells]
    assert "(192, 160, 96, 64)" in said[0]
    assert "Against the uniform twin" in said[0]
    assert "image/png" in said[1]
    assert "It is a truth" in said[2]
    assert "It is a truth" in said[3]
