"""Trains a small model to find needles in noise, and draws what it finds.

    python -m benchmarks.needle [--workdir runs/needle] [--examples 20000]

Makes texts of questions with their answers (keys and values of other seeds than those that are
evaluated), prepares them, trains configs/needle.py and evaluates S-NIAH-1. A third of the texts
repeat random tokens, a third random numbers: they teach to copy, which questions alone, with seven
digits to learn from in each, do not. Steps that are done are not repeated. The heat map goes to
docs/images/needle.png, the figures to docs/results/needle.json.
"""

import argparse
import json
import pathlib
import random
import shutil

from tlm_jax import cli
from tlm_jax.data import Tokenizer, load_tokenizer
from tlm_jax.evaluation import needle

ROOT = pathlib.Path(__file__).parents[1]
LENGTHS = (256, 320, 384, 448, 512)
"""Of prompt and answer; 128 of these tokens are left for the answer."""
SHORTEST, LONGEST = 100, 500
"""Tokens of the texts that are trained on."""


def write_texts(path: pathlib.Path, examples: int) -> None:
    """Questions followed by their answers, needles at random depths, as JSON lines."""
    tokenizer = load_tokenizer(None)
    with path.open("w", encoding="utf-8") as file:
        for index in range(examples):
            rng = random.Random(f"train {index}")
            size = rng.randint(SHORTEST, LONGEST)
            text = (single(size, tokenizer, rng), copies(rng), repeated(tokenizer, rng))[index % 3]
            file.write(json.dumps({"text": text}) + "\n")


def single(size: int, tokenizer: Tokenizer, rng: random.Random) -> str:
    """A text like those that are evaluated, with its answer."""
    example = needle.make_example(
        "niah_single_1", size, rng.random(), tokenizer, (), rng, answer_tokens=0
    )
    return f"{example.prompt} {example.answers[0]}."


def copies(rng: random.Random) -> str:
    """Random numbers, two or three times over: all but the first time can be foreseen."""
    numbers = " ".join(str(rng.randint(10**6, 10**7 - 1)) for _ in range(rng.randint(2, 8)))
    return "\n".join([numbers] * rng.randint(2, 3))


def repeated(tokenizer: Tokenizer, rng: random.Random) -> str:
    """Random tokens, two to four times over; hardly one occurs twice in what is repeated."""
    tokens = [rng.randrange(300, 4000) for _ in range(rng.randint(4, 40))]
    return tokenizer.decode(tokens * rng.randint(2, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs" / "needle")
    parser.add_argument("--examples", type=int, default=45_000)
    options = parser.parse_args()
    workdir: pathlib.Path = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    texts, prepared = workdir / "needles.jsonl", workdir / "prepared"
    if not texts.is_file():
        write_texts(texts.with_suffix(".part"), options.examples)
        texts.with_suffix(".part").rename(texts)
    run(["prepare", str(texts), "--out", str(prepared)])
    config = ["--config", str(ROOT / "configs" / "needle.py"), "--workdir", str(workdir)]
    run(["train", *config, "--data.path", str(prepared)])
    wanted = ["--needle.variants", "niah_single_1", "--needle.num_depths", "10"]
    lengths = ["--needle.lengths", *map(str, LENGTHS), "--needle.samples", "5"]
    run(["eval", "--checkpoint", str(workdir), "--tasks", "niah", *wanted, *lengths])
    record = max((workdir / "eval").glob("niah-*.json"), key=lambda file: file.stat().st_mtime)
    found = json.loads(record.read_text())
    kept = {key: found[key] for key in ("step", "metrics", "settings", "conditions", "versions")}
    kept["checkpoint"] = "runs/needle"
    target = ROOT / "docs" / "results" / "needle.json"
    target.write_text(json.dumps(kept, indent=1) + "\n")
    shutil.copy(record.with_suffix(".png"), ROOT / "docs" / "images" / "needle.png")


def run(words: list[str]) -> None:
    """Runs a verb of `tlm`; ends this program if it fails."""
    if status := cli.main(words):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
