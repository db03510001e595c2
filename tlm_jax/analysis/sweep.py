"""Sweeps: named variations of one config, each with several seeds, at one budget.

A sweep file has `get_sweep()`, which returns a `Sweep`. A cell is an arm with a seed; the seed
draws the parameters and the order of the data, so that cells of one seed are pairs. Each cell is
a run of `tlm train` in a process and a folder of its own, and leaves `result.json` there; the
results of all cells are gathered in `results.jsonl`. With `vmap_seeds` one process trains the cells
of an arm.
"""

import concurrent.futures
import dataclasses
import difflib
import importlib.metadata
import itertools
import pathlib
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

import tlm_jax
from tlm_jax import cluster, config_io, costs, files
from tlm_jax.analysis import sweep_cell, sweep_seeds
from tlm_jax.analysis.plots import series
from tlm_jax.config import RunConfig, UserError

RESULTS, RESULT = "results.jsonl", "result.json"
_CURVE_POINTS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One variation."""

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values by dotted field, such as {"model.taper.start": 1.25}; a mixer is set as a whole."""
    seeds: tuple[int, ...] = ()
    """Empty means those of the sweep."""
    baseline: str = ""
    """The arm that it is compared with and must match in budget; empty means the sweep's."""
    tokens_before: int = 0
    """Tokens of a run that the arm's widths were read from, which its budget includes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """An arm with a seed."""

    arm: Arm
    seed: int

    @property
    def folder(self) -> str:
        """Its folder inside the sweep's."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.arm.name).strip('-')}-{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Arms of one base config.

    Raises:
      UserError: names that clash, or a baseline or a comparison that is not an arm.
    """

    name: str
    base: RunConfig
    arms: tuple[Arm, ...]
    baseline: str = "uniform"
    """Name of the arm with which the others are compared."""
    seeds: tuple[int, ...] = (0, 1, 2)
    primary: tuple[tuple[str, str], ...] = ()
    """Pairs of arms whose difference carries the claim; they share one level of significance."""
    best_of: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """A name, for use in `primary`, for the best of several arms: that of the lowest mean loss over
    the seeds `chosen_on`. It is compared on the other seeds, so that the choice does not bias it.
    """
    chosen_on: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        folders = {cell.folder for cell in self.cells}
        if len(set(names)) < len(names) or len(folders) < len(self.cells):
            raise UserError(f"sweep {self.name}: two cells have one name: {', '.join(names)}")
        for arm in self.arms:
            if (arm.baseline or self.baseline) not in names:
                raise UserError(
                    f"sweep {self.name}: the baseline {arm.baseline or self.baseline!r} of arm "
                    f"{arm.name!r} is not one of its arms"
                )

        compared = {name for pair in self.primary for name in pair} - set(self.best_of)
        for field, used in (
            ("primary", compared),
            ("best_of", set(itertools.chain(*self.best_of.values()))),
        ):
            if strangers := used - set(names):
                raise UserError(
                    f"sweep {self.name}: {min(strangers)!r} in {field} is not one of its arms"
                )
        if self.best_of and not self.chosen_on:
            raise UserError(f"sweep {self.name}: best_of needs chosen_on, the seeds to choose by")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Seed by seed, so that a sweep that is cut short still has pairs."""
        seeds = sorted({s for arm in self.arms for s in arm.seeds or self.seeds})
        pairs = itertools.product(seeds, self.arms)
        return tuple(Cell(arm=a, seed=s) for s, a in pairs if s in (a.seeds or self.seeds))

    def with_seeds(self, seeds: Sequence[int]) -> "Sweep":
        """The sweep with these seeds in every arm."""
        arms = tuple(dataclasses.replace(arm, seeds=()) for arm in self.arms)
        return dataclasses.replace(self, arms=arms, seeds=tuple(dict.fromkeys(seeds)))

    def config(self, cell: Cell) -> RunConfig:
        """The run of a cell.

        Raises:
          UserError: a field that does not exist, or a value that it refuses.
        """
        changes: dict[str, Any] = {"name": f"{self.name}: {cell.arm.name}, seed {cell.seed}"}
        changes |= {"seed": cell.seed, "data.seed": cell.seed, **cell.arm.changes}
        try:
            return changed(self.base, changes)
        except UserError as error:
            raise UserError(f"sweep {self.name}, arm {cell.arm.name!r}: {error}") from None

    def check(self) -> None:
        """Refuses arms whose parameters, FLOPs or tokens are not those of their baseline.

        Raises:
          UserError: which arm, and by how much.
        """
        budgets = {}
        for arm in self.arms:
            budgets[arm.name] = budget(self.config(Cell(arm=arm, seed=0)))
            budgets[arm.name]["tokens"] += arm.tokens_before
        for arm in self.arms:
            baseline = arm.baseline or self.baseline
            for what, value in budgets[arm.name].items():
                if value != budgets[baseline][what]:
                    shown = what.replace("FLOPs a token", "FLOPs per token")
                    raise UserError(
                        f"sweep {self.name}: arm {arm.name!r} has {value:,} {shown}, its baseline "
                        f"{baseline!r} {budgets[baseline][what]:,}; cells must have equal budgets"
                    )


def grid(fields: Mapping[str, Sequence[Any]]) -> tuple[Arm, ...]:
    """An arm for each combination of values, named after them: "schedule=cosine start=1.5"."""
    short = [name.rpartition(".")[2] for name in fields]
    return tuple(
        Arm(
            name=" ".join(f"{name}={value}" for name, value in zip(short, values, strict=True)),
            changes=dict(zip(fields, values, strict=True)),
        )
        for values in itertools.product(*fields.values())
    )


def budget(config: RunConfig) -> dict[str, int]:
    """What cells that are compared must share."""
    per_token = costs.model_costs(config.model, config.data.seq_len)
    return {
        "parameters": per_token.parameters,
        "FLOPs a token": per_token.training_flops,
        "tokens": config.training.num_steps * config.data.batch_size * config.data.seq_len,
    }


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The config with other values, by dotted field.

    Raises:
      UserError: a field that does not exist, or a value that it refuses.
    """
    values = config_io.to_dict(config)
    for name, value in changes.items():
        *groups, last = name.split(".")
        inside = values
        for group in groups:
            inside = inside.get(group, {}) if isinstance(inside, dict) else {}
        if not isinstance(inside, dict) or last not in inside:
            near = difflib.get_close_matches(name, config_io.flatten(config), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown field {name}{hint}")
        is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
        inside[last] = config_io.to_dict(value) if is_config else value
    return config_io.from_dict(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `run` ended."""

    finished: int
    """Cells with a result, among those that this call had to run."""
    broken: dict[str, str]
    """What ended the others, by folder."""
    stopped: bool
    """Told to stop; the same call resumes."""


def run(
    sweep: Sweep,
    folder: pathlib.Path,
    console: Console,
    *,
    index: int = 0,
    count: int = 1,
    parallel: int = 1,
    vmap_seeds: bool = False,
    engine: str = cluster.LOCAL,
    gpus_per_cell: float = 0.0,
) -> Outcome:
    """Trains the cells that have no result yet.

    Args:
      sweep: what to run.
      folder: of the sweep; created if needed. An interrupted cell resumes from its last
        checkpoint.
      console: shows one line per cell.
      index: of this machine ...
      count: ... of so many that share the folder (or keep folders to be gathered later); each
        takes every `count`-th cell.
      parallel: cells that are trained at once, each in a process of its own. They share the
        accelerator's memory as they need it, and divide the processor's cores.
      vmap_seeds: the cells of an arm are one program in one process (see `training.seeds`), and
        `parallel` counts these. Cells whose last checkpoints are of different steps are apart.
      engine: "local", or "ray" or "ray://HOST:PORT" for the nodes of a Ray cluster, which take as
        many cells as they have room for and must share `folder`; `parallel` is then unused.
      gpus_per_cell: that Ray sets aside for a cell; a fraction lets cells share one.

    Raises:
      UserError: the cluster cannot be reached, budgets differ, a finished cell had another
        config, or another process runs the same part of the sweep in this folder.
    """
    sweep.check()
    if vmap_seeds:
        sweep_seeds.check({a.name: sweep.config(Cell(arm=a, seed=0)) for a in sweep.arms})
    folder.mkdir(parents=True, exist_ok=True)
    files.refuse_foreign(folder / RESULTS, '{"sweep": "')
    executor = None
    if engine != cluster.LOCAL:
        executor = cluster.RayExecutor(engine, gpus=gpus_per_cell)
    in_use = f"{folder} is in use: {{who}} runs this sweep there; wait for it, or use another --out"
    with (
        files.locked(folder / f".lock-{index}-of-{count}", in_use),
        sweep_cell.stop_signals() as stop,
    ):
        trainer: sweep_cell.Here | sweep_cell.Nodes
        if executor is None:
            trainer = sweep_cell.Here(parallel, console, stop)
        else:
            trainer = sweep_cell.Nodes(executor, gpus_per_cell, stop)
        mine = sweep.cells[index::count]
        return _run(sweep, folder, console, mine, stop, trainer, vmap_seeds=vmap_seeds)


def _run(
    sweep: Sweep,
    folder: pathlib.Path,
    console: Console,
    mine: Sequence[Cell],
    stop: sweep_cell.Stop,
    trainer: sweep_cell.Here | sweep_cell.Nodes,
    *,
    vmap_seeds: bool,
) -> Outcome:
    todo = [cell for cell in mine if not _is_finished(sweep, cell, folder, console)]
    console.print(
        f"{sweep.name}: {len(sweep.cells)} cells, {len(mine)} here, {len(todo)} to run, in {folder}"
    )
    together: list[tuple[Cell, ...]] = [(cell,) for cell in todo]
    if vmap_seeds:
        together = sweep_seeds.groups(todo, folder)
    broken: dict[str, str] = {}
    finished = 0
    with trainer, stop.on_error():
        groups = {
            trainer.start({folder / cell.folder: sweep.config(cell) for cell in group}): group
            for group in together
        }
        for future in concurrent.futures.as_completed(groups):
            group = groups[future]
            try:
                status, seconds = future.result()
            except concurrent.futures.CancelledError:
                continue
            if status is None:
                continue
            log = folder / group[0].folder / sweep_cell.LOG
            for cell in group:
                where = folder / cell.folder
                finished += 1
                label = f"[{finished}/{len(todo)}] {cell.arm.name}, seed {cell.seed}"
                try:
                    # Of several, those that were not given up are complete.
                    made = len(group) > 1 and _is_complete(sweep.config(cell), where)
                    if status and not made:
                        raise UserError(sweep_cell.complaint(log, status, cell.folder))
                    result = _result(sweep, cell, where)
                except UserError as error:
                    broken[cell.folder] = str(error)
                    console.print(f"{label}: failed: {error}", style="red")
                    continue
                files.write_json(where / RESULT, result, indent=None)
                loss = result["final"]["loss"]
                console.print(f"{label}: loss {loss:.4f}, {seconds:,.0f} s")
            gather(folder, console)
    gather(folder, console)
    interrupted = len(todo) - finished
    if interrupted:
        console.print(f"Stopped in {folder}; the same command resumes it.")
    whole = len(mine) - interrupted - len(broken)
    return Outcome(finished=whole, broken=broken, stopped=interrupted > 0)


def _is_complete(config: RunConfig, folder: pathlib.Path) -> bool:
    """Whether a run is evaluated at its end, which it is once its last checkpoint is saved."""
    try:
        last = series(folder / "metrics.jsonl", "eval")[-1:]
    except UserError:
        return False
    return [row["step"] for row in last] == [config.training.num_steps]


def gather(folder: pathlib.Path, console: Console) -> pathlib.Path:
    """Writes the results of all finished cells of a sweep's folder into one file.

    A damaged result is left out, and `console` says so.
    """
    results = []
    for path in sorted(folder.glob(f"*/{RESULT}")):
        try:
            results.append(_read_result(path))
        except UserError as error:
            _warn(console, f"{error}; it is left out of {folder / RESULTS}")
    results.sort(key=lambda r: (r["seed"], r["order"]))
    target = folder / RESULTS
    files.write_lines(target, results)
    return target


def _read_result(path: pathlib.Path) -> dict[str, Any]:
    result = files.read_json(path)
    if missing := {"seed", "order", "config"} - result.keys():
        raise UserError(f"{path} is damaged: it has no {min(missing)}")
    return result


def _is_finished(sweep: Sweep, cell: Cell, folder: pathlib.Path, console: Console) -> bool:
    path = folder / cell.folder / RESULT
    if not path.is_file():
        return False
    try:
        result = _read_result(path)
    except UserError as error:
        _warn(console, f"{error}; it is rebuilt from the cell's run folder")
        return False
    before = config_io.from_dict(result["config"])
    if changes := config_io.differences(before, sweep.config(cell)):
        raise UserError(
            f"{path} has another config ({'; '.join(changes)}); use another folder, or delete "
            f"{path.parent} to rerun it"
        )
    return True


def _warn(console: Console, text: str) -> None:
    console.print(text, style="yellow")


def _result(sweep: Sweep, cell: Cell, folder: pathlib.Path) -> dict[str, Any]:
    config = sweep.config(cell)
    train, evaluation = (series(folder / "metrics.jsonl", kind) for kind in ("train", "eval"))
    last = evaluation[-1] if evaluation else {"step": 0}
    if last["step"] != config.training.num_steps:
        raise UserError(
            f"{folder} has no finite loss at its final evaluation; delete it to rerun it"
        )
    return {
        "sweep": sweep.name,
        "arm": cell.arm.name,
        "baseline": cell.arm.baseline or sweep.baseline,
        "primary": [list(pair) for pair in sweep.primary],
        "best_of": {name: list(arms) for name, arms in sweep.best_of.items()},
        "chosen_on": list(sweep.chosen_on),
        "order": sweep.arms.index(cell.arm),
        "seed": cell.seed,
        "config": config_io.to_dict(config),
        "budget": budget(config),
        "widths": config.model.mlp_widths,
        "validation": [[row["step"], row["loss"]] for row in evaluation],
        "train": list(_thinned(train)),
        "final": {k: v for k, v in last.items() if k not in ("kind", "step")},
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in train),
        "versions": {"tlm_jax": tlm_jax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "machine": _devices(folder),
    }


def _devices(folder: pathlib.Path) -> str:
    """What a run was trained on; its config.json may be missing, which does not end a run."""
    try:
        return str(files.read_json(folder / "config.json").get("devices", "unknown"))
    except UserError:
        return "unknown"


def _thinned(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[float]]:
    """[step, mean loss] of about a hundred intervals of a run."""
    size = -(-len(rows) // _CURVE_POINTS)
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        yield [part[-1]["step"], round(statistics.fmean(row["loss"] for row in part), 5)]
