"""tlm import."""

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from tlm_jax import output
from tlm_jax.cli.parsing import parse, quiet_libraries
from tlm_jax.config import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Make a run folder of a Llama-like model from Hugging Face or a GGUF file."""

    model: str
    """Folder with config.json and safetensors, a GGUF file (it is dequantised), or a name on the
    hub, hf:ORG/NAME or hf:ORG/NAME@REVISION."""
    out: pathlib.Path
    """Run folder to make; evaluate it, continue a prompt with it, export it."""
    tokenizer: pathlib.Path | None = None
    """tokenizer.json or .model in place of the model's own."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1, fsdp=-1))
    """Devices that hold the parameters while they are written, each its share."""


def run(argv: Sequence[str], prog: str) -> int:
    """Runs `tlm import`; returns the exit status."""
    command = parse(Command, argv, prog, model=tyro.MISSING, out=tyro.MISSING)
    quiet_libraries()
    from tlm_jax.distributed import mesh as mesh_lib
    from tlm_jax.interop import importing

    metadata = importing.import_model(
        command.model, command.out, command.tokenizer, mesh_lib.device_mesh(command.mesh)
    )
    model, length = metadata["config"]["model"], metadata["config"]["data"]["seq_len"]
    output.console().print(
        f"{command.out} holds {metadata['source']['file']}: {metadata['num_params']:,} "
        f"parameters, {model['num_layers']} layers, d_model {model['d_model']}, vocabulary "
        f"{model['vocab_size']:,}, texts of up to {length:,} tokens\n"
        f"  evaluate: tlm eval --checkpoint {command.out}\n"
        f"  write:    tlm generate --checkpoint {command.out} --prompt TEXT",
    )
    for name, digest in metadata["source"]["sha256"].items():
        print(f"  SHA-256:  {digest} of {name}")
    return 0
