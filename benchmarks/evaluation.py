"""Throughput of evaluation suites: ours, and lm-eval's own Hugging Face backend.

    python -m benchmarks.evaluation --checkpoint RUN --data_dir FOLDER [--torch_python X/bin/python]

RUN is a Llama-like run folder, such as `tlm import` makes of SmolLM2; it is exported for the other
arms, which need an environment X with lm-eval, transformers and PyTorch (the extra `reference`).
FOLDER holds TASK/SPLIT.jsonl. lm-eval's default is one request at a time; the other arms have a
batch that suits a CPU. MKL keeps its AVX-512 kernels from processors of other makers; in the arm
"unlocked" a preloaded library lifts that (needs a C compiler; nothing to lift on Intel's own).

All arms answer the same rows of the same lm-eval tasks in float32 on all cores, each in a process
of its own, in turn. Seconds are those of lm-eval's whole run of a task: building requests,
tokenising, the model, metrics; loading is left out, lm-eval's index of all its tasks (8 s) too.
Ours compiles in the first round.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import race

TASKS = ("hellaswag", "piqa", "lambada_openai")
OURS = "tlm-jax"
BATCH_SIZES = {"as installed": 1, "batch of 16": 16, "batch of 16, MKL unlocked": 16}
"""Of the arms with lm-eval's own backend, transformers and PyTorch."""


def open_run(folder: pathlib.Path) -> tuple[Any, Any, Any, Any, Any]:
    """A run's (metadata, tokenizer, model, params, mesh); the mesh becomes the current one."""
    import jax

    from tlm_jax.distributed import mesh as mesh_lib
    from tlm_jax.models import skeleton
    from tlm_jax.training import restore

    step, metadata = restore.saved_metadata(folder, None)
    config = restore.saved_config(metadata)
    mesh = mesh_lib.device_mesh(config.mesh)
    jax.set_mesh(mesh)
    tokenizer, model = restore.model_tokenizer(config, metadata), skeleton(config.model)
    params = restore.load_params(folder, step, model, tokenizer, mesh)
    return metadata, tokenizer, model, params, mesh


def our_model(folder: pathlib.Path) -> Any:
    """A harness model of a run folder."""
    from tlm_jax.distributed import mesh as mesh_lib
    from tlm_jax.evaluation.generation import Generator
    from tlm_jax.evaluation.harness import HarnessModel
    from tlm_jax.evaluation.journal import Journal
    from tlm_jax.evaluation.scoring import Scorer
    from tlm_jax.training import restore

    mesh_lib.one_device_a_core()  # first: Orbax asks for devices when it reads metadata
    metadata, tokenizer, model, params, mesh = open_run(folder)
    max_length = restore.saved_config(metadata).data.seq_len
    return HarnessModel(
        Scorer(model, params, mesh, max_length=max_length),
        Generator(model, params, tokenizer, mesh, max_length=max_length),
        tokenizer,
        prefix=restore.document_prefix(metadata, tokenizer),
        journal=Journal(None, {}),
        advance=lambda *_: None,
    )


def their_model(
    folder: pathlib.Path,
    batch_size: int,
    max_length: int | None = None,
    softmax_dtype: str | None = None,
    remote_code: bool = False,
) -> Any:
    """lm-eval's Hugging Face backend, in float32; `softmax_dtype` is that of its sums too."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(os.cpu_count() or 1)
    return HFLM(
        pretrained=str(folder),
        device="cpu",
        dtype="float32",
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype=softmax_dtype,
        trust_remote_code=remote_code,
    )


def serve(make: Callable[[], Any], data_dir: pathlib.Path, limit: int) -> None:
    """For each task named on standard input: seconds, requests and metrics, as JSON."""
    import lm_eval.tasks

    from tlm_jax.evaluation import suites

    model = make()
    no_others = lm_eval.tasks.TaskManager(include_defaults=False)
    tasks = dict(zip(TASKS, suites.load_tasks(TASKS, data_dir), strict=True))
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        name = line.strip()
        if hasattr(model, "forget"):
            model.forget()  # every round answers anew
        begin = time.perf_counter()
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[tasks[name]],
            task_manager=no_others,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        seconds = time.perf_counter() - begin
        assert results is not None
        values = {k: v for k, v in results["results"][name].items() if isinstance(v, float)}
        requests = len(tasks[name].instances)
        print(json.dumps([seconds, requests, values]), file=answers, flush=True)


def compare(options: argparse.Namespace) -> None:
    """Publishes the table."""
    from benchmarks import report
    from tlm_jax import cli

    with tempfile.TemporaryDirectory() as temporary:
        exported = f"{temporary}/exported"
        assert cli.main(["export", "--checkpoint", str(options.checkpoint), "--out", exported]) == 0
        unlocked = race.unlocked_mkl(pathlib.Path(temporary))
        workers = {}
        for arm in (OURS, *BATCH_SIZES):
            variables = unlocked if "unlocked" in arm else {}
            python = sys.executable if arm == OURS else options.torch_python
            model = options.checkpoint if arm == OURS else exported
            words = ["--arm", arm, "--checkpoint", str(model), "--data_dir", str(options.data_dir)]
            workers[arm] = subprocess.Popen(
                [python, "-m", "benchmarks.evaluation", *words, "--limit", str(options.limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | variables,
            )
        times: dict[tuple[str, str], list[float]] = {}
        requests: dict[str, int] = {}
        for turn in range(options.rounds):
            for task in TASKS:
                for arm in list(workers) if turn % 2 == 0 else list(workers)[::-1]:
                    worker = workers[arm]
                    assert worker.stdin is not None
                    assert worker.stdout is not None
                    worker.stdin.write(f"{task}\n")
                    worker.stdin.flush()
                    seconds, requests[task], values = json.loads(worker.stdout.readline())
                    times.setdefault((task, arm), []).append(seconds)
                    print(f"{task} {arm}: {requests[task] / seconds:.1f} requests/s {values}")
        for worker in workers.values():
            worker.communicate()
    rows = []
    for task in TASKS:
        cells = [task, f"{requests[task]:,}"]
        ours = times[task, OURS]
        for arm in workers:
            first, *later = times[task, arm]
            steady = statistics.median(later or [first])
            cells.append(f"{requests[task] / steady:.1f}")
            if arm == OURS:
                cells.append(f"{requests[task] / first:.1f}")
            else:
                both = zip(times[task, arm][1:], ours[1:], strict=True)
                cells.append(f"{statistics.median(a / b for a, b in both):.2f}")
        rows.append(cells)
    header = ["task", "requests", "ours, per s", "first round"]
    for arm in BATCH_SIZES:
        header += [f"{arm}, per s", "ours over it"]
    report.publish(
        "evaluation",
        f"{report.table(header, rows)}\n\nThe first {options.limit} rows of each task; requests "
        f"per second, median of {options.rounds - 1} alternating round(s) after the first, in "
        f"which ours, with one device per core, compiles. {report.software()}.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True)
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", help="run as one of the processes")
    options = parser.parse_args()
    if options.arm == OURS:
        serve(lambda: our_model(options.checkpoint), options.data_dir, options.limit)
    elif options.arm:
        make = lambda: their_model(options.checkpoint, BATCH_SIZES[options.arm])  # noqa: E731
        serve(make, options.data_dir, options.limit)
    else:
        compare(options)


if __name__ == "__main__":
    main()
