"""Named suites of tasks, run through lm-eval; offline too, from a folder of JSON lines.

Importing this imports neither lm-eval nor jax.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tlm_jax.config import UserError

COMMONSENSE = (
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "boolq",
)
SUITES: dict[str, tuple[str, ...]] = {
    "lambada": ("lambada_openai",),
    "commonsense": COMMONSENSE,
    "wikitext": ("wikitext",),
    "niah": ("niah",),
    "paper": ("wikitext", "lambada_openai", *COMMONSENSE),
}
"""Tasks of each suite; `niah` is ours, the others are lm-eval's."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "wikitext": ("word_perplexity",),
    "lambada_openai": ("perplexity", "acc"),
    "hellaswag": ("acc_norm",),
    "arc_challenge": ("acc_norm",),
} | dict.fromkeys(("piqa", "winogrande", "arc_easy", "social_iqa", "boolq"), ("acc",))
"""The metrics that the paper's tables hold (columns of Titans, arXiv 2501.00663, table 1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a task."""

    task: str
    name: str
    value: float
    standard_error: float | None
    """None where lm-eval gives none."""
    rows: int
    """Documents that it is made of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of some tasks gave."""

    metrics: tuple[Metric, ...]
    samples: dict[str, list[dict[str, Any]]]
    """By task: what was asked and answered for each document; empty unless wanted."""
    versions: dict[str, Any]
    """Of each task."""
    notices: tuple[str, ...] = ()
    """What a user should know about the figures, one line each."""


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """Tasks of suites and tasks, each once, in the order given."""
    return tuple(dict.fromkeys(t for name in names for t in SUITES.get(name, (name,))))


def average(metrics: Sequence[Metric]) -> float | None:
    """The paper's average: the plain mean of the eight accuracies, LAMBADA included.

    None unless all eight are there.
    """
    wanted = [(t, n) for t, names in COLUMNS.items() for n in names if n.startswith("acc")]
    found = {(m.task, m.name): m.value for m in metrics}
    if any(key not in found for key in wanted):
        return None
    return sum(found[key] for key in wanted) / len(wanted)


def require_lm_eval() -> None:
    """Raises `UserError` where the extra `eval` is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation suites need lm-eval: pip install 'tlm-jax[eval]'")


def load_tasks(names: Sequence[str], data_dir: pathlib.Path | None) -> list[Any]:
    """lm-eval's tasks by name, read from the hub or from a folder.

    Args:
      names: of tasks, groups or tags that lm-eval knows.
      data_dir: a folder with TASK/SPLIT.jsonl (rows with the hub's columns) for each task;
        None reads from the hub.

    Raises:
      UserError: an unknown task, a missing or broken file, or a hub out of reach.
    """
    with quiet():
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml

        _keep_templates()
        manager = _manager(tuple(names))
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            known = sorted({*SUITES, *manager.all_tasks})
            near = difflib.get_close_matches(unknown[0], known, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"unknown task or suite {unknown[0]!r}{hint}")
        tasks = []
        for name in names:
            entry = manager.task_index[name]
            if data_dir is None:
                tasks += _from_hub(manager, name)
                continue
            if entry.yaml_path is None or "task_list" in entry.kind.name.lower():
                raise UserError(f"{name} is not a single task, so --data_dir cannot provide it")
            config = dict(load_yaml(entry.yaml_path))
            splits = _read_folder(data_dir, name)
            for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
                if config.get(key) not in splits:
                    config.pop(key, None)
            if not config.keys() & {"validation_split", "test_split"}:
                raise UserError(
                    f"{data_dir / name} has neither the test nor the validation split of {name}, "
                    f"only {', '.join(sorted(splits))}"
                )
            for key in ("tag", "group", "dataset_path", "dataset_name", "dataset_kwargs"):
                config.pop(key, None)
            config["custom_dataset"] = _as_function(splits)
            columns = {column for rows in splits.values() for column in rows[0]}
            if absent := sorted(_columns(config) - columns):
                raise UserError(f"{data_dir / name} has no column {absent[0]!r}")
            try:
                task = ConfigurableTask(config=config)
            except Exception as error:  # whatever lm-eval and datasets make of the rows
                raise UserError(
                    f"{data_dir / name} does not hold the rows of {name} ({_told(error)})"
                ) from error
            _check(task, data_dir / name)
            tasks.append(task)
        return tasks


def _keep_templates() -> None:
    """Lets lm-eval compile each template once: it does so for every document, which takes most
    of the time of building requests."""
    from lm_eval import utils

    compile_ = utils.env.from_string
    if not hasattr(compile_, "cache_info"):
        setattr(utils.env, "from_string", functools.lru_cache(maxsize=256)(compile_))  # noqa: B010


def _documents(task: Any) -> Any:
    """What is evaluated of a task; `eval_docs` would process it again."""
    return task.task_docs if hasattr(task, "task_docs") else task.eval_docs


def _columns(config: dict[str, Any]) -> set[str]:
    """Columns that a task's templates name, where they are those of the data."""
    from jinja2 import Environment, meta

    keys = () if "process_docs" in config else ("doc_to_text", "doc_to_target", "doc_to_choice")
    templates = [config[key] for key in keys if isinstance(config.get(key), str)]
    parsed = [Environment(autoescape=True).parse(template) for template in templates]
    return {name for tree in parsed for name in meta.find_undeclared_variables(tree)}


def _check(task: Any, folder: pathlib.Path) -> None:
    """Raises `UserError` for the first document that cannot be asked, or has no right answer.

    lm-eval would end with a stack trace, or take it for a wrong answer of the model.
    """
    for number, doc in enumerate(_documents(task), 1):
        try:
            text, target = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = None
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = task.doc_to_choice(doc)
                target = text if task.multiple_input else target
        except Exception as error:  # whatever a task's own functions make of the row
            raise UserError(
                f"{folder}, document {number}: it cannot be asked ({_told(error)})"
            ) from error
        if choices is None:
            continue
        right = target if isinstance(target, list) else [target]
        if not all(r in choices or r in range(len(choices)) for r in right):
            column = task.config.doc_to_target
            if target == column and column not in task.features:
                raise UserError(f"{folder} has no column {column!r}")
            raise UserError(
                f"{folder}, document {number}: its label is {target!r}, which is none of its "
                f"{len(choices)} choices"
            )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def fingerprint(task: Any, num_fewshot: int | None) -> str:
    """16 hex digits that change with a task's documents, and those that its shots come from."""
    found = hashlib.sha256()
    shots = task.config.num_fewshot if num_fewshot is None else num_fewshot
    for rows in (_documents(task), task.fewshot_docs() if shots else ()):
        for row in rows or ():
            found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()[:16]


_FOLDERS = ("lambada", "piqa", "hellaswag", "winogrande", "arc", "siqa", "super_glue", "wikitext")
"""Where lm-eval keeps the tasks of our suites."""


@functools.cache
def _manager(names: tuple[str, ...]) -> Any:
    """lm-eval's index of its tasks; the whole of it, which takes ten seconds, only if needed."""
    import lm_eval.tasks

    root = pathlib.Path(lm_eval.tasks.__file__).parent
    folders = [root / name for name in _FOLDERS if (root / name).is_dir()]
    few = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    return few if set(names) <= few.task_index.keys() else _all_tasks()


@functools.cache
def _all_tasks() -> Any:
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


def _as_function(splits: dict[str, list[dict[str, Any]]]) -> Any:
    def make(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    return make


def _read_folder(data_dir: pathlib.Path, task: str) -> dict[str, list[dict[str, Any]]]:
    folder = data_dir / task
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder} has no SPLIT.jsonl; --data_dir needs a folder for each task")
    return {file.stem: _read_lines(file) for file in files}


def _read_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: not an object with columns")
            if rows and row.keys() != rows[0].keys():
                other = sorted(row.keys() ^ rows[0].keys())[0]
                has, first = ("has no", "has") if other in rows[0] else ("has a", "has not")
                raise UserError(
                    f"{file}, line {number}: it {has} column {other!r}, which line 1 {first}"
                )
            rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty")
    return rows


def _from_hub(manager: Any, name: str) -> list[Any]:
    try:
        return list(manager.load([name])["tasks"].values())
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"the data of {name} cannot be read from the hub ({type(error).__name__}); "
            "give a folder of JSON lines with --data_dir"
        ) from error


def run(
    model: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None,
    num_fewshot: int | None,
    log_samples: bool,
) -> Outcome:
    """Runs lm-eval's tasks on a `harness.HarnessModel`.

    Args:
      model: the model.
      tasks: from `load_tasks`.
      limit: first documents of each task; None is all.
      num_fewshot: examples before each question; None is what the task says (mostly 0).
      log_samples: keep what was asked and answered.
    """
    import lm_eval

    with quiet():
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=log_samples,
            bootstrap_iters=1000,
            task_manager=_manager(()),
        )
    assert results is not None
    metrics = []
    for task, values in results["results"].items():
        rows = results["n-samples"][task]["effective"] if task in results["n-samples"] else 0
        metrics += list(_metrics(task, values, rows))
    samples = {
        task: [_plain(sample) for sample in of_task]
        for task, of_task in results.get("samples", {}).items()
    }
    return Outcome(
        metrics=tuple(metrics), samples=samples, versions=dict(results.get("versions", {}))
    )


def _metrics(task: str, values: dict[str, Any], rows: int) -> Iterator[Metric]:
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{chosen}")
        if not isinstance(error, int | float) or not math.isfinite(error):
            error = None
        yield Metric(
            task=task,
            name=name if chosen == "none" else f"{name} ({chosen})",
            value=float(value),
            standard_error=error,
            rows=rows,
        )


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample's document, requests, answers and metrics, as JSON values."""
    names = ("doc_id", "doc", "arguments", "target", "filtered_resps")
    kept = {key: sample[key] for key in (*names, *sample.get("metrics", ())) if key in sample}
    return json.loads(json.dumps(kept, default=str))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the log lines and bars of lm-eval and datasets from the terminal."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # lm-eval would fork this process for its bootstrap: copies of a multi-threaded process that
    # heed our SIGTERM handler instead of ending.
    os.environ["DISABLE_MULTIPROC"] = "1"
    names = ("lm_eval", "lm-eval", "datasets", "httpx", "urllib3", "huggingface_hub")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        unseen = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(unseen),
            contextlib.redirect_stdout(unseen),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
