"""The process of a group of cells, which `tlm sweep --vmap_seeds` starts; not a verb for users."""

import sys
from collections.abc import Sequence

from tlm_jax import config_io, output, storage
from tlm_jax.cli.parsing import quiet_libraries
from tlm_jax.distributed import start


def run(argv: Sequence[str], prog: str) -> int:
    """Trains the runs of the folders `argv`, each with its config in cell.json, in one program.

    Returns the exit status: 1 if one was given up.
    """
    del prog
    folders = [storage.path(word) for word in argv]
    configs = [config_io.load_config(folder / "cell.json") for folder in folders]
    quiet_libraries()
    start.keep_programs()
    from tlm_jax.training import seeds

    failed = seeds.train(configs, folders, output.console())
    for folder, reason in failed.items():
        print(f"error: {folder.name}: {reason}", file=sys.stderr)
    return 1 if failed else 0
