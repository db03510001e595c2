"""One of two processes that load a checkpoint of which each holds half: address, which, folder.

Prints what comes of it when all is well, when process 1 has no descriptors left, and when a file
is damaged that only process 1 reads.
"""

import os
import pathlib
import resource
import sys

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

if __name__ == "__main__":
    address, index, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    from tlm_jax.training import checkpoint
    from tlm_jax.validation import UserError, lacks_resources

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = jax.sharding.NamedSharding(mesh, jax.P("x"))
    make = jax.jit(lambda: {"embedding": jnp.arange(2048.0)}, out_shardings=halves)
    shapes = {"embedding": jax.ShapeDtypeStruct((2048,), jnp.float32, sharding=halves)}

    def attempt(checkpoints: checkpoint.Checkpoints) -> None:
        try:
            checkpoints.restore_params(2, shapes)
            print("whole", flush=True)
        except UserError as error:
            again = ", to run again" if lacks_resources(error) else ""
            reason = str(error).split(": ", 1)[1]
            print(f"{type(error).__name__}{again}: {reason}", flush=True)

    with jax.set_mesh(mesh), checkpoint.Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save_params(step, make(), {})
        attempt(checkpoints)
        if index == 1:
            most = len(os.listdir("/proc/self/fd")) - 1
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
        attempt(checkpoints)
        if index == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            (data,) = (folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir()
            os.truncate(data, 100)
        multihost_utils.sync_global_devices("damaged")
        attempt(checkpoints)
