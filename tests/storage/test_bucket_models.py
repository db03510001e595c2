"""Models and sweeps in a bucket: exported, imported, trained and reported."""

import json
import pathlib

import pytest
from gcs_server import Server
from helpers import Fails, contents
from s3_server import Either

from tlm_jax import cli, files, storage
from tlm_jax.interop import exporting
from tlm_jax.training import bucket_checkpoints, checkpoint, restore

SWEEP = """
from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    return Sweep(
        name="one",
        base=config_io.load_config({config!r}),
        arms=(Arm(name="uniform", changes={{"training.num_steps": 2}}),),
        seeds=(3,),
    )
"""


@pytest.mark.parametrize("form", ["native", "gguf"])
def test_exported_and_imported(
    form: exporting.Format,
    server: Either,
    bucket_run: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    """The export is to the byte that of a local copy; its import has the same parameters."""
    out = storage.path(f"{server.scheme}://bucket/exports/{form}")
    words = ["--format", form]
    assert cli.main(["export", "--checkpoint", str(bucket_run), "--out", str(out), *words]) == 0
    here = tmp_path / "export"
    storage.download(bucket_run, tmp_path / "run")
    exporting.export_model(tmp_path / "run", here, form=form)
    storage.download(out, tmp_path / "copy")
    names = ("README.md",)  # it names the run folder
    assert contents(tmp_path / "copy", but=names) == contents(here, but=names)
    begin = len(server.requests)
    assert cli.main(["export", "--checkpoint", str(bucket_run), "--out", str(out), *words]) == 0
    assert not {m for m, _ in server.requests[begin:]} & {"POST", "PUT"}  # made before
    if form == "native":
        imported = storage.path(f"{server.scheme}://bucket/imported")
        assert cli.main(["import", "--model", str(out), "--out", str(imported)]) == 0
        step, metadata = restore.saved_metadata(imported, None)
        assert step == 0
        _, trained = restore.saved_metadata(bucket_run, None)
        assert checkpoint.params_id(metadata) == checkpoint.params_id(trained)
        assert cli.main(["verify", str(imported)]) == 0
        assert cli.main(["import", "--model", str(out), "--out", str(imported)]) == 0  # made before


def test_retapered(gs_run: pathlib.Path, gcs: Server) -> None:
    wider = gs_run.parent / "wider"
    words = ["--out", str(wider), "--schedule", "uniform", "--base_width", "72", "--rows", "2"]
    assert cli.main(["retaper", str(gs_run), *words]) == 0
    assert bucket_checkpoints.complete(wider / "checkpoints") == [0]
    assert restore.saved_metadata(wider, None)[0] == 0


def test_an_interrupted_copy_is_no_model(
    server: Either, bucket_run: pathlib.Path, fails: Fails
) -> None:
    out = storage.path(f"{server.scheme}://bucket/exports/cut")
    words = ("export", "--checkpoint", bucket_run, "--out", out, "--format", "native")
    server.fault = lambda method, path: (
        403 if method in ("POST", "PUT") and _tensors(server) else None
    )
    assert "permission denied" in fails(*words)
    assert _tensors(server)
    assert not (out / "config.json").exists()
    server.fault = lambda method, path: None
    assert cli.main([str(word) for word in words]) == 0
    assert ".unfinished" not in {path.name for path in out.iterdir()}
    assert (out / "config.json").exists()
    (out / "config.json").write_text("{}")
    assert "is not an empty folder" in fails(*words)


def _tensors(server: Either) -> list[str]:
    return [n for n in server.names("exports/cut") if n.endswith("safetensors")]


def test_a_sweep_in_a_bucket(
    config_file: pathlib.Path,
    server: Either,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    fails: Fails,
) -> None:
    file, out = tmp_path / "sweep.py", storage.path(f"{server.scheme}://bucket/sweep")
    file.write_text(SWEEP.format(config=str(config_file)))
    server.fault = lambda method, path: (
        403 if method in ("POST", "PUT") and "tfevents" in path else None
    )
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 0  # though its log is refused
    server.fault = lambda method, path: None
    record = files.read_json(out / "uniform-3" / "result.json")
    assert [step for step, _ in record["train"]] == [1, 2]
    log = (out / "uniform-3" / "log.txt").read_text()
    assert "complete at step 2" in log
    assert log.count("cannot write metrics: [Errno 13] permission denied") == 1
    assert server.names("sweep/.lock") == []
    capsys.readouterr()
    assert cli.main(["sweep", str(file), "--out", str(out)]) == 0
    assert "0 to run" in capsys.readouterr().out
    assert cli.main(["report", str(out), "--out", str(out / "report")]) == 0
    assert (out / "report" / "index.html").read_text().startswith("<!doctype html>")
    assert {p.suffix for p in (out / "report").iterdir()} == {".html", ".md", ".png"}
    assert json.loads((out / "results.jsonl").read_text())["arm"] == "uniform"
    cell = out / "uniform-3" / "cell.json"
    words = ("--workdir", str(cell.parent), "--training.num_steps", "2")
    assert cli.main(["train", "--config", str(cell), *words]) == 0  # nothing is left to do
    complaint = fails("train", "--config", out / "x.py", "--workdir", out / "x")
    assert f"{out}/x.py is code" in complaint
