"""Log-likelihoods of ours against lm-eval's Hugging Face backend, request by request.

    python -m benchmarks.agreement --checkpoint RUN --data_dir FOLDER [--limit 100]

RUN is a Llama-like run folder (`tlm import`); needs the extras `eval` and `reference`. Their logits
are float32 and added up in float64, as ours are. The table is written to docs/evaluation.md.
"""

import argparse
import pathlib
import tempfile
from typing import Any

from benchmarks import report
from benchmarks.evaluation import our_model, their_model
from tlm_jax import cli
from tlm_jax.distributed import mesh
from tlm_jax.evaluation import suites

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "evaluation.md"


def log_likelihoods(model: Any, task: Any, limit: int) -> list[float]:
    """What a model answers to a task's requests, in their order."""
    import lm_eval

    with suites.quiet():
        lm_eval.simple_evaluate(model=model, tasks=[task], limit=limit, bootstrap_iters=0)
    answers = [instance.resps[0] for instance in task.instances]
    return [a[0] if isinstance(a, tuple | list) else a for a in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--rolling", type=int, default=5, help="pages of wikitext")
    options = parser.parse_args()
    mesh.one_device_a_core()
    rows = []
    with tempfile.TemporaryDirectory() as exported:
        words = ["--checkpoint", str(options.checkpoint), "--out", f"{exported}/hf"]
        assert cli.main(["export", *words]) == 0
        ours = our_model(options.checkpoint)
        # Sums of thousands of nats in float32 would be off by more than what is looked for.
        theirs = their_model(pathlib.Path(exported) / "hf", 16, ours.max_length, "float64")
        for name in suites.SUITES["paper"]:
            limit = options.rolling if name == "wikitext" else options.limit
            answers = []
            for model in (ours, theirs):
                (task,) = suites.load_tasks([name], options.data_dir)
                answers.append(log_likelihoods(model, task, limit))
            apart = [abs(a - b) for a, b in zip(*answers, strict=True)]
            least = min(min(a) for a in answers)
            rows.append([name, f"{limit}", f"{len(apart):,}", f"{max(apart):.1e}", f"{least:,.1f}"])
            print(rows[-1], flush=True)
    header = [
        "task",
        "documents",
        "requests",
        "largest difference, nats",
        "smallest log-likelihood",
    ]
    report.publish("agreement", report.table(header, rows), PAGE)


if __name__ == "__main__":
    main()
