"""Log-likelihoods of ours against lm-eval's Hugging Face backend, request by request.

    python -m benchmarks.agreement --checkpoint RUN --data_dir FOLDER [--limit 100]
    python -m benchmarks.agreement --checkpoint RUN --data_dir FOLDER --original FILE_OR_FOLDER

RUN is a Llama-like run folder (`tlm import`); needs the extras `eval` and `reference`. Their logits
are float32 and added up in float64, as ours are. Without --original they read our export, and the
table is written to docs/evaluation.md. With it they read the files that RUN was imported from, with
the tokenizer that transformers makes of them, and the table is written to docs/interop.md: whole
pages, twelve examples before each question, and answers to messages.
"""

import argparse
import copy
import pathlib
import tempfile
import time
from typing import Any

from benchmarks import report
from benchmarks.evaluation import open_run, our_model, their_model
from tlm_jax import cli
from tlm_jax.distributed import mesh
from tlm_jax.evaluation import suites

DOCS = pathlib.Path(__file__).parents[1] / "docs"
FEWSHOT = 12
FEWSHOT_TASKS = ("boolq", "arc_easy")
MESSAGES = (
    "What is the capital of France?",
    "List three uses of a paper clip.",
    "Write a haiku about the sea in winter.",
    "What is 17 + 25? Explain.",
)


def log_likelihoods(
    model: Any, task: Any, limit: int, num_fewshot: int | None = None
) -> list[float]:
    """What a model answers to a task's requests, in their order."""
    import lm_eval

    with suites.quiet():
        lm_eval.simple_evaluate(
            model=model, tasks=[task], limit=limit, num_fewshot=num_fewshot, bootstrap_iters=0
        )
    answers = [instance.resps[0] for instance in task.instances]
    return [a[0] if isinstance(a, tuple | list) else a for a in answers]


def compare(
    ours: Any, theirs: Any, name: str, data_dir: pathlib.Path, limit: int, shots: int | None = None
) -> tuple[list[str], list[str]]:
    """A row of the table, and the texts of the requests: a task on both."""
    answers, seconds = [], []
    for model in (ours, theirs):
        (task,) = suites.load_tasks([name], data_dir)
        begin = time.perf_counter()
        answers.append(log_likelihoods(model, task, limit, shots))
        seconds.append(f"{time.perf_counter() - begin:.0f} s")
    apart = [abs(a - b) for a, b in zip(*answers, strict=True)]
    least = min(min(a) for a in answers)
    label = f"{name}, {shots} examples" if shots else name
    row = [label, f"{limit}", f"{len(apart):,}", f"{max(apart):.1e}", f"{least:,.1f}"]
    print(row, seconds, flush=True)
    return row, ["".join(instance.args) for instance in task.instances]


def with_export(options: argparse.Namespace) -> None:
    """The suite `paper`, on our export."""
    rows = []
    with tempfile.TemporaryDirectory() as exported:
        words = ["--checkpoint", str(options.checkpoint), "--out", f"{exported}/hf"]
        assert cli.main(["export", *words]) == 0
        ours = our_model(options.checkpoint)
        # Sums of thousands of nats in float32 would be off by more than what is looked for.
        theirs = their_model(pathlib.Path(exported) / "hf", 16, ours.max_length, "float64")
        for name in suites.SUITES["paper"]:
            limit = options.rolling if name == "wikitext" else options.limit
            rows.append(compare(ours, theirs, name, options.data_dir, limit)[0])
    report.publish("agreement", report.table(_header(), rows), DOCS / "evaluation.md")


def with_original(options: argparse.Namespace) -> None:
    """Long requests and chats, on the original files."""
    from benchmarks import original

    ours = our_model(options.checkpoint)
    model, tokenizer = original.read(options.original)
    unequal = original.unequal_weights(model, options.original)
    unchanged = copy.deepcopy(tokenizer)
    original.cut_digits(tokenizer)
    theirs = original.backend(model, tokenizer, ours.max_length)
    assert theirs.prefix_token_id == ours.prefix_token_id
    tasks: list[tuple[str, int, int | None]] = [("wikitext", options.rolling, None)]
    tasks += [(name, options.limit, FEWSHOT) for name in FEWSHOT_TASKS]
    rows, texts = [], []
    for name, limit, shots in tasks:
        row, asked = compare(ours, theirs, name, options.data_dir, limit, shots)
        rows.append(row)
        texts += asked
    alike = [
        sum(t.encode(x, add_special_tokens=False) == ours.tok_encode(x) for x in texts)
        for t in (unchanged, tokenizer)
    ]
    same, tokens = chats(options.checkpoint, model, tokenizer)
    text = "\n\n".join(
        (
            report.table(_header(), rows),
            f"Answers to {len(MESSAGES)} messages, greedily: {same} equal token by token, "
            f"{tokens} tokens in all, prompts and ends included.",
            f"Of {len(texts)} requests transformers' own tokenizer makes {alike[0]} into the same "
            f"tokens, and {alike[1]} when it cuts off digits. Weights that differ: {unequal}.",
            f"{report.software()}.",
        )
    )
    report.publish("agreement with the original", text, DOCS / "interop.md")


def chats(folder: pathlib.Path, model: Any, tokenizer: Any) -> tuple[int, int]:
    """(answers that are equal token by token, their tokens)."""
    import jax

    from benchmarks import original
    from tlm_jax.models.sampling import SamplingConfig
    from tlm_jax.training import restore

    metadata, ours, structure, params, _ = open_run(folder)
    params = jax.device_put(params, jax.devices()[0])
    same = tokens = 0
    for message in MESSAGES:
        ids = restore.prompt_ids(folder, metadata, ours, message, as_chat=True)
        expected = original.chat_ids(tokenizer, message)
        expected += original.answer(model, expected, 100)
        *_, ((*written,),) = restore.continuations(
            structure,
            params,
            ours,
            ids,
            SamplingConfig(temperature=0.0),
            num_tokens=100,
            num_samples=1,
            seed=0,
        )
        answer = [*ids, *written]
        if len(written) < 100:  # theirs keeps what ended it
            answer.append(expected[-1] if expected[-1] in ours.end_ids else -1)
        same += answer == expected
        tokens += len(expected)
        print(answer == expected, repr(ours.decode(written)), flush=True)
    return same, tokens


def _header() -> list[str]:
    return [
        "task",
        "documents",
        "requests",
        "largest difference, nats",
        "smallest log-likelihood",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--rolling", type=int, default=5, help="pages of wikitext")
    parser.add_argument("--original", type=pathlib.Path, help="what RUN was imported from")
    options = parser.parse_args()
    mesh.one_device_a_core()
    if options.original:
        with_original(options)
    else:
        with_export(options)


if __name__ == "__main__":
    main()
