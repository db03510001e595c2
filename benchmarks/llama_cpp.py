"""Exports as GGUF in llama.cpp itself, against this library.

    python -m benchmarks.llama_cpp --python X/bin/python [--smollm2 FILE]

X is an environment with llama-cpp-python (pip install llama-cpp-python, which compiles llama.cpp).
FILE is SmolLM2-135M-Instruct as GGUF (docs/interop.md says where from); without it that row is
left out. A tapered tiny model is trained for a minute, one with tapered heads is random. Both sides
read the same tokens of docs/concepts.md in float32, then decode greedily. The table goes to
docs/export.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.evaluation import open_run
from benchmarks.step_time import ROOT
from tlm_jax import cli
from tlm_jax import config as c
from tlm_jax.data import load_tokenizer
from tlm_jax.models import sampling, skeleton
from tlm_jax.training import checkpoint

READ, WRITE = 150, 100
"""Tokens; together no more than the tiny model was trained on."""
HEADS = c.ModelConfig(
    vocab_size=4096,
    num_layers=6,
    d_model=128,
    mlp_width=320,
    mixer=c.AttentionConfig(
        num_heads=8, num_kv_heads=4, head_dim=16, heads_taper=c.TaperConfig(start=1.5, end=0.5)
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One export: the model's name in the table, its run folder and the type of its tensors."""

    name: str
    run: pathlib.Path
    dtype: str = "float32"


def train_tiny(
    folder: pathlib.Path, steps: int, config: str = "configs/tiny.py", *options: str
) -> None:
    """Trains a config for so many steps."""
    words = ["--config", config, "--workdir", str(folder), *options]
    words += ["--training.num_steps", str(steps), "--training.eval_every", str(steps)]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True)


def make_random(folder: pathlib.Path, model: c.ModelConfig) -> None:
    """A run folder whose one checkpoint holds the parameters that training would begin with."""
    run = c.RunConfig(name="heads", model=model)
    params = skeleton(model).init(jax.random.key(0))
    layout = {"tokenizer": load_tokenizer(None).fingerprint, "dataset": "none"}
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save_params(0, params, checkpoint.metadata(run, params, layout))


def ours(run: pathlib.Path, text: str) -> dict[str, Any]:
    """What this library computes; see `llama_cpp_worker.answer`. `read` are the tokens."""
    _, tokenizer, model, params, _ = open_run(run)
    tokens = tokenizer.encode(text)
    read = tokens[:READ]

    def forward(params: Any, tokens_BL: jax.Array) -> jax.Array:
        merged = model.merge(params)
        return merged.logits(merged(tokens_BL)[0])

    logits = np.asarray(jax.jit(forward)(params, np.asarray([read], np.int32)))[0]
    greedy = sampling.stream(
        model,
        params,
        np.asarray([read], np.int32),
        sampling.SamplingConfig(temperature=0.0),
        num_tokens=WRITE,
        vocab_size=model.config.vocab_size,
    )
    written = [int(token) for (token,) in greedy]
    return {"logits": logits, "written": written, "tokens": tokens, "read": read}


def theirs(python: str, file: pathlib.Path, read: list[int], text: str) -> Any:
    """What llama.cpp computes."""
    out = file.with_suffix(".npz")
    request = json.dumps({"tokens": read, "text": text, "new": WRITE})
    worker = str(ROOT / "benchmarks" / "llama_cpp_worker.py")
    subprocess.run([python, worker, str(file), str(out)], input=request, text=True, check=True)
    return np.load(out)


def compare(row: Row, python: str, text: str, scratch: pathlib.Path) -> tuple[list[str], str]:
    """A line of the table, and llama.cpp's version."""
    words = ["export", "--checkpoint", str(row.run)]
    name = f"{row.run.name}-{row.dtype}"
    out = scratch / name
    gguf = [*words, "--out", str(out), "--format", "gguf", "--dtype", row.dtype]
    assert cli.main(gguf) == 0
    file = out / "model.gguf"
    here = ours(row.run, text)
    there = theirs(python, file, here["read"], text)
    apart = float(np.abs(here["logits"] - there["logits"]).max())
    same = int((here["logits"].argmax(-1) == there["logits"].argmax(-1)).sum())
    equal = [a == b for a, b in zip(here["written"], there["written"].tolist(), strict=True)]
    first = equal.index(False) if False in equal else len(equal)
    line = [
        row.name,
        row.dtype,
        f"{apart:.1e}",
        f"{np.abs(here['logits']).max():.0f}",
        f"{same} of {READ}",
        f"{first} of {WRITE}",
        "yes" if there["tokens"].tolist() == here["tokens"] else "no",
        f"{file.stat().st_size / 1e6:,.1f}",
        padded_size(row, scratch),
    ]
    print(line, flush=True)
    return line, str(there["version"])


def padded_size(row: Row, scratch: pathlib.Path) -> str:
    """MB of the tensors of the export that pads every MLP; of float32 or bfloat16 alone."""
    if row.dtype not in ("float32", "bfloat16"):
        return ""
    out = scratch / f"{row.run.name}-padded-{row.dtype}"
    words = ["export", "--checkpoint", str(row.run), "--out", str(out), "--format", "llama"]
    if cli.main([*words, "--dtype", row.dtype]) != 0:
        return "not possible"
    return f"{sum(f.stat().st_size for f in out.glob('*.safetensors')) / 1e6:,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="with llama-cpp-python")
    parser.add_argument("--smollm2", type=pathlib.Path, default=os.environ.get("TLM_SMOLLM2"))
    parser.add_argument("--steps", type=int, default=60, help="of the tiny model's training")
    parser.add_argument(
        "--runs", type=pathlib.Path, help="keeps run folders, and takes those there"
    )
    options = parser.parse_args()
    text = (ROOT / "docs" / "concepts.md").read_text()
    lines, version = [], ""
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or pathlib.Path(scratch)
        tiny, heads, smollm2 = (runs / name for name in ("tiny", "heads", "smollm2"))
        if not tiny.exists():
            train_tiny(tiny, options.steps)
        if not heads.exists():
            make_random(heads, HEADS)
        rows = [
            *(Row(name="tiny, tapered MLPs", run=tiny, dtype=dtype)
              for dtype in ("float32", "float16", "bfloat16", "q8_0")),
            Row(name="random, tapered MLPs and heads", run=heads),
        ]  # fmt: skip
        if options.smollm2:
            words = ["import", "--model", str(options.smollm2), "--out", str(smollm2)]
            assert smollm2.exists() or cli.main(words) == 0
            rows.append(Row(name="SmolLM2-135M-Instruct, uniform", run=smollm2))
        for row in rows:
            line, version = compare(row, options.python, text, pathlib.Path(scratch))
            lines.append(line)
    header = ["model", "type", "largest difference of logits", "largest logit", "argmax equal"]
    header += ["greedy tokens equal", "same tokens of a text", "MB", "MB padded"]
    report.publish(
        "llama.cpp",
        f"{report.table(header, lines)}\n\nllama-cpp-python {version}; {report.software()}.",
        ROOT / "docs" / "export.md",
    )


if __name__ == "__main__":
    main()
