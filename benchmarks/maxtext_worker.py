"""Train steps of MaxText's Llama, one for each line of standard input (see `race`).

    python3.12 -m venv X
    X/bin/pip install --no-deps maxtext==0.2.5
    X/bin/pip install jax==0.12.0.1 flax==0.12.12 optax aqtp drjax grain jinja2 ml_collections \
        omegaconf pathwaysutils pillow pydantic qwix sentencepiece sympy tiktoken tokamax==0.0.12 \
        transformers
    X/bin/python benchmarks/maxtext_worker.py '{"num_layers": 12, ...}' [--unrolled]

Needs neither this package nor TensorFlow, PyTorch or CUDA. The model has the shape of ours (SwiGLU,
rotary positions, RMSNorm, tied embeddings, no biases), uniform, in float32. The step is MaxText's
own, with the norms that it reports: AdamW, gradients clipped to norm 1, state donated. Its layers
run in a loop by default, where they are always rematerialized: "none" means "full" there, and of
its named policies "minimal_with_context" recomputes least (no product with weights). `--unrolled`
takes them out of the loop, and rematerializes nothing. Random tokens, a document a row.
"""

import contextlib
import json
import os
import pathlib
import sys
import time

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # without Google Cloud's packages
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

with contextlib.redirect_stdout(sys.stderr):  # some modules print when they are imported
    import jax
    import maxtext
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

from benchmarks import race


def settings(shape: dict[str, int], *, unrolled: bool) -> dict[str, object]:
    """What differs from MaxText's defaults."""
    return {
        "run_name": "race",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "base_num_decoder_layers": shape["num_layers"],
        "base_emb_dim": shape["d_model"],
        "base_num_query_heads": shape["num_heads"],
        "base_num_kv_heads": shape["num_heads"],
        "head_dim": shape["d_model"] // shape["num_heads"],
        "base_mlp_dim": shape["mlp_width"],
        "vocab_size": shape["vocab_size"],
        "per_device_batch_size": shape["batch_size"],
        "max_target_length": shape["seq_len"],
        "logits_via_embedding": True,
        "dtype": "float32",
        "attention": "dot_product",
        "scan_layers": not unrolled,
        "remat_policy": "none" if unrolled else "minimal_with_context",
        "packing": False,
        "learning_rate": 1e-4,
        "warmup_steps_fraction": 0,
        "enable_checkpointing": False,
        "jax_cache_dir": "",  # so that compile_s is a compilation
    }


def main() -> None:
    chosen = settings(json.loads(sys.argv[1]), unrolled="--unrolled" in sys.argv)
    config, recorder = train.initialize(["", *(f"{key}={value}" for key, value in chosen.items())])
    parts = train_utils.setup_train_loop(config, recorder)
    shardings, mesh, loader, whole = parts[2], parts[4], parts[7], parts[-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(whole.model, nnx.Param)))
    graph, state = nnx.split(whole)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    jitted, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, params_shardings=of_params
    )
    batch = loader.load_next_batch()
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        begin = time.perf_counter()
        program = jitted.lower(state, batch).compile()
        compiled = time.perf_counter() - begin

        def step() -> None:
            nonlocal state
            state, metrics = program(state, batch)
            jax.block_until_ready((state, metrics))

        start = {
            "compile_s": compiled,
            "parameters": count,
            "versions": f"MaxText {maxtext.__version__}, jax {jax.__version__}",
        }
        race.answer(step, start=start, end=lambda: {"peak_mib": race.resident_mib()})


if __name__ == "__main__":
    main()
