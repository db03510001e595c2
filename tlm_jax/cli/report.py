"""tlm report."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from tlm_jax.cli.parsing import parse
from tlm_jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Results of tlm eval --tasks side by side, or of a tlm sweep with intervals and pictures."""

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional] = ()
    """Run folders, or JSON files that tlm eval wrote; or one sweep: its folder or JSON lines."""
    markdown: bool = False
    """Print Markdown."""
    out: pathlib.Path | None = None
    """Of a sweep: folder for the table as Markdown, pictures, and an HTML page of both."""
    page: pathlib.Path | None = None
    """Of a sweep: a Markdown page, whose part between <!-- NAME --> and <!-- end NAME --> it
    rewrites."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm report`; returns the exit status."""
    command = parse(Command, argv, prog)
    if not command.runs:
        raise UserError(f"{prog} needs run folders: {prog} runs/a runs/b")
    if len(command.runs) == 1 and _is_sweep(command.runs[0]):
        return _sweep(command)
    from tlm_jax.evaluation import records

    found = [one for folder in command.runs for one in records.read(folder)]
    if command.markdown:
        print(records.markdown(found))
    else:
        Console().print(records.table(found))
    return 0


def _is_sweep(path: pathlib.Path) -> bool:
    return path.suffix == ".jsonl" or (path / "results.jsonl").is_file()


def _sweep(command: Command) -> int:
    from tlm_jax.analysis import sweep_plots, sweep_report

    results = sweep_report.read(command.runs[0])
    text = sweep_report.markdown(results)
    if command.markdown:
        print(text)
    else:
        console = Console()
        console.print(sweep_report.table(results))
        console.print(sweep_report.conditions(results), highlight=False)
    if command.page is not None:
        page = command.page.read_text(encoding="utf-8")
        new = sweep_report.replace(page, results[0]["sweep"], text)
        command.page.write_text(new, encoding="utf-8")
    if command.out is not None:
        pictures = sweep_plots.draw(results, command.out)
        (command.out / "report.md").write_text(text + "\n", encoding="utf-8")
        html = sweep_plots.page(results, pictures)
        (command.out / "index.html").write_text(html, encoding="utf-8")
    return 0
