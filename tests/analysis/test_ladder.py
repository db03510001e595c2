"""The line of `tlm ladder` against one whose answer is known."""

import pathlib

import numpy as np
import pytest

from tlm_jax import cli, config_io
from tlm_jax.analysis import ladder
from tlm_jax.config import ModelConfig, RunConfig, TaperConfig, UserError
from tlm_jax.files import sealed

TAPERS = {
    "uniform": TaperConfig(schedule="uniform"),
    "cosine": TaperConfig(schedule="cosine"),
    "reversed": TaperConfig(schedule="cosine", start=0.5, end=1.5),
}


def records(noise: float = 0.0) -> list[dict]:
    """Two sizes by two lengths and three seeds; cosine gains 0.05 less 0.01 for each decade."""
    rng = np.random.default_rng(0)
    found = []
    for flops_per_token in (1e6, 1e7):
        for tokens in (10**6, 10**7):
            where = f"{flops_per_token:g} {tokens}"
            decades = np.log10(flops_per_token * tokens) - 12
            losses = {"uniform": 4.0, "cosine": 3.95 + 0.01 * decades, "reversed": 4.1}
            for name, taper in TAPERS.items():
                config = RunConfig(model=ModelConfig(taper=taper))
                for seed in range(3):
                    found.append(
                        {
                            "sweep": "made",
                            "arm": f"{name}, {where}",
                            "baseline": f"uniform, {where}",
                            "order": 0,
                            "seed": seed,
                            "config": config_io.to_dict(config),
                            "budget": {
                                "parameters": int(flops_per_token / 6),
                                "FLOPs a token": int(flops_per_token),
                                "tokens": tokens,
                            },
                            "final": {"loss": losses[name] + noise * rng.normal()},
                        }
                    )
    return found


def test_a_line_without_noise_is_found():
    points = ladder.points(records())
    assert len(points) == 2 * 4 * 3  # the baseline is no point
    line = ladder.fit([p for p in points if p.taper == "cosine 1.5 to 0.5"])
    assert (line.pairs, line.center, line.most) == (12, pytest.approx(1e13), 1e14)
    assert line.gain.mean == pytest.approx(-0.04)
    assert line.slope.mean == pytest.approx(0.01)
    assert line.slope.half_width == pytest.approx(0, abs=1e-9)
    assert line.at(1e16).mean == pytest.approx(-0.01)


def test_the_interval_holds_the_line_as_often_as_it_says():
    """95% of the time, at the center and three decades beyond; a plain normal interval does not."""
    rng = np.random.default_rng(1)
    inside = np.zeros(2)
    for _ in range(400):
        points = [
            ladder.Point(
                taper="cosine", parameters=1, tokens=1, flops=10.0**d, difference=0.01 * d + e
            )
            for d, e in zip((12, 12, 13, 13, 14), 0.02 * rng.normal(size=5), strict=True)
        ]
        line = ladder.fit(points)
        for i, decades in enumerate((np.log10(line.center), 17)):
            found = line.at(10.0**decades)
            inside[i] += abs(found.mean - 0.01 * decades) <= found.half_width
    assert (inside / 400 > 0.92).all()
    assert (inside / 400 < 0.98).all()


def test_the_table_says_each_scale_and_how_far_the_paper_is(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    path, page = tmp_path / "made.jsonl", tmp_path / "page.md"
    path.write_text("".join(json.dumps(sealed(r)) + "\n" for r in records(noise=0.001)))
    page.write_text("<!-- ladder -->\n<!-- end ladder -->\n")
    assert cli.main(["ladder", str(path), "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert page.read_text() == f"<!-- ladder -->\n{out}<!-- end ladder -->\n"
    lines = out.splitlines()
    assert lines[0].split(" | ")[-2:] == ["cosine 1.5 to 0.5", "cosine 0.5 to 1.5 |"]
    assert lines[2].startswith("| 166,666 | 1,000,000 | 1.0e+12 | 3/3 | -0.05")
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 4
    assert "792,000 times the most that was trained" in out


def test_sweeps_of_one_taper_make_one_line():
    """The other tapers of further sweeps are left out."""
    made = records(noise=0.001)
    small, large = ([r for r in made if f" {size}" in r["arm"]] for size in ("1e+06", "1e+07"))
    assert ladder.markdown([small, large]) == ladder.markdown([made])
    without = [r for r in small if not r["arm"].startswith("reversed")]
    text = ladder.markdown([without, large])
    assert "0.5 to 1.5" not in text
    assert text.count("\n| 1,666,666 | ") == 2
    assert "(12 pairs)" in text


def test_what_gives_no_line_is_refused():
    made = records()
    with pytest.raises(UserError, match="three pairs"):
        ladder.fit(ladder.points(made)[:2])
    alone = [r for r in made if r["arm"].startswith("cosine")]
    with pytest.raises(UserError, match="there are no pairs"):
        ladder.markdown([alone])
