"""Tokenises a source into a store: units divided over processes, resumable, reproducible.

plan.json, written first, divides the source into units. A process takes a unit
and writes it in parts (see `units`). Another run with the same plan resumes after the last part of
each unit. Shards depend on the plan only, so the result is the same,
to the byte, however often it was interrupted and however many processes work.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.progress

from tlm_jax import cluster, files, output, storage
from tlm_jax.config import UserError
from tlm_jax.data import processes as processes_lib
from tlm_jax.data import store
from tlm_jax.data import units as units_lib
from tlm_jax.data.sources import Unit
from tlm_jax.data.store import SPLITS, Manifest, Shard, Split
from tlm_jax.data.tokenizers import Tokenizer, load_tokenizer
from tlm_jax.data.units import SHARD_BYTES as SHARD_BYTES
from tlm_jax.data.units import Job as Job

PLAN = "plan.json"
MIN_UNITS = 64
MIN_UNIT_BYTES = 2**20
_POLL_SECONDS = 0.2
_LINE_SECONDS = 10.0


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
        (folder / units_lib.PARTS).mkdir(exist_ok=True)
        names = {path.name for path in (folder / units_lib.PARTS).iterdir()}
        begun = {i for i in range(len(units)) if units_lib.part_file(folder, i, 0).name in names}
        left = [i for i in range(len(units)) if i not in begun or not units_lib.is_done(folder, i)]
        left.sort(key=lambda i: -units[i].size)  # so that no process has a long one last
        total = sum(unit.size for unit in units)
        done = total - sum(units[i].size for i in left)
        done += sum(units_lib.bytes_done(folder, units[i], i) for i in left if i in begun)
        with _progress(job.source.name, total, done) as advance:
            if engine != cluster.LOCAL:
                _share_out_over_cluster(job, folder, units, left, engine, advance)
            elif processes == 1 or len(left) < 2:
                with _tokenizer_threads():
                    for index in left:
                        units_lib.write_unit(job, tokenizer, folder, units[index], index, advance)
            else:
                _share_out(job, folder, units, left, min(processes, len(left)), advance)
        _finish(job, tokenizer, folder, len(units))
    storage.remove_tree(folder / units_lib.PARTS)  # also what a run killed right here has left
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
    files.write_text(path, json.dumps(plan, indent=1))
    return plan


def _finish(job: Job, tokenizer: Tokenizer, folder: pathlib.Path, num_units: int) -> None:
    """Writes the manifest, which completes the store."""
    shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    skipped: dict[str, int] = {}
    places: list[str] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a bucket answers late
        found = list(pool.map(functools.partial(units_lib.parts_of, folder), range(num_units)))
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
        skipped_places=tuple(places[: units_lib.LISTED_FAULTS]),
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

    units_lib.write_unit(
        _worker["job"], _worker["tokenizer"], _worker["folder"], unit, index, advance
    )


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
            size = units[index].size - units_lib.bytes_done(folder, units[index], index)
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
    units_lib.write_unit(job, load_tokenizer(job.tokenizer), folder, unit, index, lambda size: None)


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
    console, start = output.console(stderr=True), time.monotonic()
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
