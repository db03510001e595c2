"""What docs/extending.md promises: mixer, MLP and norm of stock Flax, used from outside."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, environment

import tlm_jax
from tlm_jax import config_io, costs, testing
from tlm_jax.models import skeleton

HERE = pathlib.Path(__file__).parent
PROGRAM = """
import json, sys
from tlm_jax import cli
for words in json.loads(sys.argv[1]):
    print(words[0], cli.main(words))
"""


def tlm(cwd: pathlib.Path, text: pathlib.Path, *commands: tuple[object, ...]) -> str:
    """The output of commands that run in one process, in a working directory."""
    words = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, words],
        cwd=cwd,
        env=environment(1) | {"TEXT": str(text)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_mixer_in_a_folder_of_its_own(text_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Planned, trained in both dtypes, evaluated and asked for text from another folder."""
    own, cwd = tmp_path / "own", tmp_path / "elsewhere"
    own.mkdir()
    cwd.mkdir()
    for name in ("gated_delta.py", "gated_delta_config.py"):
        shutil.copy(HERE / name, own)
    assert len((own / "gated_delta.py").read_text().splitlines()) <= 60
    config = ("--config", own / "gated_delta_config.py")
    half = ("--model.compute_dtype", "bfloat16")
    said = tlm(
        cwd,
        text_folder,
        ("plan", *config),
        ("train", *config, "--workdir", "float32"),
        ("train", *config, "--workdir", "bfloat16", *half),
    )
    assert "plan 0" in said
    assert said.count("train 0") == 2
    trust = ("--trust_module", own / "gated_delta.py")
    assert f"tlm eval --checkpoint bfloat16 --trust_module {own / 'gated_delta.py'}" in said
    said = tlm(
        cwd,
        text_folder,
        ("eval", "--checkpoint", "float32"),
        ("eval", "--checkpoint", "float32", *trust),
        ("eval", "--checkpoint", "bfloat16", *trust),
        ("generate", "--checkpoint", "bfloat16", "--num_tokens", 8, *trust),
    )
    assert "add --trust_module gated_delta " in said
    assert [line for line in said.splitlines() if line.startswith(("eval ", "generate "))] == [
        "eval 1",
        "eval 0",
        "eval 0",
        "generate 0",
    ]
    scores = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    for score, name in zip(scores, ("float32", "bfloat16"), strict=True):
        lines = (cwd / name / "metrics.jsonl").read_text().splitlines()
        evaluated = [r for r in map(json.loads, lines) if r["kind"] == "eval"]
        assert score["loss"] < evaluated[0]["loss"] - 0.1, "training changed nothing"
        assert score["loss"] == pytest.approx(evaluated[-1]["loss"], abs=0.05)


def test_the_mixer_holds_what_every_mixer_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docs tell users to test their own."""
    monkeypatch.syspath_prepend(HERE)
    from gated_delta import GatedDeltaConfig

    testing.check_mixer(GatedDeltaConfig(num_heads=2, head_dim=8))


def test_the_example_of_the_page(tmp_path: pathlib.Path) -> None:
    """It sees a few tokens back only, which is no fault of a mixer."""
    page = (ROOT / "docs" / "extending.md").read_text()
    for name in ("short_conv.py", "short_conv_config.py"):
        rest = page.split(f"    # {name}\n")[1].splitlines()
        lines = itertools.takewhile(lambda line: not line or line.startswith("    "), rest)
        (tmp_path / name).write_text(textwrap.dedent("\n".join(lines)))
    mixer = config_io.load_config(tmp_path / "short_conv_config.py").model.mixer
    checks = (testing.check_budget, testing.check_causality, testing.check_documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "CHECKS", checks)
        testing.check_mixer(mixer)


def test_the_checks_have_their_devices_where_nobody_asked_for_any() -> None:
    program = """
import jax
from tlm_jax import config, testing
testing.CHECKS = (lambda model: print(len(jax.devices())),)
for _ in range(2):
    testing.check_mixer(config.AttentionConfig())
"""
    variables = environment(1)
    del variables["JAX_NUM_CPU_DEVICES"]
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.returncode) == ("8\n8\n", 0), done.stderr


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeluConfig(tlm_jax.MLPConfig):
    """Of the MLP below."""


class Gelu(nnx.Module):
    """Two products with biases, and a new name for an axis."""

    def __init__(self, config, width, context, *, rngs):
        axes = {"logical_axes": ("embed", "neurons"), "decays": False}
        options = {"dtype": context.dtype, "rngs": rngs}
        self.up = nnx.Linear(context.d_model, width, kernel_metadata=axes, **options)
        self.down = nnx.Linear(width, context.d_model, **options)

    def __call__(self, x_BLD):
        assert x_BLD.dtype == self.up.dtype, "the norm in front has changed the dtype"
        return self.down(jax.nn.gelu(self.up(x_BLD)))


def layer_norm(dim: int, eps: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=eps, rngs=rngs)


@pytest.fixture
def custom() -> tlm_jax.ModelConfig:
    """A tapered model with an MLP and a norm of stock Flax, in bfloat16."""
    tlm_jax.register(GeluConfig, Gelu)
    tlm_jax.register_norm("layer", layer_norm, parameters_per_dim=2)
    return tlm_jax.ModelConfig(
        vocab_size=testing.VOCAB,
        num_layers=2,
        d_model=32,
        mlp_width=64,
        taper=tlm_jax.TaperConfig(schedule="linear", multiple_of=16),
        mlp=GeluConfig(),
        norm="layer",
        compute_dtype="bfloat16",
    )


def test_an_mlp_and_a_norm(custom: tlm_jax.ModelConfig) -> None:
    """Their costs are counted, their metadata is read, and they train in the compute dtype."""
    model = skeleton(custom)
    planned = costs.model_costs(custom, 32)
    assert planned.parameters == model.num_params
    assert costs.twin_difference(custom, 32) == {}
    first = planned.layers[0]
    assert first.mlp_parameters == 2 * 32 * 96 + 96 + 32
    assert first.norm_parameters == 2 * 2 * 32

    up = ("segments", "000", "mlp", "0", "mlp", "up", "kernel")
    named, decays = model.logical_axes, model.decays
    for key in up:
        named, decays = named[key], decays[key]
    assert named == ("layers", "embed", "neurons")
    assert decays is False

    state, losses = testing.train(custom, num_steps=2)
    assert np.isfinite(losses).all()
    hidden = jax.eval_shape(
        lambda params: model.merge(params)(jnp.ones((1, 8), jnp.int32))[0], state.params
    )
    assert hidden.dtype == jnp.bfloat16


def test_a_norm_is_found_in_a_trusted_module(
    custom: tlm_jax.ModelConfig, tmp_path: pathlib.Path
) -> None:
    """A config names its norm by a word alone; what is trusted is asked for it."""
    path = tmp_path / "own_norm.py"
    path.write_text(
        "import tlm_jax\n"
        "def make(dim, eps, *, rngs):\n"
        "    raise NotImplementedError\n"
        "tlm_jax.register_norm('own', make, parameters_per_dim=3)\n"
    )
    run = tlm_jax.RunConfig(model=dataclasses.replace(custom, norm="own"))
    values = config_io.to_dict(run)
    with pytest.raises(config_io.UserError, match=r"norm='own'.* add --trust_module"):
        costs.model_costs(config_io.from_dict(values).model, 32)
    config_io.trust([str(path)])
    try:
        found = config_io.from_dict(values)
        assert found == run
        norms = 5 * 3 * 32
        assert costs.model_costs(found.model, 32).norm_parameters == norms
        assert config_io.trust_options(found)[-2:] == ["--trust_module", str(path)]
    finally:
        config_io.trust([])
