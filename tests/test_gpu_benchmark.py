"""The benchmark of a GPU, in miniature: every arm runs, and an interrupted one continues."""

import argparse
import importlib.util
import io
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import pytest

from benchmarks import gpu, race, train_worker
from tlm_jax import config_io
from tlm_jax.distributed import mesh


@pytest.fixture
def _workers_in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours take their steps here, on one device, to save the start of twenty processes."""
    apart, make_mesh = race.run, mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))

    def run(entrants: Mapping[str, race.Entrant], turns: int, **how: Any) -> Any:
        ((name, entrant),) = entrants.items()
        if "benchmarks.train_worker" not in entrant.command:
            return apart(entrants, turns, **how)
        config = config_io.from_dict(json.loads(pathlib.Path(entrant.command[-1]).read_text()))
        monkeypatch.setattr(sys, "stdin", io.StringIO("step\n" * turns))
        capsys.readouterr()
        train_worker.serve(config)
        start, *seconds, end = capsys.readouterr().out.splitlines()
        said = json.loads(start) | json.loads(end)
        return {name: race.Finish(seconds=[float(s) for s in seconds], said=said)}

    monkeypatch.setattr(race, "run", run)


@pytest.mark.usefixtures("_workers_in_this_process")
def test_every_arm_runs_and_a_second_call_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu,
        "in_a_process",
        lambda name, small: gpu.FUNCTIONS[name](gpu.base_config(small=small)),
    )
    torch = sys.executable if importlib.util.find_spec("torch") else ""
    results = tmp_path / "gpu.json"
    words = ["gpu", "--small", "--steps", "2", "--results", str(results), "--torch_python", torch]
    called: list[str] = []
    take_steps = gpu.take_steps

    def noted(step: gpu.Step, *args: Any) -> dict[str, Any]:
        called.append(step.config.name)
        if step.torch == ("--compile",):  # needs a C compiler and half a minute
            return {"tflops": 1.0}
        return take_steps(step, *args)

    monkeypatch.setattr(gpu, "take_steps", noted)
    before = jax.sharding.get_mesh()
    monkeypatch.setattr(sys, "argv", [*words, "--only", "stairs"])
    gpu.main()
    first = json.loads(results.read_text())["arms"]
    assert "2 stairs" in first
    assert len(called) == len(first)
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    jax.set_mesh(before)
    found = json.loads(results.read_text())["arms"]
    assert {name: one["error"] for name, one in found.items() if "error" in one} == {}
    every = argparse.Namespace(small=True, steps=2, torch_python=torch, only="")
    assert set(found) == set(gpu.arms(every, gpu.Folder(str(tmp_path))))
    assert {name: found[name] for name in first} == first  # nothing was measured twice
    assert all(one.get("tflops", one.get("ms", 0)) > 0 for one in found.values())
