"""Benchmarks' processes: turns, ratios, who breaks, and what a process itself has needed."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import race

SLEEPER = """
import sys, time
from benchmarks import race
race.answer(lambda: time.sleep(float(sys.argv[1])), start={"a": 1}, end=lambda: {"b": 2})
"""
BREAKS = "print('{}', flush=True); input(); raise SystemExit(1)"
NEEDS = """
from benchmarks import race
race.answer(lambda: None, start={}, end=lambda: {"mib": race.resident_mib()})
"""


def entrant(code: str, *words: str) -> race.Entrant:
    return race.Entrant(command=[sys.executable, "-c", code, *words])


def test_turns_and_ratios(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that ends early is left out with a line; the others go on."""
    found = race.run(
        {
            "fast": entrant(SLEEPER, "0.02"),
            "ends": entrant(BREAKS),
            "slow": entrant(SLEEPER, "0.2"),
        },
        turns=3,
    )
    assert list(found) == ["fast", "slow"]
    assert found["slow"].said == {"a": 1, "b": 2}
    assert [len(one.seconds) for one in found.values()] == [3, 3]
    assert found["slow"].median >= 0.2
    assert race.ratio(found["slow"], found["fast"]) > 2
    assert "ends broke" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_s_peak_is_its_own() -> None:
    """Not that of the one which started it, as getrusage has it."""
    large = np.ones(400 * 2**20, np.uint8)
    assert race.resident_mib() > 400
    found = race.run({"small": entrant(NEEDS)}, turns=2)
    assert found["small"].said["mib"] < 200
    del large


def test_one_by_one() -> None:
    """All begin at once; each is timed by itself, and one that breaks is said to have."""
    found = dict(
        race.one_by_one(
            {
                "slow": entrant(SLEEPER, "0.05"),
                "bad": entrant(BREAKS),
                "fast": entrant(SLEEPER, "0"),
            },
            3,
            ready=["fast", "slow"],
        )
    )
    assert list(found) == ["slow", "bad", "fast"]
    assert found["bad"] is None
    assert found["slow"] is not None
    assert found["slow"].said == {"a": 1, "b": 2}
    assert len(found["slow"].seconds) == 3
    assert min(found["slow"].seconds) >= 0.05


def test_who_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = race._start
    monkeypatch.setattr(race, "_start", lambda one: started.append(start(one)) or started[-1])
    running = race.one_by_one({name: entrant(SLEEPER, "0") for name in "ab"}, 1, ready="ab")
    next(running)
    assert started[1].poll() is None
    running.close()
    assert [worker.wait(60) for worker in started] == [0, -signal.SIGKILL]
