"""tlm report."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from tlm_jax import files
from tlm_jax.cli.parsing import parse
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Results of tlm eval --tasks or tlm align side by side, or of a tlm sweep with intervals."""

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    """Run folders, or JSON files that tlm eval or tlm align wrote; or one sweep: its folder or
    JSON lines."""
    markdown: bool = False
    """Print Markdown."""
    out: pathlib.Path | None = None
    """Of a sweep: folder for the table as Markdown, pictures, and an HTML page of both."""
    page: pathlib.Path | None = None
    """A Markdown page, whose part between <!-- NAME --> and <!-- end NAME --> it rewrites."""
    part: str | None = None
    """NAME of that part; None is the sweep's."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm report`; returns the exit status."""
    command = parse(Command, argv, prog)
    if not command.runs:
        raise UserError(f"{prog} needs run folders: {prog} runs/a runs/b")
    if len(command.runs) == 1 and _is_sweep(command.runs[0]):
        return _sweep(command)
    if command.out is not None:
        raise UserError("--out is for a sweep; results of tlm eval go to --page or --markdown")
    if command.page is not None and command.part is None:
        raise UserError(f"--page {command.page} needs --part NAME, the name of its marks")
    if all(_is_alignment(path) for path in command.runs):
        from tlm_jax.analysis import alignment

        found = [json.loads(path.read_text(encoding="utf-8")) for path in command.runs]
        _show(command, None, alignment.side_by_side(found))
        return 0
    from tlm_jax.evaluation import records

    suites = [one for folder in command.runs for one in records.read(folder)]
    _show(command, records.table(suites), records.markdown(suites))
    return 0


def _is_sweep(path: pathlib.Path) -> bool:
    return path.suffix == ".jsonl" or (path / "results.jsonl").is_file()


def _is_alignment(path: pathlib.Path) -> bool:
    try:
        return "rho" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _show(command: Command, table: Table | None, text: str, sweep: str = "") -> None:
    """On the terminal, and in the page that was asked for."""
    if command.markdown or table is None:
        print(text)
    else:
        Console().print(table)
    if command.page is not None:
        from tlm_jax.analysis import sweep_report

        new = sweep_report.replace(
            command.page.read_text(encoding="utf-8"), command.part or sweep, text
        )
        files.write_text(command.page.resolve(), new)


def _sweep(command: Command) -> int:
    from tlm_jax.analysis import sweep_plots, sweep_report

    results = sweep_report.read(command.runs[0])
    text = sweep_report.markdown(results)
    _show(command, sweep_report.table(results), text, sweep=results[0]["sweep"])
    if not command.markdown:
        Console().print(sweep_report.conditions(results), highlight=False)
    if command.out is not None:
        pictures = sweep_plots.draw(results, command.out)
        files.write_text(command.out / "report.md", text + "\n")
        files.write_text(command.out / "index.html", sweep_plots.page(results, pictures))
    return 0
