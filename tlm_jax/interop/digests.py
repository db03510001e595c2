"""SHA-256 of a model's files, compared with what Hugging Face's tools noted when they fetched them.

Neither safetensors nor GGUF has a checksum of its own.
"""

import pathlib
import re
from collections.abc import Iterable

from tlm_jax import files
from tlm_jax.config import UserError

_SHA256 = re.compile("[0-9a-f]{64}")


def check(paths: Iterable[pathlib.Path]) -> dict[str, str]:
    """The SHA-256 of each file by its name.

    Raises:
      UserError: a file is not the one that was downloaded.
    """
    return {path.name: _checked(path) for path in paths}


def _checked(path: pathlib.Path) -> str:
    digest = files.sha256(path)
    published = _published(path)
    if published not in (None, digest):
        raise UserError(
            f"{path} is damaged or was changed: its SHA-256 is {digest}, and {published} was "
            "downloaded; fetch it again"
        )
    return digest


def _published(path: pathlib.Path) -> str | None:
    """What the cache names a file after, or what lies beside one fetched with --local-dir.

    Small files have a hash of another kind there.
    """
    target = path.resolve()
    name = target.name if target.parent.name == "blobs" else ""
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if note.is_file():
        _, name, *_ = [*note.read_text(encoding="utf-8", errors="replace").splitlines(), "", ""]
    return name if _SHA256.fullmatch(name) else None
