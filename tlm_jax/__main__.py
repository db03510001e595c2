"""`python -m tlm_jax VERB ...` is `tlm VERB ...`."""

import sys

from tlm_jax import cli

if __name__ == "__main__":
    sys.exit(cli.program())
