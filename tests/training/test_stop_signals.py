"""Signals to stop: one stop may arrive as several, and a second one acts at once."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from tlm_jax.training import faults


@pytest.fixture
def outside() -> Iterator[list[int]]:
    """The signals that a handler outside of training was given."""
    seen: list[int] = []
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: seen.append(number)) for number in both]
    yield seen
    for number, handler in zip(both, before, strict=True):
        signal.signal(number, handler)


def test_signals_of_one_stop_count_once(outside: list[int]) -> None:
    """A parent of several threads that dies sends one per thread (Linux)."""
    with faults.stop_signals(Console(quiet=True)) as stop:
        assert stop.signal is None
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.signal == "SIGTERM"
    assert outside == []


def test_another_stop_acts_at_once(outside: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with faults.stop_signals(Console(quiet=True)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert outside == []
        now[0] += 1.1
        os.kill(os.getpid(), signal.SIGTERM)
    assert outside == [signal.SIGTERM]
