"""Suites of tasks on a model: lm-eval's tasks and needles, with one scorer and one generator."""

import contextlib
import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.progress
from jax.sharding import Mesh

from tlm_jax import output
from tlm_jax.data import Tokenizer
from tlm_jax.evaluation import needle, suites
from tlm_jax.evaluation.generation import Generator
from tlm_jax.evaluation.journal import Journal
from tlm_jax.evaluation.options import SuiteConfig
from tlm_jax.evaluation.scoring import Scorer
from tlm_jax.evaluation.suites import Metric, Outcome
from tlm_jax.models import Skeleton

Advance = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


class Evaluator:
    """Runs the same tasks on one or more sets of parameters of a model.

    Args:
      config: the tasks.
      skeleton: the model's structure.
      params: its parameters, on `mesh`; assign to `params` for others of the same shapes.
      tokenizer: the model's.
      mesh: the mesh, which must be the current one.
      max_length: most tokens the model was trained to read.
      prefix: token ids before every text (what begins a document in training).

    Raises:
      UserError: an unknown task, missing data, or lm-eval is not installed.
    """

    def __init__(
        self,
        config: SuiteConfig,
        skeleton: Skeleton,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        max_length: int,
        prefix: Sequence[int],
    ) -> None:
        self.config, self.tokenizer, self.prefix = config, tokenizer, tuple(prefix)
        names = suites.expand(config.tasks)
        self._harness_tasks: list[Any] = []
        if others := [name for name in names if name != "niah"]:
            suites.require_lm_eval()
            self._harness_tasks = suites.load_tasks(others, config.data_dir)
        longest = config.max_length or max_length
        self._examples: list[needle.Example] = []
        self._needle_data: dict[str, str] = {}
        lengths = config.needle.lengths or needle.default_lengths(longest)
        if "niah" in names:
            prose = needle.read_prose(config.needle.haystack)
            self._needle_data = needle.fingerprints(config.needle, prose)
            self._examples = list(
                needle.make_examples(config.needle, lengths, tokenizer, prose, len(self.prefix))
            )
        self._scorer = Scorer(
            skeleton, params, mesh, max_length=longest, batch_tokens=config.batch_tokens
        )
        self._generator = Generator(
            skeleton, params, tokenizer, mesh, max_length=max(longest, *lengths)
        )

    @functools.cached_property
    def data(self) -> dict[str, str]:
        """Fingerprint of each task's documents."""
        found = {
            task.config.task: suites.fingerprint(task, self.config.num_fewshot)
            for task in self._harness_tasks
        }
        return found | self._needle_data

    @property
    def params(self) -> Any:
        """The parameters that are evaluated."""
        return self._scorer.params

    @params.setter
    def params(self, params: Any) -> None:
        self._scorer.params = self._generator.params = params

    def run(self, journal: Journal, advance: Advance) -> Outcome:
        """Runs all tasks.

        Args:
          journal: answers that are known already, and where new ones are kept.
          advance: told of progress.
        """
        outcome = Outcome(metrics=(), samples={}, versions={})
        if self._harness_tasks:
            from tlm_jax.evaluation.harness import HarnessModel

            model = HarnessModel(
                self._scorer,
                self._generator,
                self.tokenizer,
                prefix=self.prefix,
                journal=journal,
                advance=advance,
            )
            outcome = suites.run(
                model,
                self._harness_tasks,
                limit=self.config.limit,
                num_fewshot=self.config.num_fewshot,
                log_samples=self.config.log_samples,
            )
            outcome = dataclasses.replace(outcome, notices=tuple(model.notices))
        if self._examples:
            answers = needle.run(
                self._generator,
                self.tokenizer,
                self._examples,
                prefix=self.prefix,
                journal=journal,
                advance=advance,
            )
            outcome = dataclasses.replace(
                outcome,
                metrics=(*outcome.metrics, *_needle_metrics(answers)),
                samples={**outcome.samples, "niah": answers},
            )
        return outcome


def _needle_metrics(answers: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    cells: dict[tuple[str, int], list[float]] = {}
    for a in answers:
        cells.setdefault((a["variant"], a["length"]), []).append(a["score"])
    for (variant, length), scores in cells.items():
        rows = len(scores)
        yield Metric(
            task=variant,
            name=f"acc@{length}",
            value=statistics.fmean(scores),
            standard_error=statistics.stdev(scores) / math.sqrt(rows) if rows > 1 else None,
            rows=rows,
        )


@contextlib.contextmanager
def progress(shown: bool = True) -> Iterator[Advance]:
    """A bar on a terminal, one line per tenth elsewhere; both on stderr."""
    # Its file is that of now: lm-eval's own output is caught later.
    console = output.console(file=sys.stderr, quiet=not shown)
    if console.is_terminal:
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        ) as bar:
            tasks: dict[tuple[str, int], rich.progress.TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                key = (what, total)
                if key not in tasks:
                    tasks[key] = bar.add_task(what, total=total)
                bar.update(tasks[key], completed=done)

            yield show
    else:

        def say(what: str, done: int, total: int) -> None:
            if total and (done == total or done * 10 // total > (done - 1) * 10 // total):
                console.print(f"{what} {done:,} of {total:,}")

        yield say
