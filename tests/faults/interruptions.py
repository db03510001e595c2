"""Kills and terminates commands at random moments; their figures must be those of undisturbed ones.

    python tests/faults/interruptions.py [--times 20] [--seed 0] [train eval sweep import export]

Each command is run once undisturbed. Then, `times` times with SIGKILL and as often with SIGTERM,
it is started and sent the signal at a random moment of its life (imports and the last writes
included), and the same command is given again until it succeeds. Train and sweep go on in one
folder, so that interruptions add up; eval, import and export begin in a fresh one each time.
What blocks the next start, or ends in another figure than the undisturbed command's, counts as
lost. Prints a line per command; the exit status is 1 if anything was lost.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import kills  # noqa: E402

SHORT = ("--training.num_steps", 40, "--training.eval_every", 20, "--training.checkpoint_every", 5)
LONG = ("--training.num_steps", 300, *SHORT[2:])
SWEEP = """
import dataclasses
import pathlib

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    base = config_io.load_config(pathlib.Path(__file__).parent / "config.py")
    training = dataclasses.replace(base.training, num_steps=40, checkpoint_every=5)
    return Sweep(
        name="two",
        base=dataclasses.replace(base, training=training),
        arms=(
            Arm(name="uniform", changes={"model.taper.schedule": "uniform"}),
            Arm(name="cosine", changes={"model.taper.start": 1.5}),
        ),
        seeds=(3, 4),
    )
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A command, where it writes, and the figures that it must come to."""

    words: Callable[[pathlib.Path], Sequence[object]]
    """The command line for an output folder."""
    figures: Callable[[pathlib.Path], object]
    """What must be equal, of an output folder."""
    prepare: Callable[[pathlib.Path], None] = lambda out: None
    """Makes an output folder that the command may find."""
    goes_on: bool = False
    """Whether one folder suffers all interruptions."""


def start(words: Sequence[object], folder: pathlib.Path) -> subprocess.Popen[str]:
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tlm_jax", *map(str, words)],
        env=os.environ | variables,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(words: Sequence[object], folder: pathlib.Path) -> str:
    """Runs a command to its end; returns what it said if it failed, else nothing."""
    for _ in range(3):  # 75 says: the same command again
        process = start(words, folder)
        said, _ = process.communicate(timeout=600)
        if process.returncode != 75:
            break
    return "" if process.returncode == 0 else f"status {process.returncode}: {said[-600:]}"


def metrics(run: pathlib.Path) -> object:
    """Losses of every step, and those of the last evaluation."""
    train, evaluations = {}, {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the torn line of a killed process
        if record["kind"] == "train":
            train[record["step"]] = record["loss"]
        elif record["kind"] == "eval":
            evaluations[record["step"]] = record["loss"]
    return train, evaluations


def scores(run: pathlib.Path) -> object:
    """The metrics of all suites, and their number."""
    found = {}
    for path in sorted((run / "eval").glob("*.json")):
        record = json.loads(path.read_text())
        found |= {(m["task"], m["name"]): m["value"] for m in record["metrics"]}
    return found


def results(folder: pathlib.Path) -> object:
    """Loss of each cell of a sweep."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {(r["arm"], r["seed"]): r["final"]["loss"] for r in records}


def contents(folder: pathlib.Path) -> object:
    """A hash of every file, but for those that hold times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".model", ".jinja", ".py"):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def parameters(folder: pathlib.Path) -> object:
    """A hash of each parameter of an imported folder."""
    import jax
    import numpy as np
    from interop.folders import read_run

    config, params = read_run(folder)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return str(config.model), {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves
    }


def cases(folder: pathlib.Path) -> dict[str, Case]:
    """Inputs of all commands, and the commands."""
    kills.write_inputs(folder)
    (folder / "sweep.py").write_text(SWEEP)
    tokenizer = ROOT / "tlm_jax" / "data" / "corpus" / "tokenizer.json"
    from evaluation import rows
    from interop.folders import write_llama

    write_llama(
        folder / "llama", tokenizer, vocab_size=4096, hidden_size=256, intermediate_size=768
    )
    rows.write(folder / "rows")
    trained = folder / "trained"
    train = ("train", "--config", folder / "config.py", "--workdir")
    fault = finish((*train, trained, *SHORT), folder)
    assert not fault, fault
    return {
        "train": Case(
            words=lambda out: (*train, out, *LONG),
            figures=metrics,
            goes_on=True,
        ),
        "sweep": Case(
            words=lambda out: ("sweep", folder / "sweep.py", "--out", out),
            figures=results,
            goes_on=True,
        ),
        "eval": Case(
            words=lambda out: (
                "eval", "--checkpoint", out, "--tasks", "piqa", "arc_easy", "wikitext",
                "--data_dir", folder / "rows",
            ),
            figures=scores,
            prepare=lambda out: shutil.copytree(trained, out) and None,
        ),
        "import": Case(
            words=lambda out: ("import", "--model", folder / "llama", "--out", out),
            figures=parameters,
        ),
        "export": Case(
            words=lambda out: ("export", "--checkpoint", trained, "--out", out),
            figures=contents,
        ),
    }  # fmt: skip


def disturb(
    case: Case, folder: pathlib.Path, name: str, times: int, number: int, rng: random.Random
) -> list[str]:
    """Interrupts a command so many times with a signal; returns what was lost."""
    undisturbed = folder / f"{name}-undisturbed"
    if not undisturbed.exists():
        case.prepare(undisturbed)
        if fault := finish(case.words(undisturbed), folder):
            raise SystemExit(f"{name} fails undisturbed: {fault}")
    fresh = folder / f"{name}-timed"  # a second time, with all programs in the cache
    case.prepare(fresh)
    begin = time.monotonic()
    finish(case.words(fresh), folder)
    length = time.monotonic() - begin
    shutil.rmtree(fresh)
    expected = case.figures(undisturbed)
    lost, sent = [], 0
    for index in range(times):
        out = folder / f"{name}-{number}" / ("all" if case.goes_on else str(index))
        out.parent.mkdir(exist_ok=True)
        if not case.goes_on:
            case.prepare(out)
        process = start(case.words(out), folder)
        wait = rng.uniform(0, min(length, 15.0))
        try:
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            sent += 1
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                lost.append(f"{index}: did not end within a minute of the signal")
        # A cell's process of a killed sweep ends with it, within moments.
        if case.goes_on and index + 1 < times:
            continue
        if fault := finish(case.words(out), folder):
            lost.append(f"{index}, after {wait:.1f} s: {fault}")
        elif (found := case.figures(out)) != expected:
            lost.append(f"{index}, after {wait:.1f} s: {difference(found, expected)}")
        left = [p.name for p in out.parent.iterdir() if p.name.startswith(".")]
        if left:
            lost.append(f"{index}, after {wait:.1f} s: {left} is left beside the folder")
        if not case.goes_on:
            shutil.rmtree(out, ignore_errors=True)
    print(
        f"{name:6} {signal.Signals(number).name}: {sent} of {times} sent in time, "
        f"{len(lost)} lost (undisturbed {length:.1f} s)",
        flush=True,
    )
    for line in lost:
        print(f"    {line}", flush=True)
    return lost


def difference(found: object, expected: object) -> str:
    return f"figures differ: {str(found)[:300]} for {str(expected)[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("commands", nargs="*")
    options = parser.parse_args()
    rng, lost = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        known = cases(folder)
        for command in options.commands or known:
            for number in (signal.SIGKILL, signal.SIGTERM):
                lost += len(disturb(known[command], folder, command, options.times, number, rng))
    print(f"lost {lost}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
