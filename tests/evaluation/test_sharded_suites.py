"""Two real processes that share a batch give what one gives."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, environment


def test_two_processes_score_as_one(tmp_path: pathlib.Path) -> None:
    """Each holds half of the rows, and each gets all answers."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    variables = environment(1, cache=False)
    variables["PYTHONPATH"] += f":{ROOT / 'tests' / 'evaluation'}:{ROOT / 'tests'}"

    def start(number: int, index: int) -> tuple[subprocess.Popen[str], pathlib.Path]:
        out = tmp_path / f"{number}-{index}.json"
        script = ROOT / "tests" / "evaluation" / "processes.py"
        words = [sys.executable, str(script), address, str(number), str(index), str(out)]
        return subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True), out

    results = []
    for processes in ([start(2, 0), start(2, 1)], [start(1, 0)]):
        for process, out in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
            results.append(json.loads(out.read_text()))
    first, second, alone = results
    assert first == second
    assert first == pytest.approx(alone, abs=1e-4)
