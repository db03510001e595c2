"""Tapered language models (arXiv 2606.23670) in JAX and Flax."""

__version__ = "0.1.0"
