"""What a new user does first, from the wheel alone and from a clone, and how long each step takes.

    python -m benchmarks.first_steps [--only wheel clone]

Each path begins in an empty folder with an environment of its own and uses no file of this
checkout: the wheel is built from it, the clone is made of its last commit. The commands are those
of docs/quickstart.md and the tutorials. Writes a table to docs/notes/first-steps.md.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[1]
PATHS = ("wheel", "clone")
TRAIN = "tlm train --config tiny --workdir runs/tiny"
STEPS = {
    "first training": TRAIN,
    "first text": "tlm generate --checkpoint runs/tiny --prompt 'It is a truth' --num_tokens 60",
    "first evaluation": "tlm eval --checkpoint runs/tiny",
    "own text": "tlm train --config tiny --workdir runs/mine --data.path my_texts/ "
    "--model.taper.start 1.25 --model.taper.end 0.75 --training.num_steps 60",
    "custom mixer": "python -m pytest -q test_short_conv.py && "
    "tlm train --config short_conv_config.py --workdir runs/short_conv --model.num_layers 2 "
    "--model.d_model 64 --model.mlp_width 128 --training.num_steps 10 && "
    "tlm eval --checkpoint runs/short_conv --trust_module short_conv.py",
    "first sweep": "tlm sweep ratio.py --parallel 2 && tlm report runs/sweeps/ratio --out report",
}
TEST = """
import tlm_jax.testing
from short_conv import ShortConvConfig


def test_short_conv():
    tlm_jax.testing.check_mixer(ShortConvConfig())
"""
SWEEP = """
import dataclasses

from tlm_jax import config_io
from tlm_jax.analysis.sweep import Arm, Sweep


def get_sweep():
    base = config_io.load_config("tiny")
    return Sweep(
        name="ratio",
        base=dataclasses.replace(base, training=dataclasses.replace(base.training, num_steps=30)),
        arms=(
            Arm(name="uniform", changes={"model.taper.schedule": "uniform"}),
            Arm(name="gentle", changes={"model.taper.start": 1.25, "model.taper.end": 0.75}),
        ),
        seeds=(0, 1),
    )
"""


def own_files(folder: pathlib.Path) -> None:
    """What a user writes: a mixer and its config as in docs/extending.md, a sweep, some texts."""
    page = (ROOT / "docs" / "extending.md").read_text()
    for name in ("short_conv.py", "short_conv_config.py"):
        found = re.search(rf"^    # {name}\n((?:    .*\n|\n)+)", page, re.MULTILINE)
        if found is None:
            raise ValueError(f"docs/extending.md has no {name}")
        (folder / name).write_text(textwrap.dedent(found[1]))
    (folder / "test_short_conv.py").write_text(TEST)
    (folder / "ratio.py").write_text(SWEEP)
    texts = folder / "my_texts"
    texts.mkdir()
    for path in pathlib.Path(os.__file__).parent.glob("*.py"):  # text that any machine has
        shutil.copy(path, texts / f"{path.stem}.txt")


def run(command: str, folder: pathlib.Path, log: pathlib.Path, path: str) -> float:
    """Seconds of a command line in a folder.

    Raises:
      SystemExit: it failed; the last lines of its output are shown.
    """
    begin = time.perf_counter()
    with log.open("a") as file:
        print(f"$ {command}", file=file, flush=True)
        outcome = subprocess.run(
            command, shell=True, cwd=folder, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "PYTHONPATH": "", "VIRTUAL_ENV": ""},
        )  # fmt: skip
    if outcome.returncode:
        sys.exit(f"failed: {command}\n" + "\n".join(log.read_text().splitlines()[-20:]))
    return time.perf_counter() - begin


def walk(kind: str, scratch: pathlib.Path) -> dict[str, float]:
    """Minutes of each step of a path."""
    folder, log = scratch / kind, scratch / f"{kind}.log"
    path, steps = os.environ["PATH"], dict(STEPS)
    python = sys.executable
    if kind == "wheel":
        folder.mkdir()
        built = scratch / "dist"
        run(f"{python} -m build --wheel --outdir {built} {ROOT}", scratch, log, path)
        environment = folder / "env"
        install = f"{python} -m venv env && env/bin/pip install -q {built}/*.whl pytest"
        begun = {"install": run(install, folder, log, path)}
    else:
        run(f"git clone -q {ROOT} {folder}", scratch, log, path)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        environment = folder / ".venv" / version
        begun = {"install": run(f"make setup PYTHON={python}", folder, log, path)}
        steps["first training"] = f"make train PYTHON={python}"
    own_files(folder)
    path = f"{environment / 'bin'}{os.pathsep}{path}"
    for name, command in steps.items():
        begun[name] = run(command, folder, log, path)
        print(f"{kind}: {name} {begun[name] / 60:.1f} minutes", flush=True)
    return {name: seconds / 60 for name, seconds in begun.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PATHS, default=PATHS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: walk(kind, pathlib.Path(folder)) for kind in options.only}
    rows = [
        [name, *(f"{minutes[name]:.1f}" for minutes in found.values())]
        for name in ("install", *STEPS)
    ]
    rows.append(["all", *(f"{sum(minutes.values()):.1f}" for minutes in found.values())])
    report.publish(
        "first-steps",
        report.table(["step", *(f"{kind}, minutes" for kind in found)], rows)
        + f"\n\n{report.machine()}.",
        page=ROOT / "docs" / "notes" / "first-steps.md",
    )


if __name__ == "__main__":
    main()
