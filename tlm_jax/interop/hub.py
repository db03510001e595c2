"""Models by their name on Hugging Face's hub, through its own client and cache."""

import os
import pathlib

from tlm_jax.config import UserError
from tlm_jax.interop.tensors import needs_extra

PREFIX = "hf:"
_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def fetch(model: str) -> tuple[pathlib.Path, str]:
    """The folder of a model in the cache, where what is missing is downloaded to.

    Without a network, what the cache holds is taken. HF_ENDPOINT, HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE mean what they mean to the client.

    Args:
      model: hf:ORG/NAME, or hf:ORG/NAME@REVISION.

    Returns:
      The folder, and ORG/NAME@COMMIT.

    Raises:
      UserError: there is no such model, it may not be read, or the hub cannot be reached.
    """
    with needs_extra():
        import huggingface_hub as hub
        from huggingface_hub import errors
    name, _, revision = model.removeprefix(PREFIX).partition("@")
    try:
        folder = hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_FILES],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except errors.HFValidationError:
        raise UserError(f"{model} is not the name of a model; it must be hf:ORG/NAME") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{model} is gated: accept its terms at {_place(name)}, then log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{model}: {_place(name)} does not exist, or needs a login (hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{model}: {_place(name)} has no revision {revision}") from None
    except Exception as error:  # of the connection, by several libraries
        raise UserError(
            f"{model} is not in the cache, and {_place(name)} cannot be reached "
            f"({type(error).__name__}); run `hf download {name}` where there is a network, and "
            "give the folder that it prints"
        ) from error
    return pathlib.Path(folder), f"{name}@{pathlib.Path(folder).name}"


def _place(name: str) -> str:
    from huggingface_hub import constants

    return f"{os.environ.get('HF_ENDPOINT', constants.ENDPOINT)}/{name}"
