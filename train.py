"""Trains or resumes a run: python train.py --config configs/tiny.py --workdir runs/tiny."""

import sys

from tlm_jax import cli

if __name__ == "__main__":
    sys.exit(cli.program("train", prog="train.py"))
