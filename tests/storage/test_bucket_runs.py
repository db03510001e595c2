"""Runs whose folder lies in a bucket: killed, resumed, evaluated, verified."""

import json
import pathlib

import pytest
from gcs_server import Server
from helpers import NUM_STEPS, Fails
from s3_server import Either

from tlm_jax import bucket_files, cli, files, storage
from tlm_jax.config import UserError
from tlm_jax.training import checkpoint, damage


def _records(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    """Loss by kind and step; the newest where steps were repeated."""
    return {(r["kind"], r["step"]): r["loss"] for r in files.read_lines(folder / "metrics.jsonl")}


def _checksums(folder: pathlib.Path, step: int) -> dict[str, str]:
    with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as found:
        assert found.steps == [NUM_STEPS // 2, NUM_STEPS]
        return found.metadata(step)[checkpoint.CHECKSUMS]


def test_killed_and_resumed_equals_a_local_run(
    bucket_run: pathlib.Path, finished_run: pathlib.Path
) -> None:
    """Losses, parameters, moments and the position in the data are those of a straight run."""
    assert _records(bucket_run) == _records(finished_run)
    for step in (NUM_STEPS // 2, NUM_STEPS):
        assert _checksums(bucket_run, step) == _checksums(finished_run, step)
        position = pathlib.Path("checkpoints", str(step), "data", "position.json")
        assert (bucket_run / position).read_bytes() == (finished_run / position).read_bytes()
    metrics = bucket_run / "metrics.jsonl"
    assert len(bucket_files.parts(metrics)) == 2  # one for each process
    assert any("tfevents" in p.name for p in (bucket_run / "tensorboard").iterdir())
    assert (bucket_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_a_bucket_is_read(
    bucket_run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--checkpoint", str(bucket_run)]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["loss"] == pytest.approx(_records(bucket_run)["eval", NUM_STEPS], abs=1e-5)
    assert files.read_json(bucket_run / "eval.json")["loss"] == score["loss"]
    words = ["--num_tokens", "4", "--temperature", "0"]
    assert cli.main(["generate", "--checkpoint", str(bucket_run), *words]) == 0
    assert capsys.readouterr().out.startswith("The ")
    assert cli.main(["verify", str(bucket_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    whole = ("checkpoints/10", "checkpoints/20", "config.json", "metrics.000001.jsonl")
    assert {f"{name}: whole" for name in whole} <= set(lines)


def test_damage_in_a_bucket_is_found_and_set_aside(
    gs_run: pathlib.Path, gcs: Server, fails: Fails
) -> None:
    copy = storage.path("gs://other/damaged")
    for name in gcs.names("runs/killed/checkpoints"):
        target = f"damaged/{name.removeprefix('runs/killed/')}"
        gcs.buckets["other"][target] = gcs.buckets["bucket"][name]
    (copy / "checkpoints/20/state/_METADATA").unlink()
    (copy / "checkpoints/10" / storage.COMMIT).unlink()
    complaint = fails("generate", "--checkpoint", copy, "--num_tokens", 1)
    assert "checkpoints/20 is damaged" in complaint
    with checkpoint.Checkpoints(copy / "checkpoints", read_only=True) as found:
        assert (found.steps, found.unfinished) == ([20], [10])
        aside = found.set_aside(20)
        assert found.steps == []
    assert str(aside) == "gs://other/damaged/damaged/20"
    assert (aside / storage.COMMIT).is_file()


def test_what_keeps_a_run_from_its_bucket_is_one_line(
    server: Either, bucket_run: pathlib.Path, config_file: pathlib.Path, fails: Fails
) -> None:
    def train(folder: object) -> str:
        return fails("train", "--config", config_file, "--workdir", folder)

    nowhere, refused = (f"{server.scheme}://{name}" for name in ("nowhere", "other/refused"))
    assert f"there is no bucket {nowhere}" in train(f"{nowhere}/run")
    server.fault = lambda method, path: 403 if method in ("POST", "PUT") else None
    assert train(refused).startswith(f"cannot write to run folder {refused}: permission denied")
    server.fault = lambda method, path: None
    assert "is not a run folder" in fails("eval", "--checkpoint", f"{bucket_run}/nothing")
    with bucket_files.lease(bucket_run / ".lock"):
        assert "is in use: process" in train(bucket_run)


def test_faults_of_the_network_are_no_damage(server: Either, bucket_run: pathlib.Path) -> None:
    with checkpoint.Checkpoints(bucket_run / "checkpoints", read_only=True) as found:
        server.fault = lambda method, path: 403 if "/state/" in path else None
        with pytest.raises(UserError) as caught:
            found.restore_part(NUM_STEPS, {"params": None})
        assert not isinstance(caught.value, damage.DamagedCheckpointError), caught.value


def test_checkpoints_on_s3_are_kept_as_elsewhere(s3: Either) -> None:
    """Interrupted uploads are no checkpoints, and old ones are removed."""
    import jax.numpy as jnp

    folder = storage.path("s3://bucket/kept/checkpoints")
    params = {"w": jnp.arange(5.0)}
    (folder / "3/state/_METADATA").write_text("{}")
    with checkpoint.Checkpoints(folder, keep_last=1, keep_every=4) as found:
        assert found.unfinished == [3]
        for step in (4, 5, 6):
            found.save_params(step, params, {"data_layout": {}})
        assert found.steps == [4, 6]
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6"]
    with checkpoint.Checkpoints(folder, read_only=True) as found:
        assert found.restore_params(4, params)["w"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        (folder / "6/checksums/checksums.json").unlink()
        with pytest.raises(damage.DamagedCheckpointError, match="use --step 4"):
            found.restore_params(6, params)
        assert found.set_aside(6) == folder.parent / "damaged/6"
        assert found.steps == [4]


def test_several_processes_are_refused_on_s3(
    s3: Either, config_file: pathlib.Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is prepared; what they read may lie there."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    complaint = fails("train", "--config", config_file, "--workdir", "s3://bucket/several")
    assert "s3://bucket/several: 2 processes cannot save checkpoints on s3://" in complaint
    assert s3.names("several") == []
    folder = storage.path("s3://bucket/several/checkpoints")
    with pytest.raises(UserError, match="2 processes cannot save"):
        checkpoint.Checkpoints(folder)
