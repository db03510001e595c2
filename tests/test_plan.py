"""The plan as text and pictures; a run's summary and pictures do without jax."""

import dataclasses
import io
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

import pytest
from helpers import Fails
from rich.console import Console

from tlm_jax import config_io
from tlm_jax.analysis import plan as plan_lib
from tlm_jax.analysis import plots
from tlm_jax.config import MAX_LAYERS, DataConfig, ModelConfig, RunConfig, TaperConfig

ROOT = pathlib.Path(__file__).parents[1]


def _printed(config: RunConfig, width: int = 100, **options: Any) -> str:
    stream = io.StringIO()
    plan_lib.plan(config, Console(file=stream, width=width), **options)
    return stream.getvalue()


def _run(name: str = "tlm_440m", **taper: Any) -> RunConfig:
    run = config_io.load_config(ROOT / "configs" / f"{name}.py")
    changed = dataclasses.replace(run.model.taper, **taper)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, taper=changed))


def _row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith(label))
    return line.strip("│ ").split()


def test_plan_shows_every_layer_and_exact_totals() -> None:
    text = _printed(_run())
    assert _row(text, "0 ")[:3] == ["0", "6,144", "1.500"]
    assert _row(text, "23 ")[:3] == ["23", "2,048", "0.500"]
    # Layer 0: 4 * 1024^2 + 3 * 1024 * 6144 + 2 * 1024.
    assert "23,070,720" in _row(text, "0 ")
    assert _row(text, "parameters")[1:] == ["435,471,360", "435,471,360", "equal"]
    assert _row(text, "forward FLOPs/token")[-1] == "equal"
    assert _row(text, "tokens per step")[3] == "524,288"
    assert _row(text, "optimizer")[1:3] == ["3.24", "GiB"]
    total = [line for line in text.splitlines() if line.strip().startswith("all layers")]
    assert "98,304" in total[0]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "…" not in text  # nothing was cut off at 100 columns


def test_a_tapered_memory_has_its_column() -> None:
    """The memory's width tapers with the MLP's; both sums and the budget stay exact."""
    run = config_io.load_config(ROOT / "configs" / "tlm_440m.py:titans")
    mixer = dataclasses.replace(run.model.mixer, memory_taper=TaperConfig())
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, mixer=mixer))
    text = _printed(run)
    assert "Titans MAG, 16 heads of 64, memory 2 layers x 304" in text
    assert "memory" in _row(text, "layers")
    column = _row(text, "layers").index("memory") + 1  # the bars have no heading
    assert _row(text, "0 ")[column] == "464"
    assert _row(text, "23 ")[column] == "144"
    assert str(24 * 304) in _row(text, "all layers")
    assert _row(text, "parameters")[-1] == "equal"
    assert _row(text, "forward FLOPs/token")[-1] == "equal"
    assert _row(text, "decoder state")[2:4] == ["172", "MiB"]


def test_memory_of_each_device() -> None:
    """The parts that are estimates say so, and how far off they were."""
    text = _printed(_run(), devices=16, limit=2**34)
    assert "each of 16 devices" in text
    words = " ".join(" ".join(line.strip("│ ") for line in text.splitlines()).split())
    assert "off by up to" in words
    assert "compiled for tpu" in words
    for part in ("weights", "kept by layers", "working set", "program"):
        assert "(estimate)" in words[words.index(part) :][:120], part
    assert "fits, by this estimate" in words
    assert "does not fit" in " ".join(_printed(_run(), devices=16, limit=2**30).split())


def test_segments_are_rows() -> None:
    text = _printed(_run(num_segments=4))
    assert "4 segments in 24 layers" in text
    rows = [line.split() for line in text.splitlines() if "█" in line]
    assert len(rows) == 4
    assert rows[0][0].startswith("0-")
    assert rows[-1][0].endswith("-23")


def test_long_plans_leave_out_the_middle() -> None:
    model = ModelConfig(num_layers=96, d_model=4096, mlp_width=16384)
    text = _printed(RunConfig(model=model), max_rows=20)
    assert sum("█" in line for line in text.splitlines()) == 19
    assert f"{len(set(model.mlp_widths)) - 19} more" in text
    assert "…" not in text


def test_a_mismatch_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run("tiny")
    narrower = dataclasses.replace(
        run.model, mlp_width=run.model.mlp_width - 16, taper=TaperConfig(schedule="uniform")
    )
    monkeypatch.setattr(ModelConfig, "uniform_twin", lambda self: narrower)
    difference = 3 * run.model.num_layers * run.model.d_model * 16
    assert f"+{difference:,}" in _printed(run)
    assert any("NOT comparable" in line for line in plan_lib.summary_lines(run))


def test_summary_is_short_and_complete() -> None:
    lines = plan_lib.summary_lines(_run())
    text = "\n".join(lines)
    assert len(lines) <= 6
    assert max(map(len, lines)) <= 100
    for part in (
        "435,471,360",
        "6,144 -> 2,048",
        "24 segments",
        "524,288 per step",
        "30.0B tokens",
    ):
        assert part in text
    assert "equal to its uniform twin" in text
    assert "uniform" in plan_lib.summary_lines(_run(schedule="uniform"))[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data.batch_size 2147483648", "batch_size is 2147483648; it must be at most 2147483647"),
        ("--data.batch_size 2147483647 --training.grad_accumulation 2", "a batch of 2147483648"),
        ("--data.seq_len 2147483646 --training.loss_chunk 4", "use one of [1, 2, 3, 6, 7, 9,"),
        ("--model.num_layers 1000000000", "num_layers is 1000000000; it must be at most 10000"),
        ("--model.vocab_size 1000000000000", "it must be at most 2147483647"),
        ("--model.d_model 1000000000000", "it must be at most 2147483647"),
        ("--model.mixer.num_heads 1000000000", "does not divide into num_heads=1000000000"),
        ("--model.mixer.num_heads 2147483647 --model.mixer.num_kv_heads 3", "[1, 2147483647]"),
        ("--model.mlp_width 10000000000000", "it must be at most 2147483647"),
        ("--model.num_layers 10000 --model.taper.start 1.9 --model.taper.end 1", "use end=0.1"),
        ("--model.num_layers 9984 --model.taper.num_segments 3", "use num_segments=None"),
        ("--training.num_steps 1e12", "--training.num_steps: '1e12' is not a whole number"),
    ],
)
def test_huge_numbers_are_refused_at_once(words: str, message: str, fails: Fails) -> None:
    """A line that stays short, within seconds, and without memory to match."""
    began = time.process_time()
    found = fails("plan", "--config", str(ROOT / "configs/tiny.py"), *words.split())
    assert message in found
    assert len(found) < 500
    assert time.process_time() - began < 8


def test_the_largest_model_has_a_plan_within_seconds() -> None:
    layers = TaperConfig(multiple_of=1)
    model = ModelConfig(num_layers=MAX_LAYERS, d_model=2**30, mlp_width=2**20, taper=layers)
    began = time.process_time()
    text = _printed(RunConfig(model=model, data=DataConfig(batch_size=2**31 - 1)))
    assert time.process_time() - began < 8
    assert "10,000 layers" in text


@pytest.mark.parametrize(
    ("value", "text"), [(30_000_000_000, "30.0B"), (435_471_360, "435M"), (12, "12"), (1e5, "100K")]
)
def test_short_counts(value: float, text: str) -> None:
    assert plan_lib.short_count(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1536, "1.50 KiB"), (2**30, "1.00 GiB"), (1000 * 2**20, "0.98 GiB")],
)
def test_byte_sizes(count: int, text: str) -> None:
    assert plan_lib.byte_size(count) == text


def test_summary_and_picture_are_quick_and_need_no_jax(tmp_path: pathlib.Path) -> None:
    program = (
        "import sys\n"
        "from rich.console import Console\n"
        "from tlm_jax import config_io\n"
        "from tlm_jax.analysis import plan, plots\n"
        "run = config_io.load_config(sys.argv[1])\n"
        "plan.summary_lines(run)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.plot_plan(run.model, sys.argv[2])\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
    )
    picture = tmp_path / "plan.png"
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "configs/tlm_1_3b.py"), str(picture)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 5  # CPU time
    assert _is_png(picture)


def test_the_command_asks_for_no_accelerator(tmp_path: pathlib.Path) -> None:
    """Layers are traced on the CPU, whatever else a machine has; within seconds of its time."""
    words = ["plan", "--config", ROOT / "configs/tlm_1_3b.py", "--topology", "v5e:4x4"]
    before = os.times()
    result = subprocess.run(
        [sys.executable, "-m", "tlm_jax", *map(str, words), "--png", str(tmp_path / "plan.png")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "tpu"},  # which is not here
    )
    after = os.times()
    assert "fits, by this estimate" in " ".join(result.stdout.replace("│", " ").split())
    assert after.children_user - before.children_user < 20


def _is_png(path: pathlib.Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    "taper", [{}, {"num_segments": 3}, {"schedule": "uniform"}, {"schedule": "groups"}]
)
def test_every_taper_has_a_picture(tmp_path: pathlib.Path, taper: dict[str, Any]) -> None:
    plots.plot_plan(_run("tiny", **taper).model, tmp_path / "new" / "plan.png")
    assert _is_png(tmp_path / "new" / "plan.png")


def test_readme_picture(tmp_path: pathlib.Path) -> None:
    plots.plot_taper(tmp_path / "taper.png")
    assert _is_png(tmp_path / "taper.png")


def _write(path: pathlib.Path, rows: list[dict[str, Any]], tail: str = "") -> pathlib.Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n" + tail)
    return path


def test_curves_take_the_last_line_of_a_step(tmp_path: pathlib.Path) -> None:
    def row(step: int, loss: float) -> dict[str, Any]:
        return {"step": step, "kind": "train", "loss": loss, "tokens": step * 8}

    rows = [row(10, 5.0), row(20, 9.0), row(20, 4.0), row(30, float("nan"))]
    rows += [{"step": 20, "kind": "eval", "loss": 4.5}]
    metrics = _write(tmp_path / "metrics.jsonl", rows, tail='{"step": 40, "ki')
    read = plots.series(metrics, "train")
    assert [(r["step"], r["loss"]) for r in read] == [(10, 5.0), (20, 4.0)]
    plots.plot_curves(metrics, tmp_path / "curves.png")
    assert _is_png(tmp_path / "curves.png")


@pytest.mark.parametrize(("kind", "steps"), [("train", 1), ("train", 200), ("eval", 2)])
def test_curves_of_short_and_one_sided_runs(tmp_path: pathlib.Path, kind: str, steps: int) -> None:
    rows = [
        {"step": s, "kind": kind, "loss": 8.0 - s / 100, "tokens": 64 * s, "learning_rate": 1e-3}
        for s in range(steps)
    ]
    plots.plot_curves(_write(tmp_path / "m.jsonl", rows), tmp_path / "curves.png")
    assert _is_png(tmp_path / "curves.png")


def test_nothing_to_draw_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no losses to draw"):
        plots.plot_curves(_write(tmp_path / "m.jsonl", []), tmp_path / "curves.png")


def test_smoothing_keeps_straight_lines() -> None:
    line = [float(i) for i in range(200)]
    assert plots._smooth(line) == pytest.approx(line)
