"""The compiler's usual optimisations, most of which all other tests switch off."""

import pathlib

import pytest
from helpers import NUM_STEPS, run

from tlm_jax.training import metrics


def test_an_optimised_program_trains_to_the_same_losses(
    finished_run: pathlib.Path, train: tuple[str, ...]
) -> None:
    """Within rounding, in training and in evaluation."""
    usual = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    result = run("train.py", *train[1:], variables=usual)
    assert result.returncode == 0, result.stderr
    for kind, count in (("train", NUM_STEPS), ("eval", 3)):
        losses, expected = (
            [record["loss"] for record in metrics.records(folder) if record["kind"] == kind]
            for folder in (pathlib.Path(train[-1]), finished_run)
        )
        assert len(expected) == count
        assert losses == pytest.approx(expected, rel=5e-3)
        assert losses != expected, "the same program ran"
