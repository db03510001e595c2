"""Evaluates the newest checkpoint of a run: python eval.py --checkpoint runs/tiny."""

import sys

from tlm_jax import search_path

if __name__ == "__main__":
    search_path.installed_first()
    from tlm_jax import cli

    sys.exit(cli.program("eval", prog="eval.py"))
