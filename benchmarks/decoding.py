"""Greedy decoding of an imported model: ours, and transformers' generate with a static cache.

    python -m benchmarks.decoding --checkpoint RUN --torch_python X/bin/python

RUN is a Llama-like run folder, such as `tlm import` makes of SmolLM2; it is exported for
transformers. X is an environment with torch and transformers. Both write the same number of tokens
after the same prompts in float32, in turn; the table goes to docs/speed.md.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import race, report
from benchmarks.step_time import ROOT
from tlm_jax import cli
from tlm_jax.cli import large_pages
from tlm_jax.data import load_tokenizer
from tlm_jax.training import restore

PROMPT, NEW = 64, 64
"""Tokens of a prompt, and to write after it."""
OURS, THEIRS = "tlm-jax", "torch, as installed"


def prompts(checkpoint: pathlib.Path, rows: int) -> list[list[int]]:
    """Rows of `PROMPT` tokens, from docs/concepts.md."""
    _, metadata = restore.saved_metadata(checkpoint, None)
    tokenizer = load_tokenizer(restore.saved_config(metadata).data.tokenizer)
    text = (ROOT / "docs" / "concepts.md").read_text()
    tokens = tokenizer.encode(text)
    return [list(tokens[i * PROMPT : (i + 1) * PROMPT]) for i in range(rows)]


def compare(
    options: argparse.Namespace, rows: int, exported: str, unlocked: dict[str, str]
) -> tuple[str, list[list[str]]]:
    """Their versions, and the table's rows for batches of so many rows."""
    words = [json.dumps(prompts(options.checkpoint, rows)), str(NEW)]
    ours = [sys.executable, "-m", "benchmarks.generate_worker", str(options.checkpoint), *words]
    script = str(ROOT / "benchmarks" / "torch_generate_worker.py")
    theirs = [options.torch_python, script, exported, *words]
    pages = {large_pages.VARIABLE: large_pages.VALUE}
    arms = {
        OURS: race.Entrant(command=ours, env=pages),
        THEIRS: race.Entrant(command=theirs),
        "torch, MKL unlocked": race.Entrant(command=theirs, env=unlocked),
    }
    found = race.run(arms, options.turns)
    return found[THEIRS].said["versions"], [
        [
            str(rows),
            arm,
            f"{rows * NEW / one.median:.1f}",
            one.middle_half,
            f"{race.ratio(one, found[OURS]):.2f}",
            f"{same(one.said['written'], found[OURS].said['written']):.0%}",
            f"{one.said['peak_mib']:,.0f}",
        ]
        for arm, one in found.items()
    ]


def same(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """Share of tokens that two continuations have in common, place by place."""
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(x == y for x, y in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--torch_python", required=True)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    options = parser.parse_args()
    versions, table = "", list[list[str]]()
    with tempfile.TemporaryDirectory() as folder:
        exported, unlocked = f"{folder}/exported", race.unlocked_mkl(pathlib.Path(folder))
        assert cli.main(["export", "--checkpoint", str(options.checkpoint), "--out", exported]) == 0
        for rows in options.rows:
            versions, lines = compare(options, rows, exported, unlocked)
            table += lines
    header = ["rows", "", "tokens/s", "ms per batch, middle half", "time over ours", "same tokens"]
    report.publish(
        "decoding",
        f"{report.table([*header, 'peak MiB'], table)}\n\n{NEW} tokens after prompts of {PROMPT}, "
        f"read included, float32; medians of {options.turns} alternating batches, ratios over "
        f"pairs. {versions}; {report.software()}.",
    )


if __name__ == "__main__":
    main()
