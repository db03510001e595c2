"""The cost model against real parameter trees and against what XLA and JAX count."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from tlm_jax import config_io, costs, ops
from tlm_jax.architectures import ARCHITECTURES
from tlm_jax.config import AttentionConfig, ModelConfig, TaperConfig
from tlm_jax.models import skeleton
from tlm_jax.models.counted_costs import count_products

SIZES = ("tiny", "tlm_440m", "tlm_760m", "tlm_1_3b")
SEQ_LEN = 32
SMALL = ModelConfig(
    vocab_size=128,
    num_layers=4,
    d_model=64,
    mlp_width=128,
    taper=TaperConfig(schedule="linear"),
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True),
    tie_embeddings=False,
    scan_layers=False,
    remat="none",
    compute_dtype="float32",
)


def _against_the_transformer(name: str, architecture: str) -> tuple[float, float]:
    """Parameters and causal FLOPs per token, less those of the Transformer, as shares of them."""
    runs = [config_io.load_config(f"configs/{name}.py:{a}") for a in ("transformer", architecture)]
    base, other = (costs.model_costs(run.model, run.data.seq_len) for run in runs)
    parameters = other.parameters / base.parameters - 1
    return parameters, other.forward_flops / base.forward_flops - 1


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_budgets_is_true(name: str):
    """Every figure of a size in docs/architectures.md."""
    text = pathlib.Path("docs/architectures.md").read_text()
    table = text.split("<!-- budgets -->")[1].split("<!-- end budgets -->")[0]
    begin = f"| {name.removeprefix('tlm_')} | "
    rows = table.splitlines()
    found = [row.removeprefix(begin) for row in rows if row.startswith(begin)]
    expected = []
    for architecture in ARCHITECTURES:
        run = config_io.load_config(f"configs/{name}.py:{architecture}")
        planned = costs.model_costs(run.model, run.data.seq_len)
        parameters, flops = _against_the_transformer(name, architecture)
        heads, *_, head_dim = run.model.mixer.heads(run.model.d_model)
        expected.append(
            f"{architecture} | {heads} x {head_dim} | {run.model.mlp_width:,}"
            f" | {planned.parameters:,} | {parameters:+.2%}"
            f" | {planned.forward_flops / 1e6:,.1f} M | {flops:+.2%} |"
        )
    assert found == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SIZES)
def test_every_architecture_has_the_parameters_and_flops_of_its_size(name: str, architecture: str):
    """Within half a multiple of MLP width a layer and 2%; equal to its uniform twin's."""
    base = config_io.load_config(f"configs/{name}.py")
    run = config_io.load_config(f"configs/{name}.py:{architecture}")
    model, seq_len = run.model, run.data.seq_len
    size = costs.model_costs(base.model, seq_len).parameters
    step = 3 * 32 * model.d_model * model.num_layers
    assert abs(costs.model_costs(model, seq_len).parameters - size) <= 0.52 * step
    costs.assert_matched(model, seq_len)
    ratios = _against_the_transformer(name, architecture)
    assert all(abs(ratio) < 0.02 for ratio in ratios), ratios
    assert (run == base) == (architecture == "transformer")


@pytest.mark.parametrize(
    ("architecture", "schedule"),
    [
        *(("transformer", s) for s in ("uniform", "linear", "cosine", "sigmoid", "groups")),
        *((name, "cosine") for name in ARCHITECTURES if name != "transformer"),
    ],
)
@pytest.mark.parametrize("name", SIZES)
def test_parameters_equal_the_real_tree(name: str, architecture: str, schedule: str):
    """Per part and in all, tapered and uniform, for every size, architecture and schedule."""
    model = config_io.load_config(f"configs/{name}.py:{architecture}").model
    taper = dataclasses.replace(model.taper, schedule=schedule)
    model = dataclasses.replace(model, taper=taper)
    planned = costs.model_costs(model, 128)
    real = skeleton(model)
    assert planned.parameters == real.num_params
    assert skeleton(model.uniform_twin()).num_params == real.num_params

    def size(tree) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    blocks = real.shapes["segments"].values()
    norms = real.config.d_model * real.config.num_layers * len(model.mlp.periods)
    assert planned.mlp_parameters == sum(size(block["mlp"]) for block in blocks) - norms
    assert planned.mixer_parameters == sum(size(block["mixer"]) for block in blocks)
    per_layer = [
        size(block) // block["mixer_norm"]["scale"].shape[0]
        for block in blocks
        for _ in range(block["mixer_norm"]["scale"].shape[0])
    ]
    assert [layer.parameters for layer in planned.layers] == per_layer


def _forward(config: ModelConfig):
    model = skeleton(config)

    def forward(params, ids):
        built = model.merge(params)
        return built.logits(built(ids)[0])

    return forward, (model.shapes, jax.ShapeDtypeStruct((2, SEQ_LEN), jnp.int32))


@pytest.mark.parametrize("tie", [True, False])
def test_forward_flops_equal_the_products_in_the_program(tie: bool):
    """2*M*N*K over every matrix product that JAX traces: equal to the last one."""
    config = dataclasses.replace(SMALL, tie_embeddings=tie)
    forward, inputs = _forward(config)
    with ops.references():
        counted = count_products(jax.make_jaxpr(forward)(*inputs).jaxpr)[0]
    assert counted == costs.model_costs(config, SEQ_LEN).forward_flops_full * 2 * SEQ_LEN


def test_flops_agree_with_xla_on_an_unrolled_model():
    """XLA also counts elementwise work, so it sees a little more: forward and training."""
    planned = costs.model_costs(SMALL, SEQ_LEN)
    tokens = 2 * SEQ_LEN
    forward, inputs = _forward(SMALL)
    seen = jax.jit(forward).lower(*inputs).compile().cost_analysis()["flops"] / tokens
    assert 1.0 <= seen / planned.forward_flops_full < 1.1
    loss = jax.grad(lambda p, ids: jnp.mean(jax.nn.logsumexp(forward(p, ids), axis=-1)))
    seen = jax.jit(loss).lower(*inputs).compile().cost_analysis()["flops"] / tokens
    assert 1.0 <= seen / planned.training_flops_full < 1.1


def test_a_taper_moves_flops_without_changing_their_sum():
    forward, inputs = _forward(SMALL)
    twin, twin_inputs = _forward(dataclasses.replace(SMALL.uniform_twin(), scan_layers=False))
    tapered = jax.jit(forward).lower(*inputs).compile().cost_analysis()["flops"]
    uniform = jax.jit(twin).lower(*twin_inputs).compile().cost_analysis()["flops"]
    assert tapered == pytest.approx(uniform, rel=1e-3)
