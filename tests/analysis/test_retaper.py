"""Other MLP widths: growing changes nothing, pruning takes what matters least, by oracles."""

import dataclasses
import json
import pathlib

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Fails, steps

from tlm_jax import cli
from tlm_jax import config as c
from tlm_jax.analysis import retaper
from tlm_jax.costs import model_costs
from tlm_jax.mlp import MLPConfig
from tlm_jax.models import skeleton
from tlm_jax.models.decoder import normed
from tlm_jax.training import restore

UNIFORM = c.ModelConfig(
    vocab_size=61,
    num_layers=3,
    d_model=16,
    mlp_width=16,
    taper=c.TaperConfig(schedule="uniform", multiple_of=1),
    mixer=c.AttentionConfig(num_heads=2),
    compute_dtype="float32",
)
MODELS = {
    "tapered": dataclasses.replace(UNIFORM, taper=c.TaperConfig(multiple_of=4)),
    "chain": dataclasses.replace(UNIFORM, mlp=MLPConfig(periods=(1, 2))),
}


def _explicit(*widths: int) -> c.TaperConfig:
    return c.TaperConfig(schedule="explicit", widths=widths, multiple_of=4)


def _random(model) -> dict:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(rng.normal(size=leaf.shape) * 0.3, np.float32), model.shapes
    )


def _batch() -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, batches.batch([[9], [12], [12]], 12, vocab=61, seed=1))


def _logits(model, params) -> np.ndarray:
    batch = _batch()

    @jax.jit
    def run(params):
        merged = model.merge(params)
        hidden, _ = merged(batch["inputs"], document_ids_BL=batch["document_ids"])
        return merged.logits(hidden)

    return np.asarray(run(params))[np.asarray(batch["document_ids"]) > 0]


def _effects(model, params) -> dict[tuple[int, int], np.ndarray]:
    """Of each unit: the root mean square length of what its MLP's output loses without it."""
    batch = _batch()
    ids, scored = batch["document_ids"], np.asarray(batch["document_ids"]) > 0
    merged = model.merge(params)
    x = merged.embedding[...][batch["inputs"]]
    found = {}
    for index in range(model.config.num_layers):
        block = merged.segments.layer(index)
        x, _ = block.mix(x, None, batch["positions"], ids)
        for number, level in enumerate(block.mlp.values()):
            read = np.asarray(normed(level.norm, x), np.float64)[scored]
            gate, up, down = (
                np.asarray(w[...], np.float64) for w in (level.gate, level.up, level.down)
            )
            gated = read @ gate
            hidden = gated / (1.0 + np.exp(-gated)) * (read @ up)
            effects = []
            for unit in range(len(down)):
                without = np.where(np.arange(len(down))[:, None] == unit, 0.0, down)
                gone = hidden @ down - hidden @ without
                effects.append(np.sqrt(np.square(gone).sum(-1).mean()))
            found[index, number] = np.array(effects)
            x = level(x)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_growing_every_layer_leaves_the_logits_equal(name: str) -> None:
    old = skeleton(MODELS[name])
    new = skeleton(retaper.new_model(MODELS[name], _explicit(24, 40, 32), 32))
    params = _random(old)
    grown, changes = retaper.resize(
        old, new, params, retaper.activation(old, params, [_batch()]), 0
    )
    assert jax.tree.map(np.shape, grown) == jax.tree.map(lambda leaf: leaf.shape, new.shapes)
    before = _logits(old, params)
    np.testing.assert_allclose(_logits(new, grown), before, atol=1e-5 * np.abs(before).max())
    assert [one.added for one in changes] == [
        w - v for v, w in zip(MODELS[name].mlp_widths, (24, 40, 32), strict=True)
    ]
    assert all(one.removed == 0 and one.lost == 0 for one in changes)
    # The new units read something, each something else, at the scale of the layer's own.
    for matrix in ("gate", "up"):
        whole = grown["segments"]["001"]["mlp"]["0"][matrix][0]
        fresh = whole[:, MODELS[name].layers[1].mlp_widths[0] :]
        assert len(np.unique(fresh, axis=1).T) == fresh.shape[1] > 0
        assert fresh.std() == pytest.approx(whole.std(), rel=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_pruning_removes_exactly_the_units_with_the_least_effect(name: str) -> None:
    """And what is left computes what the whole model does with those units' rows at zero."""
    old = skeleton(MODELS[name])
    new = skeleton(retaper.new_model(MODELS[name], _explicit(24, 8, 4), 12))
    params = _random(old)
    expected = _effects(old, params)
    found = retaper.activation(old, params, [_batch()])
    assert found.keys() == expected.keys()
    for key, units in expected.items():
        np.testing.assert_allclose(found[key], units, rtol=1e-4)

    pruned, changes = retaper.resize(old, new, params, found, 0)
    silent = jax.tree.map(np.copy, params)
    for layer, spec in enumerate(new.config.layers):
        for level, width in enumerate(spec.mlp_widths):
            units = expected[layer, level]
            least = sorted(range(len(units)), key=units.__getitem__)[: max(len(units) - width, 0)]
            _down(old, silent, layer, level)[least] = 0.0
    np.testing.assert_allclose(_logits(new, pruned), _logits(old, silent), atol=1e-4)
    units = np.concatenate([expected[2, level] for level in range(len(spec.mlp_widths))])
    assert 0 < changes[2].lost < changes[2].removed / len(units)


def _down(model, params, layer: int, level: int) -> np.ndarray:
    """A view of one layer's last matrix."""
    for number, segment in enumerate(model.config.segments):
        if segment.start <= layer < segment.stop:
            repeat, place = divmod(layer - segment.start, len(segment.pattern))
            part = params["segments"][f"{number:03d}"]
            part = part if len(segment.pattern) == 1 else part[str(place)]
            return part["mlp"][str(level)]["down"][repeat]
    raise AssertionError


def test_of_equal_units_the_first_stay() -> None:
    units = np.array([1.0, 3.0, 1.0, 0.5, 1.0])
    assert retaper.most_important(units, 3).tolist() == [0, 1, 2]
    assert retaper.most_important(units, 9).tolist() == [0, 1, 2, 3, 4]


def test_the_command_makes_a_run_folder_at_an_equal_budget(
    finished_run: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tapered run reversed: its parameters, its losses, and that other verbs take it."""
    out = tmp_path / "reversed"
    words = ["retaper", str(finished_run), "--out", str(out), "--start", "0.5", "--end", "1.5"]
    assert cli.main([*words, "--importance", "taylor", "--rows", "8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert steps(out) == [0]
    _, saved = restore.saved_metadata(out, None)
    config = restore.saved_config(saved)
    assert config.model.mlp_widths == (32, 48, 80, 96)
    total = restore.saved_metadata(finished_run, None)[1]["num_params"]
    assert saved["num_params"] == total == model_costs(config.model, 64).parameters
    assert f"Parameters {total:,} -> {total:,}" in text
    origin = saved["retaper"]
    assert (origin["step"], origin["importance"]) == (20, "taylor")
    assert f"loss {origin['loss_before']:.4f} -> {origin['loss_after']:.4f}" in text
    score = restore.evaluate(out, 0, config)
    whole = restore.evaluate(
        finished_run, 20, restore.saved_config(restore.saved_metadata(finished_run, 20)[1])
    )
    assert 0 < score.loss - whole.loss < 0.2  # it was pruned in early layers, and still predicts


def test_uniform_pruning_keeps_an_imported_models_files(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Tokenizer, special tokens, template and source; a smaller budget."""
    from tlm_jax.data import load_tokenizer
    from tlm_jax.distributed import mesh as mesh_lib
    from tlm_jax.training import checkpoint

    _, saved = restore.saved_metadata(finished, 20)
    config = restore.saved_config(saved)
    special = {"special_tokens": {"bos": 1, "eos": [2], "pad": 0}, "chat_template": "{{ x }}"}
    special["source"] = {"file": "x.gguf"}
    saved["data_layout"]["document_prefix"] = []
    mesh = mesh_lib.single_device_mesh()
    tokenizer = load_tokenizer(config.data.tokenizer)
    params = restore.load_params(finished, 20, skeleton(config.model), tokenizer, mesh)
    made = tmp_path / "imported"
    with checkpoint.Checkpoints(made / "checkpoints") as checkpoints:
        metadata = checkpoint.metadata(config, params, saved["data_layout"]) | special
        checkpoints.save_params(0, params, metadata)
    out = tmp_path / "uniform"
    words = ["retaper", str(made), "--out", str(out), "--schedule", "uniform"]
    assert cli.main([*words, "--base_width", "48", "--rows", "8"]) == 0
    _, saved = restore.saved_metadata(out, 0)
    assert saved["mlp_widths"] == [48] * 4
    assert {key: saved[key] for key in special} == special
    assert saved["data_layout"]["document_prefix"] == []
    assert json.loads((out / "config.json").read_text())["config"]["name"] == "uniform"


def test_bad_input_is_one_line(
    finished_run: pathlib.Path, tmp_path: pathlib.Path, fails: Fails
) -> None:
    out = tmp_path / "new"
    assert fails("retaper").startswith("tlm retaper needs a run folder and --out")
    words = ("retaper", finished_run, "--out", out)
    assert (
        fails(*words) == f"{finished_run} has these widths already: 1 x 96, 1 x 80, 1 x 48, 1 x 32"
    )
    assert fails(*words, "--base_width", "65") == (
        f"{finished_run}: num_layers=4 * base_width=65 = 260 is not a multiple of multiple_of=16; "
        "use base_width=64"
    )
    assert "has mean" in fails(*words, "--start", "1.5", "--end", "1.0")
    assert fails("retaper", tmp_path, "--out", out).startswith(f"{tmp_path} is not a run folder")
    assert not out.exists()
    out.mkdir()
    (out / "x").touch()
    message = fails(*words, "--schedule", "uniform")
    assert message == f"{out} is not an empty folder; choose another --out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OtherMLP(MLPConfig):
    """Units that nobody knows."""


def test_custom_mlps_are_refused() -> None:
    model = dataclasses.replace(UNIFORM, mlp=_OtherMLP())
    with pytest.raises(c.UserError, match="MLPs are of the kind _OtherMLP, whose units are not"):
        retaper.new_model(model, c.TaperConfig(multiple_of=4), None)
