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
    """For a sweep: also say how many seeds it takes to tell smaller differences from zero."""
    merge: pathlib.Path | None = None
    """For one sweep on several machines: JSON lines to which the records of all RUNS are added."""
    out: pathlib.Path | None = None
    """For a sweep: folder for the table as Markdown, pictures, and an HTML page of both."""
    page: pathlib.Path | None = None
    """A Markdown page; the part between <!-- NAME --> and <!-- end NAME --> is rewritten."""
    part: str | None = None
    """NAME of that part; None is the sweep's."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm report`; returns the exit status."""
    command = parse(Command, argv, prog)
    if not command.runs:
        raise UserError(f"{prog} needs run folders: {prog} runs/a runs/b")
    if command.merge is not None:
        from tlm_jax.analysis import sweep_merge

        records, new = sweep_merge.merge(command.merge, command.runs)
        output.console().print(f"{command.merge}: {records} records, {new} new")
        return 0
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
        show(alignment.side_by_side(found), page=command.page, part=command.part)
        return 0
    from tlm_jax.evaluation import comparison, result_files

    results = [one for folder in command.runs for one in result_files.read(folder)]
    table = None if command.markdown else comparison.table(results)
    show(comparison.markdown(results), table, page=command.page, part=command.part)
    if not command.markdown and (apart := comparison.note(results)):
        output.console().print(apart)
    return 0


def _is_sweep(path: pathlib.Path) -> bool:
    return path.suffix == ".jsonl" or (path / "results.jsonl").is_file()


def _is_alignment(path: pathlib.Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "rho" in found


def show(
    text: str, table: Table | None = None, *, page: pathlib.Path | None, part: str | None
) -> None:
    """Prints the table, or else the text, which also goes into a part of a page."""
    if table is None:
        print(text)
    else:
        output.console().print(table)
    if page is not None:
        from tlm_jax.analysis import sweep_report

        new = sweep_report.replace(page.read_text(encoding="utf-8"), part or "", text)
        files.write_text(page.resolve(), new)


def _sweep(command: Command) -> int:
    from tlm_jax.analysis import sweep_plots, sweep_report

    results = sweep_report.read(command.runs[0])
    text = sweep_report.markdown(results)
    table = None if command.markdown else sweep_report.table(results, output.console().width)
    show(text, table, page=command.page, part=command.part or results[0]["sweep"])
    if not command.markdown:
        more = sweep_report.primary(results) + sweep_report.conditions(results)
        output.console().print(more, soft_wrap=False)
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
