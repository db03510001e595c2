"""Trains or resumes a run: python train.py --config configs/tiny.py --workdir runs/tiny."""

import sys

from tlm_jax import search_path

if __name__ == "__main__":
    search_path.installed_first()
    from tlm_jax import cli

    sys.exit(cli.program("train", prog="train.py"))
