"""The training loop, read from top to bottom.

Order within a step, not to be changed: take a batch, dispatch the update, read
the metrics of the step before (so the device never waits), evaluate, save. The
data iterator moves only after the save, so a checkpoint continues with exactly
the next batch.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from tlm_jax import config_io, costs
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import open_dataset
from tlm_jax.distributed import mesh as mesh_lib
from tlm_jax.distributed.sharding import to_devices
from tlm_jax.evaluation import perplexity
from tlm_jax.evaluation.evaluator import Evaluator
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.options import SuiteConfig
from tlm_jax.models import kernels, sampling, skeleton
from tlm_jax.models.language_model import compute_dtype
from tlm_jax.training import checkpoint, faults, metrics, step
from tlm_jax.training.allocator import release_freed_memory
from tlm_jax.training.optimizer import make_optimizer
from tlm_jax.training.profiling import Profiler, ProfileSpan

CHECKPOINTS = "checkpoints"
SAMPLES_FILE = "samples.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    """Steps of the run so far."""
    stopped_by: str | None
    """Name of the signal that asked it to stop, or None when it is complete."""
    already_complete: bool = False
    """True when there was nothing left to do."""
    goodput: tuple[float, float] = (0.0, 0.0)
    """Seconds in steps, and seconds in all (compiling, evaluating, saving), of this call."""


class Trainer:
    """A run folder and all that is compiled for it; `run` is the loop."""

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        console: Console,
        *,
        allow_config_change: bool = False,
        profile: ProfileSpan | None = None,
    ) -> None:
        self.config, self.workdir, self.console = config, workdir, console
        self.allow_config_change, self.profile = allow_config_change, profile
        self.began = time.perf_counter()
        self.is_main = jax.process_index() == 0
        costs.assert_matched(config.model)
        self.mesh = mesh_lib.make_mesh(config)
        faults.make_writable(workdir)
        self.dataset = open_dataset(config.data, config.model.vocab_size)
        self.skeleton = skeleton(config.model)
        self.tx = make_optimizer(
            config.optimizer, config.training.num_steps, config.model.mlp.periods
        )
        self.shapes = step.abstract_state(self.skeleton, self.tx, self.mesh)
        self.iterator = self.dataset.train_iterator()
        self.metadata = checkpoint.metadata(config, self.skeleton.shapes, self.dataset.layout())

    def run(self) -> Outcome:
        """Trains from the newest checkpoint, or from the start, to `num_steps`."""
        training = self.config.training
        with (
            jax.set_mesh(self.mesh),
            faults.locked(self.workdir),
            faults.stop_signals(self.console) as stop,
            checkpoint.Checkpoints(
                self.workdir / CHECKPOINTS,
                keep_last=training.keep_last,
                keep_every=training.keep_every,
            ) as checkpoints,
        ):
            state, start = self._restore_or_init(checkpoints)
            if start >= training.num_steps:
                return Outcome(step=start, stopped_by=None, already_complete=True)
            with faults.lost_processes():
                return self._loop(state, start, checkpoints, stop)

    def _loop(
        self, state: Any, start: int, checkpoints: checkpoint.Checkpoints, stop: list[str]
    ) -> Outcome:
        training = self.config.training
        self._write_config()
        train_step = self._compile_train_step()
        self._prepare_evaluation()
        writer = metrics.MetricsWriter(self.workdir, self.console, enabled=self.is_main)
        log = metrics.TrainLog(
            self.config,
            self.workdir,
            writer,
            self.console,
            start,
            self.began,
            enabled=self.is_main,
        )
        watchdog = faults.Watchdog(training.hang_timeout)
        profiler = Profiler(self.profile, self.workdir / "profile")
        if start == 0:
            self._evaluate(state, 0, writer, stop)
        log.meter.restart()
        done = start
        try:
            while done < training.num_steps and not stop:
                try:
                    batch = next(self.iterator)
                except Exception:
                    if stop:  # the signal ended the reader processes too
                        break
                    raise
                profiler.before_step(done)
                state, new_metrics = train_step(state, to_devices(batch, self.mesh))
                done += 1
                if trace := profiler.after_step(done, new_metrics):
                    self._say(f"Profile in {trace}; look at it with xprof or TensorBoard.")
                log.push(done, new_metrics)
                watchdog.alive(f"waiting for step {done}")
                checkpoints.check()
                faults.agree_to_stop(stop, done)

                last = done == training.num_steps
                evaluate = last or metrics.due(done, training.eval_every)
                save = last or bool(stop) or metrics.due(done, training.checkpoint_every)
                if evaluate or save:
                    log.flush()
                if evaluate:
                    self._evaluate(state, done, writer, stop, complete=last)
                if self._suites and (last or metrics.due(done, training.suites_every)):
                    log.flush()
                    with watchdog.paused():
                        self._evaluate_suites(state, done, writer)
                    log.meter.restart()
                if save:
                    watchdog.alive(f"saving step {done}")
                    checkpoints.save(done, state, self.iterator, self.metadata)
                if evaluate or save:
                    log.meter.restart()
            if stop and done > start and done not in checkpoints.steps:
                log.flush()
                checkpoints.save(done, state, self.iterator, self.metadata)
            checkpoints.wait()
        finally:
            watchdog.close()
            profiler.close()
            log.close()
            writer.close()
            self.iterator.close()  # stops reader processes
        return Outcome(
            step=done,
            stopped_by=stop[0] if done < training.num_steps else None,
            goodput=(log.meter.stepping, log.meter.wall),
        )

    def _restore_or_init(self, checkpoints: checkpoint.Checkpoints) -> tuple[Any, int]:
        before = max(checkpoints.steps, default=None)
        for unfinished in checkpoints.unfinished:
            use = "the start" if before is None else f"step {before}"
            self._say(
                f"[yellow]The save of step {unfinished} was interrupted; "
                f"using the last whole checkpoint, {use}.[/]"
            )
        while checkpoints.steps:
            newest = max(checkpoints.steps)
            try:
                self._compare(checkpoints.metadata(newest))
                state = checkpoints.restore(newest, self.shapes, self.iterator)
            except checkpoint.DamagedCheckpointError as error:
                reason = str(error).rpartition("; ")[0]
                self._say(f"[yellow]{reason}; set aside in {checkpoints.set_aside(newest)}.[/]")
                continue
            if newest < self.config.training.num_steps:
                self._say(f"Continuing from step {newest} in {self.workdir}.")
            return state, newest
        if before is not None:
            raise UserError(
                f"no whole checkpoint is left in {self.workdir}; what there was lies in "
                f"{self.workdir / 'damaged'}. Start anew with another --workdir"
            )
        init = functools.partial(step.init_state, self.skeleton, self.tx)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(init, out_shardings=shardings)(jax.random.key(self.config.seed)), 0

    def _compare(self, saved: dict[str, Any]) -> None:
        shapes = checkpoint.shape_differences(saved, self.skeleton.shapes)
        lines = checkpoint.differences(saved, self.metadata)
        if lines and not self.allow_config_change:
            raise UserError(
                f"{self.workdir} was trained with another config: {'; '.join(lines)}. "
                "Use another --workdir, or --allow_config_change to continue it all the same"
            )
        if shapes:
            raise UserError(
                f"the parameters in {self.workdir} do not fit this config: {'; '.join(shapes[:4])}"
                + (f"; and {len(shapes) - 4} more" if len(shapes) > 4 else "")
            )
        for line in lines:
            self._say(f"[yellow]Config change: {line}[/]")
        before = config_io.from_dict(saved["config"]).training.num_steps
        if before != self.config.training.num_steps:
            self._say(
                f"num_steps: {before} -> {self.config.training.num_steps}; the learning rate "
                "follows the new schedule from here."
            )

    def _compile_train_step(self) -> Any:
        kernel = kernels.of_model(
            self.config.model,
            length=self.config.data.seq_len // self.mesh.shape["sequence"],
            backend=jax.default_backend(),
            dtype=compute_dtype(self.config.model).name,
        )
        if kernel is not None:
            self._say(f"Attention: {kernel} ({self.config.model.attention_kernel}).")
        begin = time.perf_counter()
        compiled = step.lower_train_step(self.config, self.skeleton, self.tx, self.mesh).compile()
        release_freed_memory()
        self._say(f"Compiled the train step in {time.perf_counter() - begin:.1f} s.")
        return compiled

    def _prepare_evaluation(self) -> None:
        training, tokenizer = self.config.training, self.dataset.tokenizer
        self._suites = None
        if training.suites:
            folder = training.suites_data_dir
            self._suites = Evaluator(
                SuiteConfig(
                    tasks=training.suites,
                    limit=training.suites_limit,
                    data_dir=None if folder is None else pathlib.Path(folder),
                ),
                self.skeleton,
                None,  # each evaluation brings its own
                tokenizer,
                self.mesh,
                max_length=self.config.data.seq_len,
                prefix=(tokenizer.eot_id,),
            )
        replicated = jax.sharding.NamedSharding(self.mesh, jax.P())
        self._score_step = jax.jit(
            perplexity.make_score_step(self.skeleton, chunk=training.loss_chunk),
            out_shardings=replicated,
        )
        self._sampler = jax.jit(
            sampling.make_sampler(
                self.skeleton,
                sampling.SamplingConfig(temperature=training.sample_temperature),
                num_tokens=training.sample_tokens,
                vocab_size=tokenizer.vocab_size,
            ),
            out_shardings=replicated,
        )

    def _evaluate(
        self,
        state: Any,
        done: int,
        writer: metrics.MetricsWriter,
        stop: list[str],
        *,
        complete: bool = False,
    ) -> None:
        limit = None if complete else self.config.training.eval_batches
        result = perplexity.score_dataset(
            self._score_step,
            state.params,
            self.dataset,
            self.config,
            self.mesh,
            limit=limit,
            stop=stop,
        )
        if stop:  # a preempted machine has no time to finish an evaluation
            return
        values = dataclasses.asdict(result)
        writer.write("eval", done, values | {"complete": int(limit is None)})
        self._say(
            f"[bold]step {done}  validation loss {result.loss:.4f}[/]"
            f"  perplexity {result.perplexity:,.1f}  bits per byte {result.bits_per_byte:.3f}"
        )
        if self.config.training.sample_tokens:
            text = self._sample(state)
            self._say(f"  [dim]{escape(repr(text))}[/]")
            self._write(
                SAMPLES_FILE, f"--- step {done}, validation loss {result.loss:.4f}\n{text}\n\n", "a"
            )

    def _evaluate_suites(self, state: Any, done: int, writer: metrics.MetricsWriter) -> None:
        assert self._suites is not None
        self._suites.params = state.params
        outcome = self._suites.run(Journal(None, {}), lambda *_: None)
        self._suites.params = None  # the next update reuses their memory
        values = {f"{m.task}/{m.name}": m.value for m in outcome.metrics}
        writer.write("suites", done, values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"[bold]step {done}[/]  {escape(shown)}")
        for notice in outcome.notices:
            self._say(f"  [dim]note: {escape(notice)}[/]")

    def _sample(self, state: Any) -> str:
        tokenizer = self.dataset.tokenizer
        prompt = [tokenizer.eot_id, *tokenizer.encode(self.config.training.sample_prompt)]
        key = jax.random.key(self.config.seed)
        tokens = self._sampler(state.params, np.asarray([prompt], np.int32), key)
        return tokenizer.decode([*prompt[1:], *np.asarray(tokens)[0].tolist()])

    def _write_config(self) -> None:
        self._write("config.json", json.dumps(self.metadata, indent=2) + "\n", "w")

    def _write(self, name: str, text: str, mode: Literal["a", "w"]) -> None:
        if not self.is_main:
            return
        try:
            with (self.workdir / name).open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:  # training goes on without it
            self._say(f"[yellow]{name} is not being written:[/] {error.strerror}")

    def _say(self, text: str) -> None:
        if self.is_main:
            self.console.print(text, highlight=False, soft_wrap=True)
