"""Scores as a table."""

import pathlib

from rich.table import Table

from tlm_jax.evaluation.perplexity import Score


def table(folder: pathlib.Path, step: int, score: Score) -> Table:
    """One checkpoint's score, with the standard error of the loss carried over."""
    error = score.standard_error
    rows = (
        ("loss (nats a token)", score.loss, error),
        ("perplexity", score.perplexity, score.perplexity * error),
        ("bits per byte", score.bits_per_byte, error * score.bits_per_byte / score.loss),
    )
    result = Table(title=f"{folder}, step {step}: {score.tokens:,} tokens of held-out text")
    result.add_column("metric")
    result.add_column("value", justify="right")
    result.add_column("standard error", justify="right")
    for name, value, spread in rows:
        result.add_row(name, f"{value:,.4f}", f"{spread:.4f}")
    return result
