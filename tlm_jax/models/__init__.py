"""Decoder-only language models whose layers may differ in width and kind."""

from tlm_jax.models import gated_attention as _gated_attention  # noqa: F401 (registers itself)
from tlm_jax.models import titans as _titans  # noqa: F401
from tlm_jax.models.decoder import LanguageModel
from tlm_jax.models.skeleton import Skeleton, skeleton

__all__ = ["LanguageModel", "Skeleton", "skeleton"]
