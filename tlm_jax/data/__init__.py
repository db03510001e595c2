"""Text in, batches of token ids out; never imports jax.

`open_dataset(config, vocab_size)` is the way in. Grain, ArrayRecord and the
libraries of other formats, which are slow to import, are only imported when used.
"""

from tlm_jax.data.pipeline import Dataset, ValidationBatches, open_dataset
from tlm_jax.data.store import SplitStatistics
from tlm_jax.data.tokenizers import SpecialTokens, Tokenizer, load_tokenizer

__all__ = [
    "Dataset",
    "SpecialTokens",
    "SplitStatistics",
    "Tokenizer",
    "ValidationBatches",
    "load_tokenizer",
    "open_dataset",
]
