"""Runs that differ in their seeds alone, trained in one program.

A small model leaves an accelerator idle between kernels that are too short. Here each launch, and
the one compilation, serves all seeds: state and batch have one more dim, the first, and `jax.vmap`
maps the train step and the score step over it. Each run gets the folder and the checkpoints that
`loop.Trainer` would have left, without samples.

Order within a step, as in `loop`: take a batch, dispatch the update, read the metrics of the step
before, save, evaluate. A thread reads batches ahead and puts them on the device, none beyond the
next save, so that a checkpoint continues with exactly the next batch.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from tlm_jax import costs, files, ops
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import Dataset, open_dataset
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.evaluation import perplexity
from tlm_jax.models import Skeleton, skeleton
from tlm_jax.models.settings import attention_kernel, compute_dtype
from tlm_jax.training import bucket_checkpoints, checkpoint, faults, metrics, step
from tlm_jax.training.allocator import release_freed_memory
from tlm_jax.training.reading import train_iterator
from tlm_jax.training.updates import About, make_optimizer

_AHEAD = 4
"""Batches that are read ahead."""


@dataclasses.dataclass(kw_only=True)
class _Run:
    """One seed: where its batches come from, and where its numbers go."""

    workdir: pathlib.Path
    checkpoints: checkpoint.Checkpoints
    iterator: Any
    metadata: dict[str, Any]
    writer: metrics.MetricsWriter
    log: metrics.TrainLog
    evaluated: bool
    """Whether the step that the run starts from is evaluated."""
    failed: str = ""
    """Why it was given up."""


def train(
    configs: Sequence[RunConfig], workdirs: Sequence[pathlib.Path], console: Console
) -> dict[pathlib.Path, str]:
    """Trains runs, each in its folder, from their newest checkpoint to the end.

    Args:
      configs: of the runs, equal but for `name`, `seed` and `data.seed`.
      workdirs: their folders, all with checkpoints up to the same step, or with none.
      console: where the log is shown.

    Returns:
      Why runs were given up, by folder. One whose loss is not finite too often does not end the
      others.

    Raises:
      UserError: there is more than one device, a kernel that cannot be mapped over seeds, or a
        checkpoint of another config or that cannot be read.
      ValueError: configs differ in something else, or checkpoints in their steps.
    """
    began = time.perf_counter()
    config = configs[0]
    if any(_without_seed(other) != _without_seed(config) for other in configs):
        raise ValueError("the configs differ in more than their name and seeds")
    mesh = mesh_lib.make_mesh(config)
    if mesh.size > 1:
        raise UserError(
            f"seeds are trained in one program on one device, and there are {mesh.size}; make one "
            "visible (CUDA_VISIBLE_DEVICES=0), or sweep without --vmap_seeds"
        )
    require_mappable(config, ops.target())
    costs.assert_matched(config.model)
    with contextlib.ExitStack() as stack:
        for workdir in workdirs:
            bucket_checkpoints.require_savable(workdir)
            faults.make_writable(workdir)
            stack.enter_context(faults.locked(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        dataset = open_dataset(config.data, config.model.vocab_size)
        model = skeleton(config.model)
        runs = [
            stack.enter_context(_opened(c, w, dataset, model, mesh, console, began))
            for c, w in zip(configs, workdirs, strict=True)
        ]
        steps = {max(run.checkpoints.steps, default=0) for run in runs}
        if len(steps) > 1:
            raise ValueError(f"the runs are at different steps: {sorted(steps)}")
        seeds = [c.seed for c in configs]
        group = _Group(config, seeds, runs, dataset, model, mesh, console)
        stack.callback(group.watchdog.close)
        group.run(*steps)
        return {run.workdir: run.failed for run in runs if run.failed}


def require_mappable(config: RunConfig, target: str) -> None:
    """Refuses cudnn, which chooses its kernel by the batch: mapped over seeds, all would run.

    Args:
      config: the run.
      target: cpu, gpu or tpu.

    Raises:
      UserError: attention would use cudnn.
    """
    kernel = attention_kernel(
        config.model,
        length=config.data.seq_len,
        parts=1,
        target=target,
        dtype=compute_dtype(config.model).name,
    )
    if kernel == "cudnn":
        raise UserError(
            "seeds in one program cannot use the attention kernel cudnn; set "
            'model.attention_kernel to "chunked" or model.compute_dtype to "float32", or sweep '
            "without --vmap_seeds"
        )


def _without_seed(config: RunConfig) -> RunConfig:
    data = dataclasses.replace(config.data, seed=0)
    return dataclasses.replace(config, name="", seed=0, data=data)


@contextlib.contextmanager
def _opened(
    config: RunConfig,
    workdir: pathlib.Path,
    shared: Dataset,
    model: Skeleton,
    mesh: Mesh,
    console: Console,
    began: float,
) -> Iterator[_Run]:
    """A run whose files are open."""
    dataset = dataclasses.replace(shared, config=config.data)
    metadata = checkpoint.metadata(config, model.shapes, dataset.layout())
    keep = config.training.keep_last, config.training.keep_every
    with checkpoint.Checkpoints(
        workdir / checkpoint.CHECKPOINTS, keep_last=keep[0], keep_every=keep[1]
    ) as checkpoints:
        start = max(checkpoints.steps, default=0)
        saved = checkpoints.metadata(start) if start else {"tokens": 0}
        if start and (lines := checkpoint.differences(saved, metadata)):
            raise UserError(
                f"{workdir} was trained with another config: {'; '.join(lines)}. "
                "Delete it to start over"
            )
        if not start:
            (workdir / metrics.METRICS_FILE).unlink(missing_ok=True)
        evaluated = any(
            row["step"] == start and row["kind"] == "eval" for row in metrics.records(workdir)
        )
        files.write_json(workdir / "config.json", metadata)
        writer = metrics.MetricsWriter(workdir, console)
        log = metrics.TrainLog(
            config, workdir, writer, console, start, saved["tokens"], began, enabled=False
        )
        iterator = train_iterator(dataset, config.data, mesh, console.print)
        try:
            yield _Run(
                workdir=workdir,
                checkpoints=checkpoints,
                iterator=iterator,
                metadata=metadata,
                writer=writer,
                log=log,
                evaluated=evaluated,
            )
        finally:
            log.close()
            writer.close()
            iterator.close()


class _Group:
    """What is compiled for the runs; `run` is the loop."""

    def __init__(
        self,
        config: RunConfig,
        seeds: Sequence[int],
        runs: Sequence[_Run],
        dataset: Dataset,
        model: Skeleton,
        mesh: Mesh,
        console: Console,
    ) -> None:
        self.config, self.seeds, self.runs = config, seeds, runs
        self.dataset, self.model, self.mesh, self.console = dataset, model, mesh, console
        steps = config.training.num_steps
        self.tx = make_optimizer(config.optimizer, steps, About.of(model), config.model.mlp)
        self.shapes = step.abstract_state(model, self.tx, mesh)
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:  # compiles while the next is traced
            programs = [pool.submit(lowered.compile) for lowered in self._lowered()]
        self.train_step, self.score_step, self.init = (done.result() for done in programs)
        release_freed_memory()
        console.print(f"Compiled for {len(seeds)} seeds in {time.perf_counter() - begin:.1f} s.")
        self.watchdog = faults.Watchdog(config.training.hang_timeout)
        self.kept: list[dict[str, jax.Array]] = []

    def _lowered(self) -> Iterator[jax.stages.Lowered]:
        """The train step, the score step and the start of all runs."""
        config, model, tx, mesh = self.config, self.model, self.tx, self.mesh
        training, data = config.training, config.data
        yield step.lower_train_step(config, model, tx, mesh, seeds=len(self.seeds))
        state = step.stacked(self.shapes, len(self.seeds))
        rows = data.batch_size // training.grad_accumulation
        score = jax.vmap(
            perplexity.make_score_step(model, mesh, chunk=training.loss_chunk), in_axes=(0, None)
        )
        yield jax.jit(score, compiler_options=step.compiler_options(mesh)).lower(
            state.params, step.abstract_batch(rows, data.seq_len, mesh)
        )
        init = jax.vmap(functools.partial(step.init_state, model, tx))
        yield jax.jit(init, out_shardings=_shardings(state)).lower(self._keys())

    @property
    def alive(self) -> list[tuple[int, _Run]]:
        """The runs that were not given up, with their places."""
        return [(place, run) for place, run in enumerate(self.runs) if not run.failed]

    def run(self, start: int) -> None:
        """Trains from a step to `num_steps`; saves and evaluates as a run alone would."""
        training = self.config.training
        state = self._restored(start) if start else self.init(self._keys())
        if not all(run.evaluated for run in self.runs):
            self._evaluate(start, state.params)
        done = start
        while done < training.num_steps and self.alive:
            every = training.checkpoint_every or training.num_steps
            save = min(done // every * every + every, training.num_steps)
            pending: tuple[int, Any] | None = None
            for batch in _ahead(self._next_batch, save - done):
                state, new = self.train_step(state, batch)
                done += 1
                self._read(pending)
                pending = (done, new)
                self.watchdog.alive(f"waiting for step {done}")
                if not self.alive:
                    return
                if done < save and metrics.due(done, training.eval_every):
                    self._read(pending)
                    pending = None
                    self._evaluate(done, state.params)
            self._read(pending)
            self._save(done, state)
            if done == training.num_steps or metrics.due(done, training.eval_every):
                self._evaluate(done, state.params)  # while the files are written
        for _, run in self.alive:
            run.checkpoints.wait()

    def _restored(self, start: int) -> step.TrainState:
        """The runs' states at a step."""
        states = [run.checkpoints.restore(start, self.shapes, run.iterator) for run in self.runs]
        self.console.print(f"Continuing from step {start}.")
        together = step.stacked(self.shapes, len(states))
        stack = jax.jit(
            lambda *states: jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *states),
            out_shardings=_shardings(together),
        )
        whole: step.TrainState = stack(*states)
        return whole

    def _keys(self) -> jax.Array:
        return jax.numpy.stack([jax.random.key(seed) for seed in self.seeds])

    def _next_batch(self) -> dict[str, jax.Array]:
        batches = [next(run.iterator) for run in self.runs]
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        return jax.device_put(stacked, jax.sharding.NamedSharding(self.mesh, jax.P()))

    def _read(self, pending: tuple[int, Any] | None) -> None:
        """Gives each run its metrics of a step; waits for the device."""
        if pending is None:
            return
        done, on_device = pending
        values = {name: list(array) for name, array in jax.device_get(on_device).items()}
        for place, run in self.alive:
            try:
                run.log.push(done, {name: array[place] for name, array in values.items()})
                run.log.flush()
            except UserError as error:
                run.failed = str(error)
                self.console.print(f"{run.workdir.name}: given up at step {done}", style="yellow")

    def _evaluate(self, done: int, params: Any) -> None:
        """Writes the validation losses of a step: of some batches, at the end of all."""
        limit = self.config.training.eval_batches if done < self.config.training.num_steps else None
        batches: Iterable[dict[str, jax.Array]] = perplexity.validation_batches(
            self.dataset, self.config, self.mesh, limit=limit
        )
        if limit is not None:  # the same each time
            batches = self.kept = self.kept or list(batches)
        nll, tokens = perplexity.score_rows(
            self.score_step,
            params,
            batches,
            between=lambda: self.watchdog.alive("evaluating"),
        )
        if done == self.config.training.num_steps:
            for _, run in self.alive:  # the last record comes after the last checkpoint
                run.checkpoints.wait()
        ratio = self.dataset.statistics["validation"].bytes_per_target
        losses = []
        for place, run in self.alive:
            score = perplexity.summarise(nll[place], tokens[place], bytes_per_token=ratio)
            run.writer.write(
                "eval", done, dataclasses.asdict(score) | {"complete": int(limit is None)}
            )
            run.log.meter.restart()
            losses.append(f"{score.loss:.4f}")
        self.console.print(f"step {done}  validation losses {' '.join(losses)}")

    def _save(self, done: int, state: step.TrainState) -> None:
        """Starts to save each run."""
        one = jax.jit(
            lambda state, place: jax.tree.map(lambda leaf: leaf[place], state),
            out_shardings=_shardings(self.shapes),
        )
        for place, run in self.alive:
            run.log.store()
            metadata = run.metadata | {"tokens": run.log.tokens}
            run.checkpoints.save(done, one(state, place), run.iterator, metadata)


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _ahead(make: Callable[[], Any], number: int) -> Iterator[Any]:
    """What so many calls return, made ahead of need by a thread."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        made = collections.deque(pool.submit(make) for _ in range(min(_AHEAD, number)))
        for index in range(number):
            ready = made.popleft().result()
            if index + _AHEAD < number:
                made.append(pool.submit(make))
            yield ready
    finally:
        pool.shutdown(cancel_futures=True)
