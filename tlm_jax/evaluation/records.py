"""Results of evaluations: as JSON in a run folder, and as a table of several checkpoints."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

import tlm_jax
from tlm_jax import config_io
from tlm_jax.config import RunConfig, UserError
from tlm_jax.evaluation import suites
from tlm_jax.evaluation.options import SuiteConfig
from tlm_jax.evaluation.suites import Metric, Outcome

FOLDER = "eval"
_SMALLER_IS_BETTER = ("perplexity", "bits_per_byte")


def record(
    outcome: Outcome, *, checkpoint: str, step: int, run: RunConfig, how: SuiteConfig
) -> dict[str, Any]:
    """Everything that the figures depend on, as JSON values.

    Args:
      outcome: the figures.
      checkpoint: the run folder.
      step: of the checkpoint.
      run: the resolved config.
      how: what was evaluated.
    """
    packages = ("jax", "jaxlib", "flax", "numpy", "lm_eval", "datasets", "tokenizers")
    return {
        "checkpoint": checkpoint,
        "step": step,
        "metrics": [dataclasses.asdict(m) for m in outcome.metrics],
        "average": suites.average(outcome.metrics),
        "settings": json.loads(json.dumps(dataclasses.asdict(how), default=str)),
        "task_versions": outcome.versions,
        "versions": {
            "tlm_jax": tlm_jax.__version__,
            "python": platform.python_version(),
            **{name: version for name in packages if (version := _version(name))},
        },
        "config": config_io.to_dict(run),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_name(tasks: Sequence[str], step: int) -> str:
    """Where a record lies below a run's folder `eval`, without the suffix."""
    return f"{'+'.join(t.replace('/', '_') for t in tasks)}-{step}"


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a run folder, or of one JSON file, oldest first.

    Raises:
      UserError: there is none, or one that cannot be read.
    """
    files = [folder] if folder.is_file() else sorted((folder / FOLDER).glob("*.json"))
    if not files:
        raise UserError(
            f"{folder} has no results: no {FOLDER}/*.json (tlm eval --tasks makes them)"
        )
    records = []
    for file in sorted(files, key=lambda f: f.stat().st_mtime):
        try:
            records.append(parsed(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a result of tlm eval ({error})") from error
    return records


def parsed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its metrics as `Metric`."""
    return record | {"metrics": [Metric(**m) for m in record["metrics"]]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str
    best: bool = False


_Rows = list[tuple[str, str, list[_Cell]]]


def _rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], _Rows]:
    """Names of the checkpoints, and (task, metric, a cell for each) in the order of the records.

    Of several records of one checkpoint and step, the newest figure counts.
    """
    columns: dict[tuple[str, int], dict[tuple[str, str], Metric]] = {}
    for one in records:
        metrics = columns.setdefault((one["checkpoint"], one["step"]), {})
        metrics.update({(m.task, m.name): m for m in one["metrics"]})
    rows: _Rows = []
    for task, name in dict.fromkeys(key for metrics in columns.values() for key in metrics):
        found = [metrics.get((task, name)) for metrics in columns.values()]
        best = _best([m.value if m else None for m in found], name)
        cells = [_Cell(text=_text(m), best=b) for m, b in zip(found, best, strict=True)]
        rows.append((task, name, cells))
    averages = [suites.average(list(metrics.values())) for metrics in columns.values()]
    if any(a is not None for a in averages):
        texts = ["" if a is None else f"{a:.4f}" for a in averages]
        rows.append(("average", "of eight accuracies", [_Cell(text=t) for t in texts]))
    return [f"{name}, step {step}" for name, step in columns], rows


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Figures with standard errors, a column for each checkpoint; the paper's metrics in bold."""
    names, rows = _rows(records)
    result = Table()
    result.add_column("task")
    result.add_column("metric")
    for name in names:
        result.add_column(name, justify="right")
    for task, metric, cells in rows:
        result.add_row(
            task,
            Text(metric, "bold" if metric in suites.COLUMNS.get(task, ()) else ""),
            *(Text(c.text, "green" if c.best else "") for c in cells),
        )
    return result


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The same as a Markdown table."""
    names, rows = _rows(records)
    lines = [["task", "metric", *names], ["---"] * (2 + len(names))]
    for task, metric, cells in rows:
        lines.append([task, metric, *(f"**{c.text}**" if c.best else c.text for c in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(metric: Metric | None) -> str:
    if metric is None:
        return ""
    text = f"{metric.value:,.4f}"
    return text if metric.standard_error is None else f"{text} ± {metric.standard_error:.4f}"


def _best(values: Sequence[float | None], metric: str) -> list[bool]:
    """Which value is best; none where there is nothing to compare."""
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return [False] * len(values)
    best = min(known) if any(w in metric for w in _SMALLER_IS_BETTER) else max(known)
    return [v == best for v in values]
