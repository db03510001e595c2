"""Flips single bits in the files of a run folder, and counts what changes a figure in silence.

    python tests/faults/flips.py [--flips 100] [--seed 0]

A small model is trained and evaluated on suites. Then, so many times in its array files and so many
times in all its other files: a copy of the run folder gets one flipped bit; its last validation
loss and the results of its suites are read, it is evaluated, and trained for two more steps. Each
figure must be that of the untouched folder, or the program must say what is wrong. The exit status
is 1 if a figure changed in silence, or anything ended in a stack trace.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import kills  # noqa: E402
from evaluation import rows  # noqa: E402

STEPS = 12
_DRAWINGS = (".png", ".vm")  # TensorBoard's files end in the host's name


def _run(*words: object) -> tuple[int, str]:
    """Status and all output of `tlm`, run in this process."""
    from tlm_jax import cli

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = cli.main([str(word) for word in words])
        except Exception as error:
            status, text = -1, f"{type(error).__name__}: {error}"
            output.write(f"error: stack trace, {text}")
    return status, output.getvalue()


def _figures(run: pathlib.Path, config: pathlib.Path) -> tuple[dict[str, Any], str]:
    """What the program says of a run folder, and all its messages."""
    from tlm_jax.training import metrics

    figures: dict[str, Any] = {}
    status, reported = _run("report", run, "--markdown")
    if status == 0:
        figures["report"] = reported
    status, said = _run("eval", "--checkpoint", run)
    if status == 0:
        figures["evaluation"] = json.loads(said.splitlines()[-1])["loss"]
    try:
        record = metrics.last_record(run, "eval")
        figures["last"] = None if record is None else [record["step"], record["loss"]]
    except Exception as error:
        said += f"\nerror: {error}"
    words = ["--training.num_steps", STEPS + 2, "--training.checkpoint_every", STEPS // 2]
    status, trained = _run("train", "--config", config, "--workdir", run, *words)
    if status == 0:
        losses = {}
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # the flipped line
                record = json.loads(line)
                if record.get("kind") == "train":
                    losses[record["step"]] = record["loss"]
        figures["training"] = [losses.get(STEPS + 1), losses.get(STEPS + 2)]
    return figures, reported + said + trained


def _flip(path: pathlib.Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"byte {place}, bit {bit}"


def _is_array(path: pathlib.Path) -> bool:
    return "state" in path.parts and ("d" in path.parts or path.suffix == ".ocdbt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        kills.write_inputs(folder)
        run, config, copy = folder / "run", folder / "config.py", folder / "copy"
        words = ["--training.num_steps", STEPS, "--training.checkpoint_every", STEPS // 2]
        status, said = _run("train", "--config", config, "--workdir", run, *words)
        assert status == 0, said
        rows.write(folder / "rows")
        suites = ["--tasks", "piqa", "wikitext", "--data_dir", folder / "rows"]
        status, said = _run("eval", "--checkpoint", run, *suites)
        assert status == 0, said
        shutil.copytree(run, copy)
        whole, said = _figures(copy, config)
        print(f"untouched: {whole}", flush=True)
        assert len(whole) == 4, said
        newest = run / "checkpoints" / str(STEPS)
        arrays = [p for p in newest.rglob("*") if p.is_file() and _is_array(p)]
        others = [
            p
            for p in run.rglob("*")
            if p.is_file()
            and p.stat().st_size
            and not _is_array(p)
            and p.suffix not in _DRAWINGS
            and "tensorboard" not in p.parts
        ]
        for kind, files in (("array files", arrays), ("other files", others)):
            rng = random.Random(options.seed)
            weights = [p.stat().st_size if kind == "array files" else 1 for p in files]
            results: collections.Counter[str] = collections.Counter()
            for _ in range(options.flips):
                path = rng.choices(files, weights)[0]
                shutil.rmtree(copy)
                shutil.copytree(run, copy)
                place = _flip(copy / path.relative_to(run), rng)
                figures, said = _figures(copy, config)
                changed = {k: v for k, v in figures.items() if v != whole[k]}
                told = any(w in said for w in ("damaged", "error: ", "not valid", "cannot"))
                result = "silent" if changed and not told else "told" if told else "no effect"
                results[result] += 1
                if result == "silent" or "stack trace" in said:
                    faults += 1
                    where = path.relative_to(run)
                    trace = said[said.find("error: stack") :][:300] if "stack trace" in said else ""
                    print(f"{where}, {place}: {result} {changed} {trace}", flush=True)
            print(f"{options.flips} flips in {kind}: {dict(results)}", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
