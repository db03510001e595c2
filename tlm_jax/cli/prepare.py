"""tlm prepare."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import tyro
from rich.console import Console

from tlm_jax import cluster, files, output
from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Tokenise a large text once into shards that --data.path takes, resumable; or verify them."""

    source: tyro.conf.Positional[str | None] = None
    """File or folder (.txt .md .jsonl .parquet; the first three also .gz .xz .zst),
    tfds:NAME[:SPLIT[:COLUMN]], or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]."""
    out: pathlib.Path | None = None
    """Folder for the shards; the same command resumes an interrupted preparation there."""
    tokenizer: str | None = None
    """tokenizer.json, SentencePiece .model, or bytes; None is the package's own 4,096-token BPE."""
    processes: int = os.cpu_count() or 1
    """Number of processes; the result does not depend on it."""
    engine: str = cluster.LOCAL
    """local, or a Ray cluster: ray, or ray://HOST:PORT; the result does not depend on it."""
    column: str = "text"
    """Field of a record that holds the text."""
    validation_fraction: float = 0.005
    """Share that is held out, in whole documents."""
    seed: int = 0
    """Seed of the choice of records that are held out."""
    shard_mb: int = 64
    """Megabytes of text in a shard, at most; batches do not depend on it."""
    max_document_mb: int = 16
    """Refuse records of more megabytes than this; a process may need 100 times as much memory."""
    skip_corrupt: bool = False
    """Leave out and count records that cannot be used, instead of stopping at the first."""
    verify: pathlib.Path | None = None
    """Check every byte of a folder that was prepared before, and do nothing else."""

    def __post_init__(self) -> None:
        for name in ("processes", "shard_mb", "max_document_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction {self.validation_fraction} must lie between 0 and 1"
            )


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm prepare`; returns the exit status."""
    command = parse(Command, argv, prog)
    quiet_libraries()
    cluster.check(command.engine)
    console = output.console()
    if command.verify is not None:
        _verify(command.verify, console)
    elif command.source is None or command.out is None:
        raise UserError(f"{prog} needs SOURCE --out FOLDER, or --verify FOLDER")
    else:
        try:
            _prepare(command, command.source, command.out, console)
        except KeyboardInterrupt:
            message = "error: interrupted; the same command resumes after the complete shards"
            print(message, file=sys.stderr)
            return 130
    return 0


def _verify(folder: pathlib.Path, console: Console) -> None:
    from tlm_jax.data import store

    shards = list(store.verify(folder))
    size = sum(shard.size for shard in shards)
    console.print(f"{folder}: {len(shards)} shards, {size:,} bytes, all checksums match")


def _prepare(command: Command, name: str, folder: pathlib.Path, console: Console) -> None:
    from tlm_jax.data import prepare, records, store

    start = time.monotonic()
    rules = records.Rules(
        column=command.column,
        validation_fraction=command.validation_fraction,
        seed=command.seed,
        max_document_bytes=command.max_document_mb * 2**20,
    )
    done = store.is_complete(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        in_use = f"another process is preparing text in {folder}"
        with files.locked(folder / ".lock", in_use) as locked:
            if locked:
                for stale in (*folder.glob(".*.tmp"), *folder.glob(".*.part")):
                    stale.unlink()
            job = prepare.Job(
                source=records.open_source(name, rules),
                tokenizer=command.tokenizer,
                rules=dataclasses.asdict(rules),
                shard_bytes=command.shard_mb * 2**20,
                skip_corrupt=command.skip_corrupt,
            )
            manifest = prepare.prepare(
                job, folder, processes=command.processes, engine=command.engine
            )
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    for split, counts in manifest.statistics.items():
        console.print(
            f"{split}: {counts.num_documents:,} documents, {counts.num_tokens:,} tokens, "
            f"{counts.num_bytes:,} bytes, {len(manifest.shards[split])} shards"
        )
        if not counts.num_documents:
            console.print(f"note: no {split} documents; try another --validation_fraction")
    for reason, count in manifest.skipped.items():
        console.print(f"skipped: {count:,} records, each of which {reason}")
    for place in manifest.skipped_places:
        console.print(f"  {place}")
    what = "Already prepared" if done else f"Prepared in {time.monotonic() - start:.1f} s"
    console.print(f"{what}; use it with --data.path {folder}")
