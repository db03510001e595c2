"""What the report makes of a sweep's results: differences, merged records, pages, pictures."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from tlm_jax import cli, config_io, files
from tlm_jax.analysis import sweep, sweep_merge, sweep_plots, sweep_report
from tlm_jax.analysis.sweep import Arm, Cell, Sweep
from tlm_jax.config import OptimizerConfig, RunConfig, TaperConfig, UserError

UNIFORM = Arm(name="uniform", changes={"model.taper.schedule": "uniform"})


def record(arm: str, seed: int, losses: list[float], order: int, **changes) -> dict:
    config = dataclasses.replace(RunConfig(), **changes)
    return {
        "sweep": "made",
        "arm": arm,
        "baseline": "uniform",
        "order": order,
        "seed": seed,
        "config": config_io.to_dict(config),
        "budget": {"parameters": 10},
        "widths": config.model.mlp_widths,
        "validation": [[10 * i, loss] for i, loss in enumerate(losses)],
        "train": [],
        "final": {"loss": losses[-1]},
        "versions": {"jax": "1"},
    }


RECORDS = [
    record("uniform", 0, [9.0, 5.0, 4.0], 0),
    record("uniform", 1, [9.0, 5.2, 4.2], 0),
    record("late", 1, [9.0, 6.0, 5.0], 2),
    record("taper", 0, [9.0, 4.5, 3.5], 1),
    record("taper", 1, [9.0, 4.9, 4.1], 1),
    record("taper", 2, [9.0, 4.9, 4.0], 1),
]


def test_differences_are_of_pairs_with_the_interval_of_students_t():
    uniform, taper, late = sweep_report.findings(RECORDS)
    assert (uniform.difference, taper.seeds, taper.pairs) == (None, [0, 1, 2], 2)
    # Differences -0.5 and -0.1: mean -0.3, deviation 0.2828, over sqrt(2) 0.2, t(1) = 12.706.
    assert taper.difference.mean == pytest.approx(-0.3)
    assert taper.difference.half_width == pytest.approx(12.7062 * 0.2, rel=1e-4)
    assert taper.perplexity_ratio == pytest.approx(math.exp(-0.3))
    # 4.5 to 3.5 passes 4.0 half way between steps 10 and 20; 4.9 to 4.1 passes 4.2 at 18.75.
    assert taper.speed.mean == pytest.approx((15 + 18.75) / 2 / 20)
    assert late.difference == sweep_report.Estimate(mean=pytest.approx(0.8), half_width=None)
    assert late.speed is None
    assert sweep_report.rows([late])[0][-1] == "not reached"


def _write(path: pathlib.Path, records: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(files.sealed(r)) + "\n" for r in records))
    return path


def test_records_of_two_machines_in_one_file(tmp_path: pathlib.Path) -> None:
    """What both have is kept once; the merged file reports what one sweep of all would."""
    one, other = _write(tmp_path / "a.jsonl", RECORDS[:4]), _write(tmp_path / "b", RECORDS[3:])
    other.rename(tmp_path / "b.jsonl")
    target = tmp_path / "all.jsonl"
    words = ["report", str(one), str(tmp_path / "b.jsonl"), "--merge", str(target)]
    assert cli.main(words) == 0
    whole = sweep_report.read(_write(tmp_path / "whole.jsonl", RECORDS))
    merged = sweep_report.read(target)
    assert sweep_report.rows(sweep_report.findings(merged)) == sweep_report.rows(
        sweep_report.findings(whole)
    )
    before = target.read_bytes()
    assert cli.main(words) == 0
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sweep": "another"}, "is of sweep 'another', but .* is of 'made'; merge each sweep"),
        ({"final": {"loss": 3.0}}, "'taper' has two results with seed 0, in .*; run different"),
        ({"seed": 7, "budget": {"parameters": 11}}, "'taper' differs between .*: budget"),
        (
            {"seed": 7, "config": config_io.to_dict(RunConfig(seed=7)) | {"steps_per_call": 2}},
            "unknown field",
        ),
        (
            {
                "seed": 7,
                "config": config_io.to_dict(RunConfig(optimizer=OptimizerConfig(clip_norm=2.0))),
            },
            "'taper' differs between .*: optimizer.clip_norm",
        ),
    ],
)
def test_records_that_do_not_belong_together_are_refused(changes, says, tmp_path: pathlib.Path):
    target = _write(tmp_path / "all.jsonl", RECORDS)
    before = target.read_bytes()
    other = _write(tmp_path / "other.jsonl", [RECORDS[3] | changes])
    with pytest.raises(UserError, match=says):
        sweep_merge.merge(target, [other])
    assert target.read_bytes() == before


def test_primary_comparisons_share_a_level():
    """Two arms that are no baselines too; 97.5% intervals for two of them."""
    pairs = [["taper", "uniform"], ["late", "taper"]]
    text = sweep_report.primary([r | {"primary": pairs} for r in RECORDS])
    # -0.5 and -0.1 as above; t(1) at 1 - 0.05 / 2 / 2 is 25.4517.
    assert "- taper minus uniform: -0.3000 ± 5.0903 (2 pairs)\n" in text
    assert "- late minus taper: +0.9000 (1 pair)\n" in text
    assert "97.5% intervals" in text
    assert sweep_report.primary(RECORDS) == ""
    with pytest.raises(UserError, match="'cosine' in primary is not one of its arms"):
        Sweep(name="s", base=RunConfig(), arms=(UNIFORM,), primary=(("cosine", "uniform"),))


def test_the_best_of_several_arms_is_chosen_on_other_seeds():
    """Seed 9 says that "b" is the best rate of "fast"; seeds 0 and 1 compare it."""
    losses = {"a": (1.0, 1.0, 3.0), "b": (2.0, 2.5, 2.0), "plain": (4.0, 4.1, 9.0)}
    records = [
        {
            "arm": arm,
            "seed": seed,
            "final": {"loss": loss},
            "primary": [["fast at its best", "plain"]],
            "best_of": {"fast at its best": ["a", "b"]},
            "chosen_on": [9],
        }
        for arm, found in losses.items()
        for seed, loss in zip((0, 1, 9), found, strict=True)
    ]
    text = sweep_report.primary(records)
    # -2 and -1.6; t(1) at 97.5% is 12.7062.
    assert (
        "- fast at its best minus plain: -1.8000 ± 2.5412 (2 pairs; 'b' and 'plain', chosen on "
        "seed 9)\n"
    ) in text
    missing = [r for r in records if (r["arm"], r["seed"]) != ("a", 9)]
    assert sweep_report.primary(missing) == ""
    arms = (UNIFORM, Arm(name="x"))
    for best_of, says in (
        ({"best": ("y",)}, "'y' in best_of is not one of its arms"),
        ({"best": ("x",)}, "best_of needs chosen_on"),
    ):
        with pytest.raises(UserError, match=says):
            Sweep(
                name="s",
                base=RunConfig(),
                arms=arms,
                primary=(("best", "uniform"),),
                best_of=best_of,
            )


def test_a_page_keeps_what_is_outside_the_marks():
    page = "a\n<!-- made -->\nold\n<!-- end made -->\nb\n"
    assert sweep_report.replace(page, "made", "new") == page.replace("old", "new")
    with pytest.raises(UserError, match="no marks <!-- other -->"):
        sweep_report.replace(page, "other", "new")


def test_the_u_curve_needs_three_ratios(tmp_path: pathlib.Path) -> None:
    def tapered(start: float, order: int) -> dict:
        model = dataclasses.replace(
            RunConfig().model, taper=TaperConfig(start=start, end=2 - start)
        )
        return record(f"cosine {start}", 0, [9.0, 4.0 + abs(start - 1.25)], order, model=model)

    flat = dataclasses.replace(RunConfig().model, taper=TaperConfig(schedule="uniform"))
    records = [record("uniform", 0, [9.0, 4.2], 0, model=flat), tapered(1.25, 1), tapered(1.5, 2)]
    assert "ratios.png" not in {path.name for path in sweep_plots.draw(records, tmp_path / "a")}
    records.append(tapered(1.75, 3))
    assert "ratios.png" in {path.name for path in sweep_plots.draw(records, tmp_path / "b")}


def test_cells_are_shared_out_and_gathered(tmp_path: pathlib.Path) -> None:
    for order, (arm, seed) in enumerate([("b", 1), ("a", 0), ("b", 0)]):
        folder = tmp_path / Cell(arm=Arm(name=arm), seed=seed).folder
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(record(arm, seed, [1.0], order)))
    sweep.gather(tmp_path, Console())
    assert [(r["arm"], r["seed"]) for r in sweep_report.read(tmp_path)] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
    ]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_pictures_show_every_arm_and_whole_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Figure] = {}

    @contextlib.contextmanager
    def kept(path: pathlib.Path, figsize: tuple[float, float]) -> Iterator[Figure]:
        figures[path.stem] = Figure(figsize=figsize)
        yield figures[path.stem]

    monkeypatch.setattr(sweep_plots, "house_figure", kept)
    sweep_plots.draw(RECORDS, pathlib.Path("nowhere"))
    found = sweep_report.findings(RECORDS)
    arms = [f.arm for f in found]

    layers = RunConfig().model.num_layers
    bars = {axes.get_title(): len(axes.patches) for axes in figures["widths"].axes if axes.patches}
    assert bars == dict.fromkeys(arms, layers)
    curves = [figures["losses"].axes[0].get_lines()[i] for i in range(len(arms))]
    assert len({(c.get_color(), c.get_linestyle(), c.get_marker()) for c in curves}) == len(arms)
    taper = found[1]
    for name, estimate in (("differences", taper.difference), ("speed", taper.speed)):
        low, high = figures[name].axes[0].get_xlim()
        assert estimate.mean + estimate.half_width < high
        assert low < estimate.mean - estimate.half_width or name == "speed"  # no share is negative


def test_a_terminal_of_80_columns_shows_every_word() -> None:
    file = io.StringIO()
    Console(file=file, width=80).print(sweep_report.table(RECORDS, 80))
    text = file.getvalue()
    assert "…" not in text
    assert {word for name in sweep_report.HEADER for word in name.split()} <= set(text.split())


def test_the_page_is_for_any_screen_and_escapes_names() -> None:
    pairs = [["taper", "uniform"]]
    text = sweep_plots.page([r | {"primary": pairs, "sweep": "<b>"} for r in RECORDS], [])
    assert "<h1>&lt;b&gt;</h1>" in text
    assert "<li>taper minus uniform: -0.3000" in text
    assert '<meta name="viewport" content="width=device-width' in text
    assert text.count("<tr>") == 1 + 3
