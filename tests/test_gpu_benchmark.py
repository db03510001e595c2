"""The benchmark of a GPU, in miniature: every arm runs, and an interrupted one continues."""

import argparse
import importlib.util
import io
import json
import pathlib
import sys
from collections.abc import Collection, Generator, Iterator, Mapping

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
    apart, make_mesh = race.one_by_one, mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))

    def one_by_one(
        entrants: Mapping[str, race.Entrant], turns: int, *, ready: Collection[str], queued: int
    ) -> Generator[tuple[str, race.Finish | None], None, None]:
        for name, entrant in entrants.items():
            if "benchmarks.train_worker" not in entrant.command:
                yield from apart({name: entrant}, turns, ready=(), queued=queued)
                continue
            file, documents = entrant.command[-2:]
            config = config_io.from_dict(json.loads(pathlib.Path(file).read_text()))
            monkeypatch.setattr(sys, "stdin", io.StringIO(f"{queued}\n" * turns))
            capsys.readouterr()
            train_worker.serve(config, int(documents))
            start, *seconds, end = capsys.readouterr().out.splitlines()
            said = json.loads(start) | json.loads(end)
            yield name, race.Finish(seconds=[float(s) for s in seconds], said=said)

    monkeypatch.setattr(race, "one_by_one", one_by_one)


@pytest.mark.usefixtures("_workers_in_this_process")
def test_every_arm_runs_and_a_second_call_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    measure = gpu.measure

    def noted(todo: list[str], options: argparse.Namespace) -> Iterator[gpu.Arm]:
        # torch.compile needs a C compiler and half a minute
        for arm in measure([name for name in todo if name != "torch.compile"], options):
            measured.append(arm[0])
            yield arm

    monkeypatch.setattr(gpu, "measure", noted)
    monkeypatch.setattr(
        gpu,
        "in_a_process",
        lambda name, small: gpu.FUNCTIONS[name](gpu.base_config(small=small)),
    )
    torch = sys.executable if importlib.util.find_spec("torch") else ""
    results = tmp_path / "gpu.json"
    words = ["gpu", "--small", "--turns", "2", "--results", str(results), "--torch_python", torch]
    before = jax.sharding.get_mesh()
    monkeypatch.setattr(sys, "argv", [*words, "--only", "stairs", "--minutes", "0"])
    gpu.main()
    assert measured == ["2 stairs"]  # the time was up after one
    monkeypatch.setattr(sys, "argv", words)
    gpu.main()
    jax.set_mesh(before)
    found = json.loads(results.read_text())["arms"]
    assert {name: one["error"] for name, one in found.items() if "error" in one} == {}
    every = gpu.arms(argparse.Namespace(small=True, torch_python=torch, only=""))
    assert sorted(measured) == sorted(set(every) - {"torch.compile"})  # and nothing twice
    assert all(one.get("tflops", one.get("ms", 0)) > 0 for one in found.values())
