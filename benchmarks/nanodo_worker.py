"""Train steps of NanoDO's Transformer, one for each line of standard input (see `race`).

    git clone https://github.com/google-deepmind/nanodo CHECKOUT
    python3.11 -m venv X
    X/bin/pip install jax==0.10.2 flax==0.12.8 optax grain sentencepiece tensorflow-datasets
    X/bin/python benchmarks/nanodo_worker.py '{"num_layers": 12, ...}' CHECKOUT

Needs neither this package nor TensorFlow. Model and loss are NanoDO's: learned positions,
LayerNorm, tied embeddings, no biases, float32, layers outside of loops, all logits at once,
nothing rematerialized. Its MLP has two matrices and GELU, ours (SwiGLU) three: at 1.5 times the
width it has as many parameters. The step is NanoDO's without its statistics and without its
accumulation of gradients over one batch (its own module brings TensorFlow, whose memory would
count): AdamW from optax, gradients clipped to norm 1, state donated. Random tokens, a document a
row.
"""

import functools
import json
import pathlib
import subprocess
import sys
import time

import jax
import optax
from flax.training.train_state import TrainState

sys.path.insert(0, sys.argv[2])
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from nanodo import loss, model

from benchmarks import race


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, ids: jax.Array) -> tuple[TrainState, jax.Array]:
    """The next state, and the loss."""
    loss_fn = loss.get_default_loss_fn(ids, state.apply_fn, {})
    (value, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), value


def main() -> None:
    shape = json.loads(sys.argv[1])
    config = model.DoConfig(
        D=shape["d_model"],
        H=shape["num_heads"],
        L=shape["seq_len"],
        N=shape["num_layers"],
        V=shape["vocab_size"],
        F=shape["mlp_width"] * 3 // 2,
        fsdp_enabled=False,
    )
    transformer = model.TransformerDo(config)
    adamw = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.1)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    size = (shape["batch_size"], shape["seq_len"])
    ids = jax.random.randint(jax.random.key(0), size, 0, shape["vocab_size"])
    params = jax.jit(transformer.init)(jax.random.key(0), ids)["params"]
    state = TrainState.create(apply_fn=transformer.apply, params=params, tx=tx)
    del params
    begin = time.perf_counter()
    program = train_step.lower(state, ids).compile()
    compiled = time.perf_counter() - begin

    def step() -> None:
        nonlocal state
        state, value = program(state, ids)
        jax.block_until_ready((state, value))

    git = ["git", "-C", sys.argv[2], "rev-parse", "HEAD"]
    commit = subprocess.check_output(git, text=True)[:7]
    start = {
        "compile_s": compiled,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "versions": f"NanoDO {commit}, jax {jax.__version__}",
    }
    race.answer(step, start=start, end=lambda: {"peak_mib": race.resident_mib()})


if __name__ == "__main__":
    main()
