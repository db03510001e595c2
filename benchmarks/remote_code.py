"""Exports with modeling code, run by transformers and by lm-eval, against this library.

    python -m benchmarks.remote_code --runs FOLDER --data_dir FOLDER

Needs the extras `eval` and `reference`. A tiny model of each architecture is trained for a few
steps and exported as `compact`. Both sides read the same 150 tokens of docs/concepts.md in float32
and write on greedily; then both answer the first questions of PIQA, transformers through lm-eval's
Hugging Face backend, whose log-likelihoods are float32 logits added up in float64, as ours are.
Run folders, exports and results stay in --runs, and what is there is not made again. The table
goes to docs/export.md.
"""

import argparse
import pathlib
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks import llama_cpp, report
from benchmarks.evaluation import our_model, their_model
from benchmarks.step_time import ROOT
from tlm_jax import cli, files
from tlm_jax.distributed import mesh
from tlm_jax.evaluation import suites

ARMS = {
    "Transformer": "transformer",
    "Gated Attention": "gated_attention",
    "Hope-attention": "hope_attention",
    "Titans (MAG)": "titans",
}
TASK = "piqa"
WRITE = 64


def answers(model: Any, data_dir: pathlib.Path, limit: int) -> tuple[list[float], dict[str, float]]:
    """Log-likelihoods of the task's requests, in their order, and its metrics."""
    import lm_eval

    (task,) = suites.load_tasks([TASK], data_dir)
    with suites.quiet():
        results = lm_eval.simple_evaluate(model=model, tasks=[task], limit=limit, bootstrap_iters=0)
    assert results is not None
    metrics = {k: v for k, v in results["results"][TASK].items() if isinstance(v, float)}
    return [instance.resps[0][0] for instance in task.instances], metrics


def in_transformers(folder: pathlib.Path, read: list[int]) -> tuple[np.ndarray, list[int]]:
    """Logits of the tokens, and those written after them with a cache."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    tokens = torch.tensor([read])
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
    model.generation_config.eos_token_id = None  # write on, as ours does
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=WRITE
    )
    return logits, written[0, len(read) :].tolist()


def measure(run: pathlib.Path, out: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """What both sides compute, compared."""
    import torch

    words = ["export", "--checkpoint", str(run), "--out", str(out), "--format", "compact"]
    assert cli.main(words) == 0
    ours = llama_cpp.ours(run, (ROOT / "docs" / "concepts.md").read_text())
    logits, written = in_transformers(out, ours["read"])
    equal = [a == b for a, b in zip(ours["written"], written, strict=False)]
    model = our_model(run)
    our_answers, our_metrics = answers(model, options.data_dir, options.limit)
    model = their_model(out, 16, model.max_length, "float64", remote_code=True)
    torch.set_num_threads(1)  # operations are so small that threads wait for each other
    their_answers, their_metrics = answers(model, options.data_dir, options.limit)
    apart = [abs(a - b) for a, b in zip(our_answers, their_answers, strict=True)]
    return {
        "logits_apart": float(np.abs(ours["logits"] - logits).max()),
        "largest_logit": float(np.abs(logits).max()),
        "equal_tokens": equal.index(False) if False in equal else len(equal),
        "requests": len(apart),
        "nats_apart": max(apart),
        "ours": our_metrics,
        "theirs": their_metrics,
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    """A line of the table."""

    def scores(metrics: dict[str, float]) -> str:
        return " / ".join(f"{metrics[f'{metric},none']:.2f}" for metric in ("acc", "acc_norm"))

    return [
        name,
        f"{found['logits_apart']:.1e}",
        f"{found['largest_logit']:.0f}",
        f"{found['equal_tokens']} of {WRITE}",
        f"{found['nats_apart']:.1e}",
        scores(found["ours"]),
        scores(found["theirs"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=int, default=50, help="questions")
    parser.add_argument("--steps", type=int, default=30, help="of each model's training")
    options = parser.parse_args()
    mesh.one_device_a_core()
    rows = []
    for name, word in ARMS.items():
        folder = options.runs / word
        record = folder / f"result-{options.limit}.json"
        if not record.is_file():
            llama_cpp.train_tiny(folder / "run", options.steps, f"configs/tiny.py:{word}")
            files.write_json(record, measure(folder / "run", folder / "export", options))
        rows.append(row(name, files.read_json(record)))
        print(rows[-1], flush=True)
    header = ["architecture", "largest difference of logits", "largest logit"]
    header += ["greedy tokens equal", f"{TASK}: largest difference, nats", "acc / acc_norm here"]
    header += ["in lm-eval"]
    report.publish(
        "remote code",
        f"{report.table(header, rows)}\n\nThe first {options.limit} questions; "
        f"transformers {version('transformers')}, lm-eval {version('lm_eval')}; "
        f"{report.software()}.",
        ROOT / "docs" / "export.md",
    )


if __name__ == "__main__":
    main()
