"""Importance of units against finite differences, and widths that follow from it."""

import dataclasses
import pathlib

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlm_jax import cli
from tlm_jax import config as c
from tlm_jax.analysis import importance
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import skeleton
from tlm_jax.models.loss import batch_losses

TAPERED = c.ModelConfig(
    vocab_size=61,
    num_layers=3,
    d_model=16,
    mlp_width=16,
    taper=c.TaperConfig(multiple_of=4),
    mixer=c.AttentionConfig(num_heads=2),
    compute_dtype="float32",
)
MODELS = {
    "tapered": TAPERED,
    "uniform": dataclasses.replace(TAPERED, taper=c.TaperConfig(schedule="uniform")),
    "chain": dataclasses.replace(TAPERED, mlp=MLPConfig(periods=(1, 2))),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_change_of_the_loss_when_a_unit_shrinks(name: str) -> None:
    """Every layer's first and last unit; a row of padding counts for nothing."""
    model = skeleton(MODELS[name])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), model.shapes
    )
    batch = jax.tree.map(jnp.asarray, batches.batch([[9], [12], []], 12, vocab=61))
    found = importance.importance(model, params, [batch])
    assert [len(one.units) for one in found] == list(MODELS[name].mlp_widths)

    @jax.jit
    def losses(params):
        nll_BL, _, scored_BL = batch_losses(model, params, batch, chunk=0)
        return jnp.sum(nll_BL, 1)[:2] / jnp.sum(scored_BL, 1)[:2]

    layer = 0
    for segment in params["segments"].values():
        levels = [level["down"] for level in segment["mlp"].values()]
        for index in range(levels[0].shape[0]):
            for level, place in ((levels[0], 0), (levels[-1], -1)):
                matrix = np.array(level)
                apart = []
                for factor in (1.1, 0.9):
                    matrix[index, place] = np.asarray(level)[index, place] * factor
                    new = jnp.asarray(matrix.copy())
                    changed = jax.tree.map(
                        lambda leaf, old=level, new=new: new if leaf is old else leaf, params
                    )
                    apart.append(np.asarray(losses(changed), np.float64))
                expected = np.abs(apart[0] - apart[1]).mean() / 0.2
                assert found[layer].units[place] == pytest.approx(expected, rel=0.01, abs=1e-5)
            layer += 1
    assert layer == 3


def test_widths_are_in_proportion_within_limits_and_keep_the_budget():
    values = (3.0, 2.0, 1.0, 2.0)
    widths = importance.proposed_widths(values, 64, 8)
    assert widths == (96, 64, 32, 64)
    assert c.TaperConfig(schedule="explicit", widths=widths, multiple_of=8).apply(4, 64) == widths
    lopsided = importance.proposed_widths((100.0, 1.0, 2.0, 1e-12), 64, 8)
    assert sum(lopsided) == 4 * 64
    assert (max(lopsided), min(lopsided)) == (128, 16)
    assert lopsided[1] < lopsided[2]
    assert sum(importance.proposed_widths(values, 63, 8)) == 4 * 63
    assert importance.proposed_widths((0.0, 0.0), 16, 8) == (16, 16)


def test_the_command_proposes_widths_that_train(
    finished_run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["importance", "--checkpoint", str(finished_run), "--rows", "8"]) == 0
    out = capsys.readouterr().out
    widths = tuple(map(int, out.split("--model.taper.widths ")[1].split()))
    assert len(widths) == 4
    assert sum(widths) == 4 * 64
    assert "units with half of it" in " ".join(out.split())
