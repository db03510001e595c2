"""`python -m tlm_jax VERB ...` is `tlm VERB ...`."""

import sys

from tlm_jax import search_path

if __name__ == "__main__":
    search_path.installed_first()
    from tlm_jax import cli

    sys.exit(cli.program())
