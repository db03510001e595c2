"""Evaluates the newest checkpoint of a run: python eval.py --checkpoint runs/tiny."""

import sys

from tlm_jax import cli

if __name__ == "__main__":
    sys.exit(cli.program("eval", prog="eval.py"))
