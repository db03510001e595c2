"""Results of evaluations as JSON in a run folder, with what they depend on."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import tlm_jax
from tlm_jax import config_io, files
from tlm_jax.config import RunConfig, UserError
from tlm_jax.evaluation import suites
from tlm_jax.evaluation.options import NeedleConfig, SuiteConfig
from tlm_jax.evaluation.suites import Metric, Outcome

FOLDER = "eval"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What figures depend on besides the tasks and the options."""

    params_id: str
    """Names the parameters."""
    max_length: int
    """Most tokens that the model read."""
    trained_length: int
    """Tokens of a training sequence."""
    precision: str
    """Dtype of the layers' arithmetic."""
    tokenizer: str
    """Fingerprint."""
    data: dict[str, str]
    """Fingerprint of each task's documents."""


def record(
    outcome: Outcome,
    *,
    checkpoint: str,
    step: int,
    run: RunConfig,
    how: SuiteConfig,
    conditions: Conditions,
) -> dict[str, Any]:
    """Everything that the figures depend on, as JSON values.

    Args:
      outcome: the figures.
      checkpoint: the run folder.
      step: of the checkpoint.
      run: the resolved config.
      how: what was evaluated.
      conditions: under which.
    """
    packages = ("jax", "jaxlib", "flax", "numpy", "lm_eval", "datasets", "tokenizers")
    return {
        "checkpoint": checkpoint,
        "step": step,
        "metrics": [dataclasses.asdict(m) for m in outcome.metrics],
        "average": suites.average(outcome.metrics),
        "settings": json.loads(json.dumps(dataclasses.asdict(how), default=str)),
        "conditions": dataclasses.asdict(conditions),
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


def file_name(how: SuiteConfig, step: int, conditions: Conditions | None = None) -> str:
    """Where a record lies below a run's folder `eval`, without the suffix.

    Options that make a different measurement are part of it, so that no quick look replaces a
    full evaluation.

    Args:
      how: what is evaluated.
      step: of the checkpoint.
      conditions: under which; None leaves out the precision and the data, for a file of
        answers (which hold for any data).
    """
    parts = ["+".join(task.replace("/", "_") for task in how.tasks), str(step)]
    if how.limit is not None:
        parts.append(f"limit{how.limit}")
    if how.num_fewshot is not None:
        parts.append(f"shots{how.num_fewshot}")
    if how.max_length is not None:
        parts.append(f"length{how.max_length}")
    if "niah" in suites.expand(how.tasks) and how.needle != NeedleConfig():
        parts.append(f"needles{digest(dataclasses.asdict(how.needle))[:8]}")
    if conditions is not None and conditions.precision != "float32":
        parts.append(conditions.precision)
    if conditions is not None and how.data_dir is not None:
        parts.append(f"data{digest(conditions.data)[:8]}")
    return "-".join(parts)


def digest(value: Any) -> str:
    """16 hex digits that change with a value (JSON values; others by their text)."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A record that was read back; records of older versions know less of how they came about."""

    checkpoint: str
    """As it is shown."""
    run: str
    """Equal for results of the same parameters, by whatever path they were found."""
    step: int
    metrics: tuple[Metric, ...]
    settings: dict[str, Any]
    """limit, num_fewshot, max_length, trained_length, precision, tokenizer; not what is unknown."""
    data: dict[str, str]
    """Fingerprints of the documents by task; not of tasks where it is unknown."""


def read(folder: pathlib.Path) -> list[Result]:
    """The results of a run folder, or of one JSON file, oldest first.

    Raises:
      UserError: there is none, or one that cannot be read or was damaged.
    """
    found = [folder] if folder.is_file() else sorted((folder / FOLDER).glob("*.json"))
    if not found:
        raise UserError(
            f"{folder} has no results: no {FOLDER}/*.json (tlm eval --tasks makes them)"
        )
    results = []
    for file in sorted(found, key=lambda f: f.stat().st_mtime):
        values = files.read_json(file)
        place = file.resolve().parent
        run = str(place.parent) if place.name == FOLDER else None
        try:
            results.append(parsed(values, run))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is not a result of tlm eval ({type(error).__name__}: {error})"
            ) from error
    return results


def parsed(record: dict[str, Any], folder: str | None = None) -> Result:
    """A record as a `Result`.

    Args:
      record: see `record`.
      folder: the run folder that it was found in, if it was.
    """
    how, config = record["settings"], record.get("config", {})
    conditions = record.get("conditions", {})
    trained = conditions.get("trained_length", config.get("data", {}).get("seq_len"))
    settings = {key: how[key] for key in ("limit", "num_fewshot") if key in how} | {
        "max_length": conditions.get("max_length") or how.get("max_length") or trained,
        "trained_length": trained,
        "precision": conditions.get("precision"),
        "tokenizer": conditions.get("tokenizer"),
    }
    known = ("limit", "num_fewshot")  # None is a value of theirs
    for key, value in settings.items():
        if not isinstance(value, int | str | None):
            raise ValueError(f"{key} is {value!r}")
    return Result(
        checkpoint=str(record["checkpoint"]),
        run=conditions.get("params_id") or folder or str(record["checkpoint"]),
        step=int(record["step"]),
        metrics=tuple(_metric(**m) for m in record["metrics"]),
        settings={k: v for k, v in settings.items() if v is not None or k in known},
        data=dict(conditions.get("data", {})),
    )


def _metric(**values: Any) -> Metric:
    metric = Metric(**values)
    numbers = (metric.value, metric.rows, metric.standard_error or 0.0)
    if not all(isinstance(n, int | float) for n in numbers):
        raise ValueError(f"{metric.task} {metric.name} is not a number")
    return metric
