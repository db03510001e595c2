"""Seeds that a study needs, against tables of the paired t test."""

import itertools
import math

import pytest

from tlm_jax import cli
from tlm_jax.analysis import power


def records(losses: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        {
            "arm": arm,
            "baseline": "a",
            "order": order,
            "seed": seed,
            "final": {"loss": loss},
            "validation": [[0, 9.0], [10, loss]],
        }
        for order, (arm, of_arm) in enumerate(losses.items())
        for seed, loss in enumerate(of_arm)
    ]


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_sizes_that_tables_have(effect: float, pairs: int) -> None:
    """Those of G*Power for a paired t test, two-sided, 5% level, 80% power."""
    assert power.seeds_needed(1.0, effect) == pairs
    assert power.seeds_needed(0.01, -effect / 100) == pairs


def test_more_comparisons_need_more() -> None:
    needed = [power.seeds_needed(0.02, 0.02, comparisons=n) for n in (1, 3, 10)]
    assert all(a < b for a, b in itertools.pairwise(needed))


def test_the_spread_is_pooled_over_arms() -> None:
    found = power.spread(records({"a": [1, 2, 3], "b": [1.1, 2.3, 3.2], "c": [0.5, 1.5, 2.8]}))
    assert found is not None
    assert found.degrees == 4
    variances = 0.01, 0.03  # of 0.1, 0.3, 0.2 and of -0.5, -0.5, -0.2
    assert math.isclose(found.deviation, math.sqrt(sum(variances) / 2))
    assert found.low < found.deviation < found.high
    assert power.spread(records({"a": [1.0], "b": [1.1]})) is None


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "docs/results/shapes.jsonl", "--power"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "12 degrees of freedom" in out
    assert cli.main(["report", "docs/results/shapes-cpu.jsonl", "--power"]) != 0
