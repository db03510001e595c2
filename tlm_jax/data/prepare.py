"""Tokenises a source into a store: units divided over processes, resumable, reproducible.

plan.json, written first, divides the source into units. A process takes a unit
and writes it in parts: at most one shard per split, then `parts/UNIT-PART.json`,
which marks them as complete. Another run with the same plan resumes after the last part of
each unit. Shards depend on the plan only, so the result is the same,
to the byte, however often it was interrupted and however many processes work.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.progress

from tlm_jax import cluster, files, storage
from tlm_jax.config import UserError
from tlm_jax.data import processes as processes_lib
from tlm_jax.data import store
from tlm_jax.data.sources import Document, Fault, Source, Unit
from tlm_jax.data.store import SPLITS, Manifest, Shard, ShardWriter, Split
from tlm_jax.data.tokenizers import Tokenizer, load_tokenizer

PLAN = "plan.json"
PARTS = "parts"
SHARD_BYTES = 64 * 2**20
MIN_UNITS = 64
MIN_UNIT_BYTES = 2**20
LISTED_FAULTS = 20
_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 512
_POLL_SECONDS = 0.2
_LINE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to prepare and how; the same job gives the same files."""

    source: Source
    tokenizer: str | None
    """As `load_tokenizer` takes it."""
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the source was told, as JSON values, for plan and manifest."""
    shard_bytes: int = SHARD_BYTES
    """Text of a shard at most, about; less where a source would make too few to share out."""
    skip_corrupt: bool = False
    """Leave out and count records that cannot be used, instead of stopping."""


def prepare(
    job: Job, folder: pathlib.Path, *, processes: int = 1, engine: str = cluster.LOCAL
) -> Manifest:
    """Writes the store, or what an earlier run of the same job left to do.

    Args:
      job: what to do.
      folder: where; only this function's files may lie there.
      processes: how many to use; 1 is this one. More import the main module, whose
        code must stand under `if __name__ == "__main__"`.
      engine: "local" uses processes of this machine; "ray" or "ray://HOST:PORT" the nodes of a
        Ray cluster, each of which sees the source, the tokenizer and `folder`.

    Raises:
      UserError: a record cannot be used, the cluster cannot be reached, or the folder holds the
        work of another job.
      OSError: the folder cannot be written.
    """
    tokenizer = load_tokenizer(job.tokenizer)
    plan = _settle_plan(job, tokenizer, folder)
    try:
        units = [Unit(**unit) for unit in plan["units"]]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder / PLAN} is damaged: it has no units; choose another folder"
        ) from error
    if not store.is_complete(folder):
        (folder / PARTS).mkdir(exist_ok=True)
        names = {path.name for path in (folder / PARTS).iterdir()}
        begun = {i for i in range(len(units)) if _part_file(folder, i, 0).name in names}
        left = [i for i in range(len(units)) if i not in begun or not _is_done(folder, i)]
        left.sort(key=lambda i: -units[i].size)  # so that no process has a long one last
        total = sum(unit.size for unit in units)
        done = total - sum(units[i].size for i in left)
        done += sum(_bytes_done(folder, units[i], i) for i in left if i in begun)
        with _progress(job.source.name, total, done) as advance:
            if engine != cluster.LOCAL:
                _share_out_over_cluster(job, folder, units, left, engine, advance)
            elif processes == 1 or len(left) < 2:
                with _tokenizer_threads():
                    for index in left:
                        _write_unit(job, tokenizer, folder, units[index], index, advance)
            else:
                _share_out(job, folder, units, left, min(processes, len(left)), advance)
        _finish(job, tokenizer, folder, len(units))
    storage.remove_tree(folder / PARTS)  # also what a run killed right here has left
    return store.open_manifest(folder)


def _settle_plan(job: Job, tokenizer: Tokenizer, folder: pathlib.Path) -> dict[str, Any]:
    """Writes the plan, or checks that the one there is ours."""
    path = folder / PLAN
    key: dict[str, Any] = {
        "format_version": store.FORMAT_VERSION,
        "source": job.source.name,
        "tokenizer": tokenizer.fingerprint,
        **job.rules,
        "shard_bytes": job.shard_bytes,
        # Not skip_corrupt: a part that is whole without it had nothing to skip.
        **{f"input {name}": value for name, value in job.source.identity.items()},
    }
    if path.is_file():
        plan = files.read_json(path)
        old = plan.get("key")
        if not isinstance(old, dict):
            raise UserError(f"{path} is damaged: it holds no plan; choose another folder")
        for name in dict.fromkeys([*old, *key]):
            if old.get(name, "absent") != key.get(name, "absent"):
                raise UserError(
                    f"{folder} belongs to another plan: {name}: "
                    f"{old.get(name, 'absent')!r} -> {key.get(name, 'absent')!r}; use the same "
                    "options again, or choose another folder"
                )
        return plan
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and has no {PLAN}; choose another folder")
    # Enough units to share out, though not so many that shards are tiny.
    size = min(job.shard_bytes, max(MIN_UNIT_BYTES, job.source.num_bytes // MIN_UNITS))
    plan = {"key": key, "units": [dataclasses.asdict(u) for u in job.source.units(size)]}
    store.write_json(path, plan)
    return plan


def _parts(folder: pathlib.Path, index: int) -> list[dict[str, Any]]:
    """What the complete parts of a unit say, in order."""
    parts: list[dict[str, Any]] = []
    while (path := _part_file(folder, index, len(parts))).is_file():
        parts.append(files.read_json(path))
    return parts


def _part_file(folder: pathlib.Path, index: int, number: int) -> pathlib.Path:
    return folder / PARTS / f"{index:05d}-{number:03d}.json"


def _is_done(folder: pathlib.Path, index: int) -> bool:
    parts = _parts(folder, index)
    return bool(parts) and parts[-1]["last"]


def _bytes_done(folder: pathlib.Path, unit: Unit, index: int) -> int:
    """Bytes of text in the complete parts, no more than the unit is said to have."""
    shards = [shard for part in _parts(folder, index) for shard in part["shards"].values()]
    return min(unit.size, sum(shard["num_bytes"] for shard in shards))


def _write_unit(
    job: Job,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    unit: Unit,
    index: int,
    advance: Callable[[int], None],
) -> None:
    """Writes the parts of a unit that are missing; `advance` is told the bytes of text done."""
    parts = _parts(folder, index)
    read = parts[-1]["records"] if parts else 0
    items = itertools.islice(job.source.items(unit), read, None)
    told = _bytes_done(folder, unit, index)

    def advance_within(size: int) -> None:
        nonlocal told
        advance(min(size, unit.size - told))
        told += min(size, unit.size - told)

    for number in itertools.count(len(parts)):
        part = _Part(job, tokenizer, folder, f"{index:05d}" + (f"-{number:03d}" if number else ""))
        try:
            last = part.fill(items, advance_within)
            shards = part.close()
        except BaseException:
            part.discard()
            raise
        read += part.records
        values = {
            "last": last,
            "records": read,
            "shards": {split: dataclasses.asdict(shard) for split, shard in shards.items()},
            "skipped": part.skipped,
            "skipped_places": part.skipped_places,
        }
        store.write_json(_part_file(folder, index, number), values)
        if last:
            break
    advance(unit.size - told)  # sizes of units are estimates


class _Part:
    """At most one shard per split, being written."""

    def __init__(self, job: Job, tokenizer: Tokenizer, folder: pathlib.Path, name: str) -> None:
        self._job, self._tokenizer, self._folder, self._name = job, tokenizer, folder, name
        self._writers: dict[Split, ShardWriter] = {}
        self._batch: list[Document] = []
        self._batch_bytes = 0
        self.records = 0
        self.skipped: dict[str, int] = {}
        self.skipped_places: list[str] = []

    def fill(self, items: Iterator[Document | Fault], advance: Callable[[int], None]) -> bool:
        """Takes records until the part is large enough; returns whether there are no more."""
        size = 0
        for item in items:
            self.records += 1
            if isinstance(item, Fault):
                self._skip(item)
                continue
            self._batch.append(item)
            self._batch_bytes += item.num_bytes
            size += item.num_bytes
            if self._batch_bytes >= _BATCH_BYTES or len(self._batch) >= _BATCH_DOCUMENTS:
                advance(self._write_batch())
            if size >= self._job.shard_bytes:
                advance(self._write_batch())
                return False
        advance(self._write_batch())
        return True

    def _skip(self, fault: Fault) -> None:
        if not self._job.skip_corrupt:
            raise UserError(fault.message)
        self.skipped[fault.reason] = self.skipped.get(fault.reason, 0) + 1
        if len(self.skipped_places) < LISTED_FAULTS:
            self.skipped_places.append(fault.message)

    def _write_batch(self) -> int:
        batch = self._tokenizer.encode_batch([document.text for document in self._batch])
        for document, ids in zip(self._batch, batch, strict=True):
            try:
                self._writer(document.split).add(ids, document.num_bytes)
            except ValueError as error:
                raise UserError(
                    f"{document.place}: tokenizer {self._tokenizer.name} gave {error}"
                ) from error
        size = self._batch_bytes
        self._batch, self._batch_bytes = [], 0
        return size

    def _writer(self, split: Split) -> ShardWriter:
        if split not in self._writers:
            file = f"{split}-{self._name}.arrayrecord"
            self._writers[split] = ShardWriter(self._folder, file, self._tokenizer.vocab_size)
        return self._writers[split]

    def close(self) -> dict[Split, Shard]:
        """Completes the shards."""
        return {split: writer.close() for split, writer in self._writers.items()}

    def discard(self) -> None:
        """Drops what was written."""
        for writer in self._writers.values():
            writer.discard()


def _finish(job: Job, tokenizer: Tokenizer, folder: pathlib.Path, num_units: int) -> None:
    """Writes the manifest, which completes the store."""
    shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    skipped: dict[str, int] = {}
    places: list[str] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a bucket answers late
        found = list(pool.map(functools.partial(_parts, folder), range(num_units)))
    for part in itertools.chain.from_iterable(found):
        for split in SPLITS:
            if split in part["shards"]:
                shards[split].append(Shard(**part["shards"][split]))
        for reason, count in part["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + count
        places += part["skipped_places"]
    Manifest(
        source=job.source.name,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        rules=job.rules,
        shards={split: tuple(found) for split, found in shards.items()},
        skipped=skipped,
        skipped_places=tuple(places[:LISTED_FAULTS]),
    ).save(folder)


# What a working process has; it does one job in its life.
_worker: dict[str, Any] = {}


def _start_worker(job: Job, folder: pathlib.Path, counter: Any) -> None:
    processes_lib.end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = load_tokenizer(job.tokenizer)
    _worker.update(job=job, folder=folder, counter=counter, tokenizer=tokenizer)


def _work(unit: Unit, index: int) -> None:
    counter = _worker["counter"]

    def advance(size: int) -> None:
        with counter.get_lock():
            if counter.value < 0:
                raise _StopWork
            counter.value += size

    _write_unit(_worker["job"], _worker["tokenizer"], _worker["folder"], unit, index, advance)


class _StopWork(Exception):
    """Another process has failed."""


def _share_out(
    job: Job,
    folder: pathlib.Path,
    units: list[Unit],
    left: list[int],
    processes: int,
    advance: Callable[[int], None],
) -> None:
    """Has processes write the units `left`."""
    processes_lib.require_semaphores("use --processes 1")
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_start_worker, initargs=(job, folder, counter)
    )
    pending, told = set[concurrent.futures.Future[None]](), 0
    try:
        pending = {pool.submit(_work, units[index], index) for index in left}
        while pending:
            finished, pending = concurrent.futures.wait(
                pending, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                future.result()
            now = counter.value
            advance(now - told)
            told = now
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process preparing text was killed, perhaps out of memory; the same command resumes "
            "after the complete shards (fewer --processes need less memory)"
        ) from error
    finally:
        if pending:
            with counter.get_lock():
                counter.value = -(2**62)
        pool.shutdown(cancel_futures=True)


def _share_out_over_cluster(
    job: Job,
    folder: pathlib.Path,
    units: list[Unit],
    left: list[int],
    engine: str,
    advance: Callable[[int], None],
) -> None:
    """Has the nodes of a Ray cluster write the units `left`, one task each."""
    executor = cluster.RayExecutor(engine)
    tasks: dict[concurrent.futures.Future[None], int] = {}
    try:
        for index in left:
            size = units[index].size - _bytes_done(folder, units[index], index)
            tasks[executor.submit(_work_on_node, job, folder, units[index], index)] = size
        for future in concurrent.futures.as_completed(tasks):
            future.result()
            advance(tasks[future])
    finally:
        executor.shutdown(cancel_futures=True)
    for stale in folder.glob(".*.tmp"):  # of nodes that died
        stale.unlink()


def _work_on_node(job: Job, folder: pathlib.Path, unit: Unit, index: int) -> None:
    """A task of the cluster. Two that write one unit, as after a split network, write the same."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _write_unit(job, load_tokenizer(job.tokenizer), folder, unit, index, lambda size: None)


@contextlib.contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Lets Hugging Face tokenizers use threads for a while, unless the user has said."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _progress(name: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, lines elsewhere; both on stderr. Call it with bytes just done."""
    console, start = processes_lib.stderr_console(), time.monotonic()
    what = f"preparing {name}"
    if console.is_terminal:
        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda size: bar.advance(task, size)
        return
    before = f", {done / 1e6:.1f} MB of it already done" if done else ""
    console.print(f"{what}: {total / 1e6:.1f} MB of text (only once){before}")
    said = start

    def advance(size: int) -> None:
        nonlocal said, done
        done += size
        if time.monotonic() - said >= _LINE_SECONDS:
            said = time.monotonic()
            console.print(f"prepared {done / 1e6:.1f} of {total / 1e6:.1f} MB")

    yield advance
    console.print(f"prepared in {time.monotonic() - start:.1f} s")
