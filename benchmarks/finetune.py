"""Fine-tuning an imported model, straight and with a SIGKILL on the way.

    python -m benchmarks.finetune --model RUN [--steps 50] [--work FOLDER] [--precision bfloat16]

Trains on the text that the package carries, as `tlm train --init_from RUN` does, and takes the loss
on held-out rows before and after. A second training is killed once a checkpoint in the middle is
whole, and resumed: its parameters must be equal. Writes docs/results/retaper.json and
docs/retaper.md.
"""

import argparse
import pathlib
import signal
import subprocess
import sys
import time

from benchmarks import report
from benchmarks import retaper as bench
from tlm_jax import files
from tlm_jax.training import checkpoint, restore

NAME = "finetune"


def killed(command: list[str], out: pathlib.Path, step: int) -> None:
    """Runs a training until a checkpoint of `step` is whole, and some of the next step."""
    process = subprocess.Popen(command, cwd=bench.ROOT)
    while not (out / "checkpoints" / str(step)).exists():
        if process.poll() is not None:
            raise SystemExit(f"the training ended by itself with status {process.returncode}")
        time.sleep(0.5)
    time.sleep(5)
    process.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/finetune"))
    parser.add_argument("--train_into", type=pathlib.Path, help="only train, into this run folder")
    options = parser.parse_args()
    options.checkpoint_every = options.steps // 2
    model, work = options.model.resolve(), options.work.resolve()
    if options.train_into is not None:
        bench.train(model, options.train_into, options, None)
        return
    command = [sys.executable, "-m", "benchmarks.finetune", *sys.argv[1:], "--train_into"]
    straight, broken = work / "straight", work / "broken"
    begin = time.perf_counter()
    subprocess.run([*command, str(straight)], check=True, cwd=bench.ROOT)
    seconds = time.perf_counter() - begin
    if not broken.exists():
        killed([*command, str(broken)], broken, options.checkpoint_every)
    subprocess.run([*command, str(broken)], check=True, cwd=bench.ROOT)

    _, saved = restore.saved_metadata(model, None)
    config = bench.shortened(restore.saved_config(saved), options)
    rows = {"prose": bench.prose_rows(config, options.rows)}
    before, after = (
        bench.losses(folder, rows, options.precision)["prose"] for folder in (model, straight)
    )
    found = [
        checkpoint.params_id(restore.saved_metadata(folder, options.steps)[1])
        for folder in (straight, broken)
    ]
    record = {
        "steps": options.steps,
        "tokens_per_step": options.length * options.batch,
        "rate": options.rate,
        "precision": options.precision,
        "before": before,
        "after": after,
        "resumed_equals_straight": found[0] == found[1],
        "seconds": round(seconds),
        "machine": report.software(),
    }
    whole = files.read_json(bench.RECORD) if bench.RECORD.exists() else {}
    files.write_json(bench.RECORD, whole | {NAME: record})
    report.publish(
        NAME,
        f"Loss on {options.rows} held-out rows of {options.length} tokens: {before:.4f} before, "
        f"{after:.4f} after {options.steps} steps of {record['tokens_per_step']} tokens "
        f"({options.precision}, peak learning rate {options.rate:g}, {seconds:,.0f} s on a shared "
        f"machine). Killed with SIGKILL after step {options.checkpoint_every} and resumed, the "
        f"parameters are {'equal bit for bit' if found[0] == found[1] else 'NOT equal'}. "
        f"{record['machine']}.",
        page=bench.PAGE,
    )


if __name__ == "__main__":
    main()
