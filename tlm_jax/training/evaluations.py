"""What a run evaluates while it trains: the validation split, with a sample, and suites."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tlm_jax import storage
from tlm_jax.config import RunConfig, UserError
from tlm_jax.data import Dataset
from tlm_jax.evaluation import perplexity
from tlm_jax.evaluation.evaluator import Evaluator
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.options import SuiteConfig
from tlm_jax.models import Skeleton, sampling
from tlm_jax.training import faults, metrics, step

SAMPLES_FILE = "samples.txt"


class Say(Protocol):
    """Shows a line of the log."""

    def __call__(self, text: str, style: str | None = None) -> None: ...


class Evaluations:
    """The evaluations of a run, made after a step is saved; none of them costs a step.

    There are two kinds, named as in `metrics.jsonl`, which tells what has been made: `eval` and
    `suites`.

    Args:
      config: the run.
      workdir: its folder.
      dataset: its text.
      skeleton: the model's structure.
      mesh: the mesh, which must be the current one when evaluations are made.
      say: shows a line.
      write: writes (file name, text, mode) in the run folder.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        dataset: Dataset,
        skeleton: Skeleton,
        mesh: Mesh,
        *,
        say: Say,
        write: Callable[[str, str, Literal["a", "w"]], None],
    ) -> None:
        self._config, self._workdir, self._dataset = config, workdir, dataset
        self._skeleton, self._mesh, self._say, self._write = skeleton, mesh, say, write
        self._suites: Evaluator | None = None

    def due(self, done: int) -> set[str]:
        """Kinds that are made after a step."""
        training = self._config.training
        last = done >= training.num_steps
        kinds = {"eval"} if last or metrics.due(done, training.eval_every) else set()
        if training.suites and (last or metrics.due(done, training.suites_every)):
            kinds.add("suites")
        return kinds

    def owed(self, start: int) -> set[str]:
        """Kinds that a run which starts at a step makes before its next step.

        They are those that were interrupted, or failed. Before the first step it is validation.
        """
        if start == 0:
            return {"eval"}
        due = sorted(self.due(start))
        whole = start >= self._config.training.num_steps  # then a part of the split is too little
        made = {
            record["kind"]
            for record in metrics.records(self._workdir)
            if record["step"] == start
            and (record["kind"] != "eval" or record.get("complete") or not whole)
        }
        missing = [kind not in made for kind in due]
        if due and jax.process_count() > 1:  # the first process writes the records, and decides
            missing = multihost_utils.broadcast_one_to_all(np.asarray(missing)).tolist()
        kinds = {kind for kind, gone in zip(due, missing, strict=True) if gone}
        if kinds:
            self._say(
                f"Step {start} has not been evaluated ({', '.join(kinds)}); that comes first."
            )
        return kinds

    def prepare(self, start: int, params: Any) -> None:
        """Compiles the steps of an evaluation.

        Args:
          start: the step that the run starts from.
          params: shapes and shardings of the parameters.

        Raises:
          UserError: at the start of training, that a suite cannot be evaluated. (A run that
            continues reports it when it is due, and keeps training.)
        """
        training, tokenizer = self._config.training, self._dataset.tokenizer
        if training.suites and start == 0:
            self._suites = self._open_suites()
        replicated = jax.sharding.NamedSharding(self._mesh, jax.P())
        rows = self._config.data.batch_size // training.grad_accumulation
        batch = step.abstract_batch(rows, self._config.data.seq_len, self._mesh)
        score_step = perplexity.make_score_step(
            self._skeleton, self._mesh, chunk=training.loss_chunk
        )
        # Compiled now and not at its first batch, which the watchdog watches.
        self._score_step = score_step.lower(params, batch).compile()
        self._sampler = jax.jit(
            sampling.make_sampler(
                self._skeleton,
                sampling.SamplingConfig(temperature=training.sample_temperature),
                num_tokens=training.sample_tokens,
                vocab_size=tokenizer.vocab_size,
            ),
            out_shardings=replicated,
        )

    def _open_suites(self) -> Evaluator:
        training, tokenizer = self._config.training, self._dataset.tokenizer
        folder = training.suites_data_dir
        return Evaluator(
            SuiteConfig(
                tasks=training.suites,
                limit=training.suites_limit,
                data_dir=None if folder is None else storage.path(folder),
            ),
            self._skeleton,
            None,  # each evaluation brings its own
            tokenizer,
            self._mesh,
            max_length=self._config.data.seq_len,
            prefix=(tokenizer.eot_id,),
        )

    def make(
        self,
        kinds: set[str],
        params: Any,
        done: int,
        writer: metrics.MetricsWriter,
        watchdog: faults.Watchdog,
        stop: faults.Stop,
    ) -> set[str]:
        """Makes evaluations of a step; returns the kinds that a signal to stop left unmade."""

        def between(*_: Any) -> None:
            watchdog.alive(f"evaluating step {done}")
            if stop.signal:  # a preempted machine has no time to finish an evaluation
                raise faults.Stopped

        if not kinds:
            return kinds
        watchdog.alive(f"evaluating step {done}")
        todo = sorted(kinds)
        makers = {"eval": self._validate, "suites": self._run_suites}
        with contextlib.suppress(faults.Stopped):
            while todo and not stop.signal:
                makers[todo[0]](params, done, writer, between)
                del todo[0]
        watchdog.alive(f"waiting for step {done + 1}")
        return set(todo)

    def _validate(
        self,
        params: Any,
        done: int,
        writer: metrics.MetricsWriter,
        between: Callable[..., None],
    ) -> None:
        training = self._config.training
        limit = None if done >= training.num_steps else training.eval_batches
        result = perplexity.score_dataset(
            self._score_step,
            params,
            self._dataset,
            self._config,
            self._mesh,
            limit=limit,
            between=between,
        )
        values = dataclasses.asdict(result)
        writer.write("eval", done, values | {"complete": int(limit is None)})
        self._say(
            f"step {done}  validation loss {result.loss:.4f}"
            f"  perplexity {result.perplexity:,.1f}  bits per byte {result.bits_per_byte:.3f}",
            "bold",
        )
        if training.sample_tokens:
            text = self._sample(params)
            self._say(f"  {text!r}", "dim")
            self._write(
                SAMPLES_FILE, f"--- step {done}, validation loss {result.loss:.4f}\n{text}\n\n", "a"
            )

    def _run_suites(
        self,
        params: Any,
        done: int,
        writer: metrics.MetricsWriter,
        between: Callable[..., None],
    ) -> None:
        """Evaluates the suites; errors in them are reported and do not stop the run."""
        try:
            if self._suites is None:
                self._suites = self._open_suites()
            self._suites.params = params
            outcome = self._suites.run(Journal(None, {}), between)
        except faults.Stopped:
            raise
        except Exception as error:
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process is gone
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())[:300]
            self._say(f"step {done}  the suites failed, and training continues: {reason}", "yellow")
            return
        finally:
            if self._suites is not None:
                self._suites.params = None  # the next update reuses their memory
        values = {f"{m.task}/{m.name}": m.value for m in outcome.metrics}
        writer.write("suites", done, values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"step {done}  {shown}", "bold")
        for notice in outcome.notices:
            self._say(f"  note: {notice}", "dim")

    def _sample(self, params: Any) -> str:
        tokenizer = self._dataset.tokenizer
        prompt = [tokenizer.eot_id, *tokenizer.encode(self._config.training.sample_prompt)]
        key = jax.random.key(self._config.seed)
        tokens = self._sampler(params, np.asarray([prompt], np.int32), key)
        return tokenizer.decode([*prompt[1:], *np.asarray(tokens)[0].tolist()])
