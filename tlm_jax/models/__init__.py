"""Decoder-only language models whose layers may differ in width."""

from tlm_jax.models.language_model import LanguageModel, Skeleton, skeleton

__all__ = ["LanguageModel", "Skeleton", "skeleton"]
