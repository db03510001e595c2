"""Retapered models before and after healing, beside reversed tapers and uniform pruning.

    python -m benchmarks.retaper --model RUN [--name smollm2] [--wikitext FILE] [--budgets 1 0.75]
        [--steps 300] [--work FOLDER] [--precision bfloat16]

RUN is a run folder or an imported model with equal MLP widths. Each arm is `tlm retaper`, then
training as by `tlm train --init_from` on RUN's text, with RUN as the teacher. Losses are those of
the same rows for all: held-out rows of RUN's own text (for an imported model, the package's prose),
and with --wikitext rows of the pages in lm-eval's JSON lines. Writes docs/results/retaper.json and
the tables of docs/retaper.md. The same command resumes: finished arms are not repeated, an
interrupted one goes on from its checkpoint.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import time
from typing import Any, Literal

import jax
import numpy as np

import tlm_jax
from benchmarks import report
from tlm_jax import files
from tlm_jax.config import RUN_AGAIN, OptimizerConfig, RunConfig
from tlm_jax.data import Dataset, open_dataset
from tlm_jax.data.tokenizers import Tokenizer
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.evaluation import perplexity
from tlm_jax.models import skeleton
from tlm_jax.training import restore

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results" / "retaper.json"
PAGE = ROOT / "docs" / "retaper.md"
SHAPES = {
    "taper": ("--schedule", "cosine", "--start", "1.5", "--end", "0.5"),
    "reversed": ("--schedule", "cosine", "--start", "0.5", "--end", "1.5"),
    "uniform": ("--schedule", "uniform"),
}
Rows = list[dict[str, np.ndarray]]
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to spend a budget; the unchanged model has no shape and no healing."""

    shape: str
    budget: float
    """Of the original's MLP width."""

    @property
    def name(self) -> str:
        """As in the record."""
        return f"{self.shape}-{self.budget:g}"


def arms(budgets: list[float]) -> list[Arm]:
    """At an equal budget, uniform widths are the unchanged model."""
    return [
        Arm(shape=shape, budget=budget)
        for budget in budgets
        for shape in SHAPES
        if not (shape == "uniform" and budget == 1)
    ]


def prose_rows(config: RunConfig, count: int) -> Rows:
    """Rows spread evenly over the validation split."""
    dataset = open_dataset(config.data, config.model.vocab_size)
    batches = dataset.validation_batches(batch_size=1)
    stride = max(1, len(batches) // count)
    return [batch for index, batch in enumerate(batches) if index % stride == 0][:count]


def wikitext_rows(path: pathlib.Path, tokenizer: Tokenizer, length: int, count: int) -> Rows:
    """Rows spread evenly over the pages, one after the other, each row a document of its own."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += [tokenizer.eot_id, *tokenizer.encode(json.loads(line)["page"])]
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    cut = np.asarray([ids[start : start + length + 1] for start in starts], np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    return [
        {
            "inputs": row[None, :-1],
            "targets": row[None, 1:],
            "positions": positions,
            "document_ids": np.ones((1, length), np.int32),
        }
        for row in cut
    ]


def losses(folder: pathlib.Path, sets: dict[str, Rows], precision: Precision) -> dict[str, float]:
    """Nats per token of a run folder's newest checkpoint, by the name of the rows."""
    step, saved = restore.saved_metadata(folder, None)
    config = restore.saved_config(saved)
    model = skeleton(dataclasses.replace(config.model, compute_dtype=precision))
    tokenizer = restore.model_tokenizer(config, saved)
    mesh = mesh_lib.single_device_mesh()
    score_step = perplexity.make_score_step(model, mesh, chunk=128)
    found = {}
    with jax.set_mesh(mesh):
        params = restore.load_params(folder, step, model, tokenizer, mesh)
        for name, rows in sets.items():
            batches = [
                to_devices(
                    {key: np.concatenate([row[key] for row in rows[i : i + 4]]) for key in rows[0]},
                    mesh,
                )
                for i in range(0, len(rows), 4)
            ]
            score = perplexity.score(score_step, params, batches, bytes_per_token=1.0)
            found[name] = round(score.loss, 5)
    return found


def retaper(arm: Arm, original: pathlib.Path, config: RunConfig, out: pathlib.Path) -> None:
    """`tlm retaper`, unless it was done before."""
    if out.exists():
        return
    width = round(arm.budget * config.model.base_mlp_width)
    words = ["retaper", original, "--out", out, *SHAPES[arm.shape], "--base_width", width]
    command = [sys.executable, "-m", "tlm_jax", *map(str, words), "--rows", "16"]
    subprocess.run(command, check=True, cwd=ROOT)


class FewRows(Dataset):
    """A dataset whose validation split is one batch: losses are measured here, on other rows."""

    def validation_batches(self, *, batch_size: int | None = None) -> Any:
        return list(itertools.islice(super().validation_batches(batch_size=batch_size), 1))


def train(
    start: pathlib.Path, out: pathlib.Path, options: argparse.Namespace, teacher: str | None
) -> float:
    """Seconds of the training from a run folder's parameters, of this call.

    Raises:
      SystemExit: a signal stopped it.
    """
    _, saved = restore.saved_metadata(start, None)
    config = shortened(restore.saved_config(saved), options)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, compute_dtype=options.precision),
        optimizer=OptimizerConfig(
            learning_rate=options.rate,
            final_learning_rate=options.rate / 10,
            warmup_steps=min(20, options.steps // 5),
            weight_decay=0.0,
        ),
        training=dataclasses.replace(
            config.training,
            num_steps=options.steps,
            log_every=5,
            eval_every=0,
            sample_tokens=0,
            checkpoint_every=options.checkpoint_every,
            keep_last=1,
            teacher=teacher,
        ),
    )
    begin = time.perf_counter()
    data = FewRows(**vars(open_dataset(config.data, config.model.vocab_size)))
    outcome = tlm_jax.train(config, out, data=data, init_from=start)
    if outcome.stopped_by:
        sys.exit(RUN_AGAIN)
    return time.perf_counter() - begin


def shortened(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The config with rows and batches of the benchmark."""
    data = dataclasses.replace(config.data, seq_len=options.length, batch_size=options.batch)
    training = dataclasses.replace(config.training, loss_chunk=min(128, options.length))
    return dataclasses.replace(config, data=data, training=training)


def run(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Fills the record, which is written after each arm."""
    original, work = options.model.resolve(), options.work.resolve()
    _, saved = restore.saved_metadata(original, None)
    config = shortened(restore.saved_config(saved), options)
    sets = {"prose": prose_rows(config, options.rows)}
    if options.wikitext is not None:
        tokenizer = restore.model_tokenizer(config, saved)
        sets["wikitext"] = wikitext_rows(options.wikitext, tokenizer, options.length, options.rows)

    def keep(name: str, **values: Any) -> None:
        record.setdefault(name, {}).update(values)
        whole = files.read_json(RECORD) if RECORD.exists() else {}
        files.write_json(RECORD, whole | {options.name: record})

    keep(
        "how",
        steps=options.steps,
        tokens_per_step=options.length * options.batch,
        rows=options.rows,
        length=options.length,
        rate=options.rate,
        precision=options.precision,
        parameters=saved["num_params"],
        widths=sorted(set(saved["mlp_widths"])),
        machine=report.software(),
    )
    if "losses" not in record.get("original", {}):
        keep("original", losses=losses(original, sets, options.precision))
    wanted = arms(options.budgets)
    for arm in wanted:  # all of them before the first is healed
        folder = work / arm.name
        retaper(arm, original, config, folder)
        if "pruned" not in record.get(arm.name, {}):
            origin = restore.saved_metadata(folder, None)[1]
            keep(
                arm.name,
                parameters=origin["num_params"],
                widths=[origin["mlp_widths"][0], origin["mlp_widths"][-1]],
                pruned=losses(folder, sets, options.precision),
            )
    if options.steps:
        for arm in wanted:
            if "healed" not in record[arm.name]:
                out = work / f"{arm.name}-healed"
                seconds = train(work / arm.name, out, options, str(original))
                keep(
                    arm.name,
                    healed=losses(out, sets, options.precision),
                    healing_seconds=round(seconds),
                )


def table(record: dict[str, Any]) -> str:
    """One row per arm."""
    how, original = record["how"], record["original"]
    sets = list(original["losses"])
    header = ["model", "MLP width", "parameters"]
    for name in sets:
        header += [f"{name}: pruned", f"{name}: healed"]
    rows = [["original", f"{how['widths'][0]:,}", f"{how['parameters']:,}"]]
    for name in sets:
        rows[0] += [f"{original['losses'][name]:.3f}", ""]
    for name, arm in record.items():
        if "pruned" in arm:
            shape, budget = name.rsplit("-", 1)
            first, last = arm["widths"]
            row = [f"{shape}, budget {budget}", f"{first:,} -> {last:,}", f"{arm['parameters']:,}"]
            healed = arm.get("healed", {})
            for one in sets:
                after = f"{healed[one]:.3f}" if one in healed else "not run"
                row += [f"{arm['pruned'][one]:.3f}", after]
            rows.append(row)
    return report.table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--name", default="smollm2")
    parser.add_argument("--wikitext", type=pathlib.Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 1.0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpoint_every", type=int, default=25)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/retaper"))
    options = parser.parse_args()
    record = (files.read_json(RECORD) if RECORD.exists() else {}).get(options.name, {})
    run(options, record)
    how = record["how"]
    report.publish(
        f"retaper {options.name}",
        f"{table(record)}\n\n"
        f"Healing: {how['steps']} steps of {how['tokens_per_step']:,} tokens, {how['precision']}. "
        f"Losses on {how['rows']} rows of {how['length']} tokens. {how['machine']}.",
        page=PAGE,
    )


if __name__ == "__main__":
    main()
