"""One of several processes that score the same requests: address, how many, which, output file."""

import json
import sys

import jax

if __name__ == "__main__":
    address, number, index, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    jax.config.update("jax_num_cpu_devices", 1)
    if number > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, number, index)
    from test_scoring import MODELS, model_config, questions

    from tlm_jax.config import MeshConfig
    from tlm_jax.distributed import mesh as mesh_lib
    from tlm_jax.distributed import sharding
    from tlm_jax.evaluation.scoring import Scorer
    from tlm_jax.models import skeleton

    model = skeleton(model_config(**MODELS["attention"]))
    mesh = mesh_lib.device_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        where = sharding.param_shardings(model.shapes, model.logical_axes, mesh)
        params = jax.jit(model.init, out_shardings=where)(jax.random.key(1))
        answers = dict(Scorer(model, params, mesh, max_length=512).score(questions()))
    with open(out, "w") as file:
        json.dump([answers[i].log_likelihood for i in range(len(answers))], file)
