"""Preparing text against Hugging Face datasets.map; the loader's speed; its start by size of set.

    python -m benchmarks.data [--only prepare] [--text FOLDER --tokenizer FILE] [--processes 2]

Every measurement is a process of its own, and arms that are compared take turns. Four tables
go to docs/speed-data.md:

- prepare: seconds to tokenise the same documents with the same tokenizer and number of
  processes, and to write the result. Ours includes reading, decompressing and splitting the
  files and choosing what is held out; theirs begins with the documents in an Arrow file. Their
  function is timed with `encode_batch`, which transformers calls, and with `encode_batch_fast`.
- loader: tokens per second that the train iterator delivers, packing included, and how many times
  what the tiny model consumes here (its train step is timed in the same run).
- shares: the same of one process of a job that shares out the reading of large batches, by the
  number of processes, against what a pod takes.
- start: seconds to the first batch and peak memory of synthetic sets of several sizes.
"""

import argparse
import concurrent.futures
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

import numpy as np

from benchmarks import race

TABLES = ("prepare", "loader", "shares", "start")
PREPARERS = ("tlm prepare", "datasets.map, encode_batch", "datasets.map, encode_batch_fast")
TINY_ROWS, TINY_LENGTH = 8, 256
"""The batch of configs/tiny.py."""
POD_ROWS, POD_LENGTH = 128, 4096
"""The batch of configs/tlm_440m.py."""
POD_RATE = 6.3e6
"""Tokens a second that it takes on v5e:16x16 (64 processes) at 40% of the peak."""
START_BATCHES = 500
DOCUMENT_TOKENS = 1000


def run_arm(name: str, *words: object) -> Any:
    """Runs a function of ARMS in a process of its own and returns what it found."""
    command = [sys.executable, "-m", "benchmarks.data", "--arm", name, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def source_of(text: str) -> Any:
    """The documents of a folder of text, as `tlm prepare` takes them."""
    from tlm_jax.data import records

    return records.open_source(text, records.Rules())


def prepare_ours(text: str, tokenizer: str, processes: str, folder: str) -> dict[str, float]:
    """Seconds of `tlm prepare`, and the tokens written."""
    from tlm_jax.data import prepare

    pathlib.Path(folder).mkdir()
    begin = time.perf_counter()
    job = prepare.Job(source=source_of(text), tokenizer=None if tokenizer == "-" else tokenizer)
    manifest = prepare.prepare(job, pathlib.Path(folder), processes=int(processes))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": sum(s.num_tokens for s in manifest.statistics.values())}


class Tokenize:
    """What datasets.map applies to batches; it is sent to the processes by name of the file."""

    def __init__(self, path: str, method: str) -> None:
        self.path, self.method = path, method
        self._encode: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "method": self.method, "_encode": None}

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if self._encode is None:
            import tokenizers

            reader = tokenizers.Tokenizer.from_file(self.path)
            reader.encode_special_tokens = True  # as ours: a text that names one is text
            self._encode = getattr(reader, self.method)
        return {"ids": [e.ids for e in self._encode(batch["text"], add_special_tokens=False)]}


def prepare_theirs(
    text: str, tokenizer: str, processes: str, folder: str, method: str
) -> dict[str, float]:
    """Seconds of datasets.map over the same documents, and the tokens written."""
    import datasets

    from tlm_jax.data import tokenizers

    datasets.disable_progress_bars()
    source = source_of(text)
    documents = [d for unit in source.units(2**40) for d in source.items(unit)]
    records = datasets.Dataset.from_dict({"text": [d.text for d in documents]})
    records.save_to_disk(folder)
    records = datasets.load_from_disk(folder)
    path = str(tokenizers.EMBEDDED) if tokenizer == "-" else tokenizer
    begin = time.perf_counter()
    made = records.map(
        Tokenize(path, method),
        batched=True,
        num_proc=int(processes),
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    seconds = time.perf_counter() - begin
    tokens = sum(len(ids) for batch in made.with_format("arrow").iter(100) for ids in batch["ids"])
    return {"seconds": seconds, "tokens": tokens}


def measure_prepare(options: argparse.Namespace, folder: pathlib.Path) -> str:
    """The table of preparation."""
    from benchmarks import report

    text, tokenizer = options.text, options.tokenizer or "-"
    if text is None:
        text = str(folder / "prose")
        pathlib.Path(text).mkdir()
        from tlm_jax.data.sources import Document, EmbeddedSource

        source = EmbeddedSource()
        for number, document in enumerate(source.items(source.units(2**40)[0])):
            assert isinstance(document, Document)
            (pathlib.Path(text) / f"{number:03d}.txt").write_text(document.text)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PREPARERS}
    for turn in range(options.rounds):
        for name in PREPARERS if turn % 2 else PREPARERS[::-1]:
            out = folder / f"{PREPARERS.index(name)}-{turn}"
            words = (text, tokenizer, options.processes, out)
            method = name.rpartition(" ")[2]
            ours = name == PREPARERS[0]
            arm = run_arm("ours", *words) if ours else run_arm("theirs", *words, method)
            found[name].append(arm)
            subprocess.run(["rm", "-rf", out], check=True)
    tokens = {round(f["tokens"]) for runs in found.values() for f in runs}
    if len(tokens) > 1:
        raise SystemExit(f"the arms wrote different numbers of tokens: {tokens}")
    source = source_of(text)
    size = sum(d.num_bytes for unit in source.units(2**40) for d in source.items(unit)) / 1e6
    seconds = {name: [f["seconds"] for f in runs] for name, runs in found.items()}
    ours_seconds = seconds[PREPARERS[0]]
    rows = [
        [
            name,
            f"{statistics.median(times):.1f}",
            f"{size / statistics.median(times):.2f}",
            f"{statistics.median(a / b for a, b in zip(times, ours_seconds, strict=True)):.2f}",
        ]
        for name, times in seconds.items()
    ]
    what = "the package's own prose" if options.text is None else f"{size:.0f} MB of text"
    with_ = "its tokenizer" if tokenizer == "-" else pathlib.Path(tokenizer).name
    return (
        f"{report.table(['', 's', 'MB/s', 'over ours'], rows)}\n\n"
        f"Medians of {options.rounds} alternating runs over {what} ({tokens.pop():,} tokens) with "
        f"{with_}, {options.processes} processes; ratios are medians over pairs. "
        f"{report.machine()}."
    )


def load(folder: str, packing: str, workers: str, seconds: str) -> dict[str, float]:
    """Tokens a second from the train iterator, over so many seconds; padding is not counted."""
    from tlm_jax.config import DataConfig
    from tlm_jax.data import open_dataset

    config = DataConfig(
        cache_dir=folder,
        seq_len=TINY_LENGTH,
        batch_size=TINY_ROWS,
        num_workers=int(workers),
        packing=packing,  # type: ignore[arg-type]
    )
    iterator = open_dataset(config, 4096).train_iterator()
    for _ in range(50):
        next(iterator)
    tokens, padding, begin = 0, 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < float(seconds):
        ids = next(iterator)["document_ids"]
        tokens += int((ids > 0).sum())
        padding += int((ids == 0).sum())
    iterator.close()
    return {"rate": tokens / taken, "padding": padding / (tokens + padding)}


def consumed(steps: int) -> float:
    """Tokens a second that training the tiny model consumes on this machine."""
    from benchmarks import step_time
    from tlm_jax import config_io

    tiny = config_io.load_config(f"{step_time.ROOT}/configs/tiny.py")
    with tempfile.TemporaryDirectory() as folder:
        found = race.run({"tiny": step_time.Folder(folder).ours(tiny)}, steps)
    return TINY_ROWS * TINY_LENGTH / found["tiny"].median


def measure_loader(options: argparse.Namespace, folder: pathlib.Path) -> str:
    """The table of the loader."""
    from benchmarks import report

    model = consumed(options.steps)
    rows = []
    for packing in ("concat", "best_fit"):
        for workers in (0, 1, 2):
            runs = [
                run_arm("load", folder, packing, workers, options.seconds)
                for _ in range(options.rounds)
            ]
            rate = statistics.median(r["rate"] for r in runs)
            padding = statistics.median(r["padding"] for r in runs)
            row = [packing, str(workers), f"{rate:,.0f}", f"{rate / model:.0f}", f"{padding:.1%}"]
            rows.append(row)
    header = ["packing", "reader processes", "tokens/s", "times what the model takes", "padding"]
    return (
        f"{report.table(header, rows)}\n\n"
        f"Medians of {options.rounds} runs of {options.seconds:g} s, the package's own prose, "
        f"batches of {TINY_ROWS} rows of {TINY_LENGTH}. The model of configs/tiny.py takes "
        f"{model:,.0f} tokens/s here (median of {options.steps} steps). {report.machine()}."
    )


def share(folder: str, readers: str, processes: str, index: str, seconds: str) -> dict[str, float]:
    """Batches a second of one of several processes, and CPU seconds for each; all its threads."""
    from tlm_jax.config import DataConfig
    from tlm_jax.data import open_dataset
    from tlm_jax.data.shares import shares

    config = DataConfig(path=folder, seq_len=POD_LENGTH, batch_size=POD_ROWS, readers=int(readers))
    size = POD_ROWS // int(processes)
    rows = [range(size * i, size * (i + 1)) for i in range(int(processes))]
    each = shares(rows, num_readers=config.readers, batch_size=POD_ROWS)
    iterator = open_dataset(config, 4096).train_iterator(each[int(index)])
    for _ in range(max(2, int(processes))):
        next(iterator)
    count, cpu, begin = 0, time.process_time(), time.perf_counter()
    while (taken := time.perf_counter() - begin) < float(seconds):
        next(iterator)
        count += 1
    cpu = time.process_time() - cpu
    iterator.close()
    return {"rate": count / taken, "cpu": cpu / count, "rows": size + each[int(index)].spare}


def measure_shares(options: argparse.Namespace, folder: pathlib.Path) -> str:
    """The table of reading in shares."""
    from benchmarks import report

    out = folder / "10M"
    if not out.exists():
        write_synthetic(out, 10_000_000)
    rows = []
    arms = [(1, 64, 1), (64, 1, 1), (64, 2, 1), (64, 2, 2), (64, 4, 1), (64, 16, 1), (64, 64, 1)]
    for readers, processes, at_once in arms:
        runs = []
        for _ in range(options.rounds):
            with concurrent.futures.ThreadPoolExecutor() as pool:
                words = (readers, processes)
                found = pool.map(
                    lambda i, words=words: run_arm("share", out, *words, i, options.seconds),
                    range(at_once),
                )
                runs.append(min(found, key=lambda r: r["rate"]))  # the others wait for it
        rate = statistics.median(r["rate"] for r in runs)
        cores = statistics.median(r["cpu"] for r in runs) * POD_RATE / (POD_ROWS * POD_LENGTH)
        read = round(runs[0]["rows"])
        rows.append(
            [
                str(readers),
                str(processes),
                str(at_once),
                str(read),
                f"{rate * read * POD_LENGTH:,.0f}",
                f"{rate * POD_ROWS * POD_LENGTH:,.0f}",
                f"{rate * POD_ROWS * POD_LENGTH / POD_RATE:.1f}",
                f"{cores:.2f}",
            ]
        )
    header = ["readers", "processes", "of them run here", "rows that one reads"]
    header += ["tokens/s that one reads", "tokens/s of the job's batches", "times 6.3M"]
    header += ["cores of each at 6.3M"]
    return (
        f"{report.table(header, rows)}\n\n"
        f"Medians of {options.rounds} runs of {options.seconds:g} s, batches of {POD_ROWS} rows of "
        f"{POD_LENGTH}, concat, synthetic documents of {DOCUMENT_TOKENS} tokens on average, no "
        "reader processes. A job's rate is that of its slowest process here; where others would "
        f"run on machines of their own, it is one's. {report.machine()}."
    )


def write_synthetic(folder: pathlib.Path, tokens: int) -> None:
    """A store of so many tokens: random ids in documents of about DOCUMENT_TOKENS."""
    from tlm_jax.data import load_tokenizer, store

    tokenizer = load_tokenizer(None)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, tokenizer.vocab_size, 10_000_000, dtype=np.uint16)
    folder.mkdir(parents=True)
    shards: dict[store.Split, tuple[store.Shard, ...]] = {"train": (), "validation": ()}
    for split, total in (("train", tokens), ("validation", 1_000_000)):
        while total > 0:
            file = f"{split}-{len(shards[split]):05d}.arrayrecord"  # type: ignore[index]
            writer = store.ShardWriter(folder, file, tokenizer.vocab_size)
            left = min(total, 16_000_000)
            total -= left
            while left > 0:
                size = min(left, int(rng.integers(1, 2 * DOCUMENT_TOKENS)))
                start = int(rng.integers(0, len(ids) - size))
                writer.add(ids[start : start + size], 4 * size)
                left -= size
            shards[split] += (writer.close(),)  # type: ignore[index]
    store.Manifest(
        source="synthetic",
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        rules={},
        shards=shards,
    ).save(folder)


def start(folder: str) -> dict[str, float]:
    """Seconds to the first batch (imports not counted) and peak memory, then and later."""
    import grain  # noqa: F401
    from array_record.python import array_record_module  # noqa: F401

    from tlm_jax.config import DataConfig
    from tlm_jax.data import open_dataset

    config = DataConfig(path=folder, seq_len=TINY_LENGTH, batch_size=TINY_ROWS)
    before, begin = race.resident_mib(), time.perf_counter()
    iterator = open_dataset(config, 4096).train_iterator()
    next(iterator)
    seconds, first = time.perf_counter() - begin, race.resident_mib()
    for _ in range(START_BATCHES - 1):
        next(iterator)
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else -1
    return {
        "seconds": seconds,
        "before": before,
        "first": first,
        "later": race.resident_mib(),
        "handles": handles,
    }


def measure_start(options: argparse.Namespace, folder: pathlib.Path) -> str:
    """The table of starts."""
    from benchmarks import report

    rows = []
    for millions in options.millions:
        out = folder / f"{millions}M"
        if not out.exists():
            write_synthetic(out, millions * 1_000_000)
        runs = [run_arm("start", out) for _ in range(options.rounds)]
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        size = sum(f.stat().st_size for f in out.iterdir()) / 1e6
        rows.append(
            [
                f"{millions}M",
                str(len(list(out.glob("train-*")))),
                f"{size:,.0f}",
                f"{middle['seconds']:.2f}",
                *(f"{middle[key]:.0f}" for key in ("before", "first", "later", "handles")),
            ]
        )
    header = ["tokens", "shards", "MB", "s to the first batch", "peak MiB: imports"]
    header += ["first batch", f"batch {START_BATCHES}", "open files"]
    return (
        f"{report.table(header, rows)}\n\n"
        f"Medians of {options.rounds} runs; synthetic documents of {DOCUMENT_TOKENS} tokens on "
        f"average, batches of {TINY_ROWS} rows of {TINY_LENGTH}, the whole set shuffled. "
        f"{report.machine()}."
    )


ARMS: dict[str, Callable[..., dict[str, float]]] = {
    "ours": prepare_ours,
    "theirs": prepare_theirs,
    "load": load,
    "share": share,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=TABLES, help="measure one table")
    parser.add_argument("--text", help="folder of text; the package's own prose if left out")
    parser.add_argument("--tokenizer", help="a tokenizer.json; the package's own if left out")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each run of the loader")
    parser.add_argument("--steps", type=int, default=10, help="of the tiny model")
    parser.add_argument("--millions", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--folder", type=pathlib.Path, help="for what is written (2 GB); temporary")
    parser.add_argument("--arm", nargs="*", help="run as a process of its own")
    options = parser.parse_args()
    if options.arm:
        name, *words = options.arm
        print(json.dumps(ARMS[name](*words)))
        return
    from benchmarks import report

    measures = {
        "prepare": measure_prepare,
        "loader": measure_loader,
        "shares": measure_shares,
        "start": measure_start,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        for table in [options.only] if options.only else TABLES:
            text = measures[table](options, folder)
            report.publish(f"data-{table}", text, report.SPEED_DATA)


if __name__ == "__main__":
    main()
