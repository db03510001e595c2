"""The training loop, read from top to bottom.

Order within a step, not to be changed: take a batch, dispatch the update, read
the metrics of the step before (so the device never waits), save, evaluate. The
data iterator moves only after the save, so a checkpoint continues with exactly
the next batch; and no evaluation, however it ends, costs a step. An interrupted one is repeated
when the run resumes: `metrics.jsonl` tells.
"""

import dataclasses
import functools
import pathlib
import shlex
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax
from rich.console import Console

from tlm_jax import bucket_files, config_io, costs, files
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import Dataset, open_dataset
from tlm_jax.distributed import agreement
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.models import skeleton
from tlm_jax.models.settings import attention_kernel_here
from tlm_jax.training import (
    bucket_checkpoints,
    checkpoint,
    distillation,
    faults,
    metrics,
    programs,
    step,
    tracker,
    warm_start,
)
from tlm_jax.training.evaluations import Evaluations
from tlm_jax.training.profiling import Profiler, ProfileSpan
from tlm_jax.training.reading import train_iterator
from tlm_jax.training.updates import About, make_optimizer
from tlm_jax.validation import some


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    """Steps of the run so far."""
    stopped_by: str | None
    """Name of the signal that asked it to stop, or None when it is complete, which takes the
    evaluations of the last step too."""
    already_complete: bool = False
    """True when there was nothing left to do."""
    goodput: tuple[float, float] = (0.0, 0.0)
    """Seconds in steps, and seconds in all (compiling, evaluating, saving), of this call."""


class Trainer:
    """A run folder and all that is compiled for it; `run` is the loop.

    Args:
      config: the run.
      workdir: its folder.
      console: where the log is shown.
      allow_config_change: continue a run although its config has changed.
      profile: steps to trace.
      optimizer: in place of the one that the config describes. A run must continue with the same.
      loss: of each token, in place of the negative log-likelihood.
      data: in place of the text that the config names; with the interface of `data.Dataset`.
      hooks: see `metrics.TrainLog`.
      init_from: a run folder whose parameters a new run starts with; a run that has a checkpoint
        of its own resumes from that.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        console: Console,
        *,
        allow_config_change: bool = False,
        profile: ProfileSpan | None = None,
        optimizer: optax.GradientTransformation | None = None,
        loss: step.TokenLoss | None = None,
        data: Dataset | None = None,
        hooks: Sequence[metrics.Hook] = (),
        init_from: pathlib.Path | None = None,
    ) -> None:
        self.init_from = init_from
        self.config, self.workdir, self.console = config, workdir, console
        self.loss, self.hooks = loss, hooks
        self.allow_config_change, self.profile = allow_config_change, profile
        self._growing: dict[str, bucket_files.Sink] = {}
        self.began = time.perf_counter()
        agreement.require_equal("config", self._facts())  # before anything that could hang
        bucket_checkpoints.require_savable(workdir)
        self.is_main = jax.process_index() == 0
        tracker.check(config.training.tracker)
        costs.assert_matched(config.model)
        self.mesh = mesh_lib.make_mesh(config)
        faults.make_writable(workdir)
        self.dataset = data or open_dataset(config.data, config.model.vocab_size)
        self.skeleton = skeleton(config.model)
        self.tx = optimizer or make_optimizer(
            config.optimizer,
            config.training.num_steps,
            About.of(self.skeleton),
            config.model.mlp,
        )
        self.shapes = step.abstract_state(self.skeleton, self.tx, self.mesh)
        self.iterator = train_iterator(self.dataset, config.data, self.mesh, self._say)
        layout = self.dataset.layout()
        agreement.require_equal("data", {f"data, {k}": repr(v) for k, v in layout.items()})
        self.metadata = checkpoint.metadata(config, self.skeleton.shapes, layout)
        self.teacher = distillation.find(config)
        if self.teacher is not None:
            if loss is not None:
                raise UserError("training.teacher and a custom loss exclude each other")
            self.metadata[distillation.KEY] = self.teacher.origin
        self.evaluations = Evaluations(
            config,
            workdir,
            self.dataset,
            self.skeleton,
            self.mesh,
            say=self._say,
            write=self._write,
        )

    def run(self) -> Outcome:
        """Trains from the newest checkpoint, or from the start, to `num_steps`."""
        training = self.config.training
        with (
            jax.set_mesh(self.mesh),
            faults.locked(self.workdir),
            faults.stop_signals(self.console) as stop,
            checkpoint.Checkpoints(
                self.workdir / checkpoint.CHECKPOINTS,
                keep_last=training.keep_last,
                keep_every=training.keep_every,
            ) as checkpoints,
            faults.lost_processes(),
        ):
            state, start = self._restore_or_init(checkpoints)
            owed = self.evaluations.owed(start)
            if start >= training.num_steps and not owed:
                return Outcome(step=start, stopped_by=None, already_complete=True)
            return self._loop(state, start, owed, checkpoints, stop)

    def _facts(self) -> dict[str, str]:
        """All that the processes of a job must have in common, by name."""
        values = {name: value for name, (value, _) in config_io.flatten(self.config).items()}
        del values["data.cache_dir"]  # a folder of each machine's own
        return {
            **{name: repr(value) for name, value in values.items()},
            "--workdir": str(self.workdir),
            "--init_from": str(self.init_from),
            "--allow_config_change": str(self.allow_config_change),
            **agreement.code_version(),
        }

    def _tokens_until(self, step: int, checkpoints: checkpoint.Checkpoints) -> int:
        """Targets scored until a saved step (see `metrics.TrainLog`)."""
        if step == 0:
            return 0
        saved = checkpoints.metadata(step)
        data = saved["config"]["data"]
        # Older checkpoints do not say; most of their batches had no padding.
        return saved.get("tokens", step * data["batch_size"] * data["seq_len"])

    def _loop(
        self,
        state: Any,
        start: int,
        owed: set[str],
        checkpoints: checkpoint.Checkpoints,
        stop: faults.Stop,
    ) -> Outcome:
        training = self.config.training
        self._write_config()
        train_step = self._train_step() if start < training.num_steps else None
        self.evaluations.prepare(start, self.shapes.params)
        name = training.tracker if self.is_main else None
        writer = metrics.MetricsWriter(
            self.workdir,
            self.console,
            enabled=self.is_main,
            tracker=tracker.Tracker(name, self.config, self.console) if name else None,
        )
        log = metrics.TrainLog(
            self.config,
            self.workdir,
            writer,
            self.console,
            start,
            self._tokens_until(start, checkpoints),
            self.began,
            enabled=self.is_main,
            hooks=self.hooks,
        )
        watchdog = faults.Watchdog(training.hang_timeout)
        profiler = Profiler(self.profile, self.workdir / "profile")
        done = saved = start
        try:
            owed = self.evaluations.make(owed, state.params, done, writer, watchdog, stop)
            log.meter.restart()
            while done < training.num_steps and not stop.signal:
                assert train_step is not None
                try:
                    batch = next(self.iterator)
                except Exception:
                    if stop.signal:  # the signal ended the reader processes too
                        break
                    raise
                placed = to_devices(batch, self.mesh)
                kind = train_step.kind(batch, placed)
                if kind not in train_step:
                    log.flush()
                    train_step.compile(kind)
                    watchdog.alive(f"waiting for step {done + 1}")
                    log.meter.restart()
                profiler.before_step(done)
                state, new_metrics = train_step(kind, state, placed)
                done += 1
                if traced := profiler.after_step(done, new_metrics):
                    self._say(traced)
                log.push(done, new_metrics)
                watchdog.alive(f"waiting for step {done}")
                checkpoints.check()

                last = done == training.num_steps
                due = self.evaluations.due(done)
                save = stop.after(done) or last or metrics.due(done, training.checkpoint_every)
                if due or save:
                    log.flush()
                if save:
                    watchdog.alive(f"saving step {done}")
                    self._save(done, state, checkpoints, log)
                    saved = done
                owed = self.evaluations.make(due, state.params, done, writer, watchdog, stop)
                if due or save:
                    log.meter.restart()
            watchdog.alive(f"saving step {done}")
            if done > saved:
                log.flush()
                self._save(done, state, checkpoints, log)
            checkpoints.wait()
        finally:
            watchdog.close()
            profiler.close()
            log.close()
            writer.close()
            for file in self._growing.values():
                file.close()
            self.iterator.close()  # stops reader processes
        return Outcome(
            step=done,
            stopped_by=stop.signal if owed or done < training.num_steps else None,
            goodput=(log.meter.stepping, log.meter.wall),
        )

    def _save(
        self, done: int, state: Any, checkpoints: checkpoint.Checkpoints, log: metrics.TrainLog
    ) -> None:
        """Starts to save; `log` must have read the step's metrics."""
        log.store()
        checkpoints.save(done, state, self.iterator, self.metadata | {"tokens": log.tokens})

    def _restore_or_init(self, checkpoints: checkpoint.Checkpoints) -> tuple[Any, int]:
        before = max(checkpoints.steps, default=None)
        for unfinished in checkpoints.unfinished:
            use = "the start" if before is None else f"step {before}"
            self._say(
                f"The save of step {unfinished} was interrupted; "
                f"using the last complete checkpoint, {use}.",
                "yellow",
            )
        damaged: dict[int, checkpoint.DamagedCheckpointError] = {}
        for newest in reversed(checkpoints.steps):
            try:
                saved = checkpoints.metadata(newest)
                self._compare(saved)
                distillation.require_same(self.teacher, saved)
                state = checkpoints.restore(newest, self.shapes, self.iterator)
            except checkpoint.DamagedCheckpointError as error:
                damaged[newest] = error
                continue
            # Only now: had this one failed too, the fault might be ours, and nothing be damaged.
            for number, fault in damaged.items():
                reason = str(fault).rpartition("; ")[0]
                where = [checkpoints.set_aside(number), checkpoints.folder / str(number)]
                back = shlex.join(["mv", *map(str, where)])
                self._say(f"{reason}; set aside (to bring it back: {back}).", "yellow")
            self.metadata |= warm_start.kept(saved)
            if newest < self.config.training.num_steps:
                self._say(f"Continuing from step {newest} in {self.workdir}.")
            return state, newest
        if damaged:
            reason = str(damaged[max(damaged)]).rpartition("; ")[0]
            raise UserError(
                f"no usable checkpoint is left in {self.workdir} ({reason}); nothing was moved. "
                "Start over with another --workdir"
            )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        if self.init_from is None:
            init = functools.partial(step.init_state, self.skeleton, self.tx)
            return jax.jit(init, out_shardings=shardings)(jax.random.key(self.config.seed)), 0
        params, more = warm_start.load(
            self.init_from, self.config, self.skeleton, self.dataset.tokenizer, self.mesh
        )
        self.metadata |= more
        self._say(
            f"Starting from the parameters of step {more['init_from']['step']} in {self.init_from}."
        )
        begin = jax.jit(functools.partial(step.first_state, self.tx), out_shardings=shardings)
        return begin(params), 0

    def _compare(self, saved: dict[str, Any]) -> None:
        shapes = checkpoint.shape_differences(saved, self.skeleton.shapes)
        lines = checkpoint.differences(saved, self.metadata)
        if lines and not self.allow_config_change:
            raise UserError(
                f"{self.workdir} was trained with another config: {'; '.join(lines)}. "
                "Use another --workdir, or --allow_config_change to continue anyway"
            )
        if shapes:
            raise UserError(
                f"the parameters in {self.workdir} do not fit this config: {some(shapes)}"
            )
        for line in lines:
            self._say(f"Config change: {line}", "yellow")
        old = config_io.from_dict(saved["config"])
        if old.data.readers != self.config.data.readers:  # there is no position of the new ones
            raise UserError(
                f"the data position saved in {self.workdir} is for data.readers="
                f"{old.data.readers} and no other number; use --data.readers {old.data.readers}, "
                "or another --workdir"
            )
        before = old.training.num_steps
        if before != self.config.training.num_steps:
            self._say(
                f"num_steps: {before} -> {self.config.training.num_steps}; the learning rate "
                "follows the new schedule from here."
            )

    def _train_step(self) -> programs.TrainStep:
        kernel = attention_kernel_here(self.config.model, self.config.data.seq_len)
        if kernel is not None:
            self._say(f"Attention: {kernel} ({self.config.model.attention_kernel}).")
        teacher = None if self.teacher is None else self.teacher.skeleton

        def lower(kind: int | None) -> jax.stages.Lowered:
            return step.lower_train_step(
                self.config, self.skeleton, self.tx, self.mesh, self.loss, teacher, kind=kind
            )

        train_step = programs.TrainStep(lower, kernel, self.config.data.seq_len, self._say)
        if self.teacher is not None:
            train_step.more = (self.teacher.load(self.dataset.tokenizer, self.mesh),)
            self._say(f"Learning from step {self.teacher.step} in {self.teacher.folder}.")
        return train_step

    def _write_config(self) -> None:
        if self.is_main:
            try:
                files.write_json(self.workdir / "config.json", self.metadata)
            except OSError as error:  # training goes on without it
                self._say(f"cannot write config.json: {error.strerror}", "yellow")

    def _write(self, name: str, text: str, mode: Literal["a", "w"]) -> None:
        if not self.is_main:
            return
        path = self.workdir / name
        try:
            if mode == "w":
                files.write_text(path, text)
                return
            if name not in self._growing:
                self._growing[name] = files.growing(path, functools.partial(self._lost, name))
            self._growing[name].write(text.encode())
        except OSError as error:  # training goes on without it
            self._say(f"cannot write {name}: {error.strerror}", "yellow")

    def _lost(self, name: str, error: Exception) -> None:
        self._say(f"cannot write {name}: {getattr(error, 'strerror', None) or error}", "yellow")

    def _say(self, text: str, style: str | None = None) -> None:
        if self.is_main:
            self.console.print(text, style=style)
