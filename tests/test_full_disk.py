"""What cannot be written is one line that names the file, and no file is lost."""

import contextlib
import json
import pathlib
import resource
from collections.abc import Iterator

import pytest
from helpers import Fails

from tlm_jax.analysis.style import house_figure


@contextlib.contextmanager
def _no_file_beyond(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what write() says is what it says of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 30_000])
def test_export(
    size: int, finished_run: pathlib.Path, fails: Fails, tmp_path: pathlib.Path
) -> None:
    """The tensors do not fit, or even the small files do not."""
    out = tmp_path / "out"
    with _no_file_beyond(size):
        message = fails("export", "--checkpoint", finished_run, "--out", out)
    assert message == f"{out}: File too large"


def _measured(folder: pathlib.Path) -> pathlib.Path:
    record = {"checkpoint": "x", "mlp_widths": [64], "rho": {"h": [0.1]}, "pearson": {"h": 0.2}}
    path = folder / "alignment.json"
    path.write_text(json.dumps(record))
    return path


def test_report_into_a_page(fails: Fails, tmp_path: pathlib.Path) -> None:
    """The page is whole afterwards."""
    page = tmp_path / "page.md"
    text = "before\n<!-- part -->\n<!-- end part -->\n" + 300 * "after\n"
    page.write_text(text)
    with _no_file_beyond(1000):
        message = fails("report", _measured(tmp_path), "--page", page, "--part", "part")
    assert message == f"{page}: File too large"
    assert page.read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alignment.json", "page.md"]


def test_pictures(tmp_path: pathlib.Path) -> None:
    """The error knows its file, for whoever reports it."""
    picture = tmp_path / "new" / "plan.png"
    too_large = pytest.raises(OSError, match="File too large")
    with _no_file_beyond(100), too_large as caught, house_figure(picture, (2, 2)):
        pass
    assert caught.value.filename == str(picture)
