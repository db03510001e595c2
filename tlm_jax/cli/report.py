"""tlm report."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.table import Table

from tlm_jax import files, output
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
    power: bool = False
    """Of a sweep: also say how many seeds would tell smaller differences from zero."""
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
    if command.out is not None or command.power:
        flag = "--power" if command.out is None else "--out"
        raise UserError(f"{flag} is for a sweep; results of tlm eval go to --page or --markdown")
    if command.page is not None and command.part is None:
        raise UserError(f"--page {command.page} needs --part NAME, the name of its marks")
    if all(_is_alignment(path) for path in command.runs):
        from tlm_jax.analysis import alignment

        found = [files.read_json(path) for path in command.runs]
        _show(command, None, alignment.side_by_side(found))
        return 0
    from tlm_jax.evaluation import comparison, result_files

    results = [one for folder in command.runs for one in result_files.read(folder)]
    _show(command, comparison.table(results), comparison.markdown(results))
    if not command.markdown and (apart := comparison.note(results)):
        output.console().print(apart, soft_wrap=True)
    return 0


def _is_sweep(path: pathlib.Path) -> bool:
    return path.suffix == ".jsonl" or (path / "results.jsonl").is_file()


def _is_alignment(path: pathlib.Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "rho" in found


def _show(command: Command, table: Table | None, text: str, sweep: str = "") -> None:
    """On the terminal, and in the page that was asked for."""
    if command.markdown or table is None:
        print(text)
    else:
        output.console().print(table)
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
        output.console().print(sweep_report.conditions(results), highlight=False)
    if command.power:
        from tlm_jax.analysis import power

        needed = power.table(results)
        if needed is None:
            raise UserError("--power needs two seeds of an arm and of its baseline")
        output.console().print(needed)
    if command.out is not None:
        page, summary = command.out / "index.html", command.out / "report.md"
        for target in (page, summary):
            files.refuse_foreign(target)
        pictures = sweep_plots.draw(results, command.out)
        files.write_text(summary, f"<!-- {files.MARK} -->\n{text}\n")
        files.write_text(page, sweep_plots.page(results, pictures))
    return 0
