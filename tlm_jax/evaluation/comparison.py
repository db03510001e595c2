"""Results of several checkpoints side by side; like is compared with like only.

Figures are averaged, and compared for the best, only where they were measured alike: the same
limit, shots, length, precision, tokenizer and documents. What an older record does not say is
unknown, and like nothing but what is unknown as well.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tlm_jax import output
from tlm_jax.evaluation import suites
from tlm_jax.evaluation.result_files import Result, digest
from tlm_jax.evaluation.suites import Metric

_SMALLER_IS_BETTER = ("perplexity", "bits_per_byte")
_LABELS = {
    "limit": "limit",
    "num_fewshot": "shots",
    "max_length": "length",
    "trained_length": "trained length",
    "precision": "precision",
    "tokenizer": "tokenizer",
}
_UNKNOWN = "unknown"
_OF_THE_MODEL = ("trained_length",)
"""Settings that are shown, but make no difference to how something is measured."""


@dataclasses.dataclass(kw_only=True)
class _Column:
    """Figures of one checkpoint that were measured alike; the newest of each."""

    name: str
    checkpoint: tuple[str, int]
    settings: dict[str, Any]
    metrics: dict[tuple[str, str], Metric] = dataclasses.field(default_factory=dict)
    data: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def holds(self, task: str, metrics: Sequence[Metric], data: str | None) -> bool:
        """Whether a task's figures can stand here: on the same documents, if there are any."""
        if task not in self.data:
            return True
        before = {m.rows for (other, _), m in self.metrics.items() if other == task}
        return self.data[task] == data and before == {m.rows for m in metrics}

    def shared(self) -> dict[str, Hashable]:
        """How all figures of the column were measured."""
        return {k: self.settings.get(k, _UNKNOWN) for k in _LABELS if k not in _OF_THE_MODEL}

    def how(self, task: str, name: str) -> dict[str, Hashable]:
        """How a figure was measured, by what it depends on."""
        data = self.data[task]
        return self.shared() | {
            "data": data[:8] if data else _UNKNOWN,
            "documents": self.metrics[task, name].rows,
        }


def _columns(results: Sequence[Result]) -> list[_Column]:
    columns: list[_Column] = []
    for one in results:
        tasks: dict[str, list[Metric]] = {}
        for metric in one.metrics:
            tasks.setdefault(metric.task, []).append(metric)
        for task, metrics in tasks.items():
            data = one.data.get(task)
            for column in columns:
                if (
                    column.checkpoint == (one.run, one.step)
                    and column.settings == one.settings
                    and column.holds(task, metrics, data)
                ):
                    break
            else:
                column = _Column(
                    name=f"{one.checkpoint}, step {one.step}",
                    checkpoint=(one.run, one.step),
                    settings=one.settings,
                )
                columns.append(column)
            column.data[task] = data
            column.metrics.update({(m.task, m.name): m for m in metrics})
    return columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str
    best: bool = False


_Rows = list[tuple[str, str, list[_Cell]]]


def _rows(columns: Sequence[_Column]) -> _Rows:
    """(task, metric, a cell for each column): settings, figures, averages."""
    rows: _Rows = []
    for key, label in _LABELS.items():
        if any(key in column.settings for column in columns):
            texts = [_setting(key, c.settings.get(key, _UNKNOWN)) for c in columns]
            rows.append(("setting", label, [_Cell(text=t) for t in texts]))
    if any(data for column in columns for data in column.data.values()):
        texts = [digest(c.data)[:8] if all(c.data.values()) else _UNKNOWN for c in columns]
        rows.append(("setting", "data", [_Cell(text=t) for t in texts]))
    for task, name in _figures(columns):
        found = [column.metrics.get((task, name)) for column in columns]
        best: set[int] = set()
        for group in _groups(columns, task, name).values():
            best |= _best({i: columns[i].metrics[task, name].value for i in group}, name)
        cells = [_Cell(text=_text(m), best=i in best) for i, m in enumerate(found)]
        rows.append((task, name, cells))
    averages = [suites.average(list(column.metrics.values())) for column in columns]
    if any(a is not None for a in averages):
        texts = ["" if a is None else f"{a:.4f}" for a in averages]
        rows.append(("average", "of eight accuracies", [_Cell(text=t) for t in texts]))
    return rows


def _figures(columns: Sequence[_Column]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(key for column in columns for key in column.metrics))


def _groups(
    columns: Sequence[_Column], task: str, name: str
) -> dict[tuple[tuple[str, Hashable], ...], list[int]]:
    """Columns that have a figure, by how it was measured."""
    groups: dict[tuple[tuple[str, Hashable], ...], list[int]] = {}
    for index, column in enumerate(columns):
        if (task, name) in column.metrics:
            groups.setdefault(tuple(column.how(task, name).items()), []).append(index)
    return groups


def note(results: Sequence[Result]) -> str | None:
    """One line that says what was not compared, and why; None if everything was."""
    columns = _columns(results)
    apart: dict[str, list[str]] = {}

    def compare(measured: Iterable[dict[str, Hashable]]) -> None:
        some = list(measured)
        for key in some[0] if some else ():
            values = list(dict.fromkeys(_setting(key, one[key]) for one in some))
            if len(values) > 1:
                told = apart.setdefault(_LABELS.get(key, key), [])
                told += [value for value in values if value not in told]

    for task, name in _figures(columns):
        compare(dict(group) for group in _groups(columns, task, name))
    for column in columns:  # one checkpoint's figures, of other tasks too: they have an average
        same = [c for c in columns if c.checkpoint == column.checkpoint]
        compare(c.shared() for c in same)
    if not apart:
        return None
    why = "; ".join(f"{label}: {', '.join(values)}" for label, values in apart.items())
    return f"Neither averaged nor compared, because they were not measured alike ({why})."


def table(results: Sequence[Result]) -> Table:
    """Figures with standard errors, a column for each checkpoint; the paper's metrics in bold."""
    columns = _columns(results)
    result = output.table("task", "metric", *(column.name for column in columns), texts=2)
    for task, metric, cells in _rows(columns):
        result.add_row(
            task,
            Text(metric, "bold" if metric in suites.COLUMNS.get(task, ()) else ""),
            *(Text(c.text, "green" if c.best else "") for c in cells),
        )
    return result


def markdown(results: Sequence[Result]) -> str:
    """The same as a Markdown table, with the note below it."""
    columns = _columns(results)
    rows = (
        [task, metric, *(f"**{c.text}**" if c.best else c.text for c in cells)]
        for task, metric, cells in _rows(columns)
    )
    text = output.markdown_table(["task", "metric", *(c.name for c in columns)], rows)
    below = note(results)
    return text if below is None else f"{text}\n\n{below}"


def _setting(key: str, value: Any) -> str:
    if value is None:
        return "all" if key == "limit" else "the task's own"
    if key == "tokenizer":
        return str(value)[:8]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _text(metric: Metric | None) -> str:
    if metric is None:
        return ""
    text = f"{metric.value:,.4f}"
    return text if metric.standard_error is None else f"{text} ± {metric.standard_error:,.4f}"


def _best(values: dict[int, float], metric: str) -> set[int]:
    """Which columns are best; none where there is nothing to compare."""
    if len(values) < 2:
        return set()
    smaller = any(word in metric for word in _SMALLER_IS_BETTER)
    best = (min if smaller else max)(values.values())
    return {index for index, value in values.items() if value == best}
