"""Import and export killed in the middle: nothing half-made is used, and nothing is in the way."""

import pathlib
import subprocess
import sys
import time

from folders import TAPERED, assert_bit_equal, read_run, write_llama, write_run
from helpers import ROOT, Fails, environment

from tlm_jax import cli


def _kill(words: list[str], out: pathlib.Path) -> None:
    """Runs `tlm` and ends it by SIGKILL as soon as it has begun to write."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tlm_jax", *words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    part = out.with_name(f".{out.name}.part")
    give_up = time.monotonic() + 120
    while not (part.exists() or out.exists()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.001)
    process.kill()
    process.communicate()


def test_an_import_killed_in_the_middle(
    bpe: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    """The next one succeeds, and leaves only its own folder."""
    folder, out = write_llama(tmp_path / "hf", bpe), tmp_path / "runs" / "model"
    words = ["import", "--model", str(folder), "--out", str(out)]
    _kill(words, out)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == [".model.part"]
    assert fails("generate", "--checkpoint", out, "--prompt", "a").startswith(
        f"{out} is not a run folder"
    )
    assert cli.main(words) == 0
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert cli.main([*words[:-1], str(tmp_path / "again")]) == 0
    assert_bit_equal(read_run(out)[1], read_run(tmp_path / "again")[1])


def test_an_export_killed_in_the_middle(tmp_path: pathlib.Path) -> None:
    """The same; an empty folder may be there before."""
    params = write_run(tmp_path / "run", TAPERED)
    out = tmp_path / "models" / "small"
    words = ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(out)]
    _kill(words, out)
    assert [path.name for path in out.parent.iterdir()] == [".small.part"]
    out.mkdir()
    assert cli.main(words) == 0
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert cli.main(["import", "--model", str(out), "--out", str(tmp_path / "back")]) == 0
    assert_bit_equal(params, read_run(tmp_path / "back")[1])
