"""The config of a language model whose layers differ, for transformers' `trust_remote_code`.

Written by tlm-jax (Apache-2.0); needs transformers alone.
"""

from typing import Any

from transformers import PretrainedConfig


class TaperedConfig(PretrainedConfig):
    """Sizes of the stream, and `layers`: a dict for each layer, first to last.

    A layer's `mixer` is `attention` or `titans`. Its other entries are the arguments of the class
    of that name (`tapered_layers.py`, `tapered_titans.py`). `mlp_widths` are the widths of the
    layer's chain of MLPs. `online` has the chunks and the rate of updates inside a text, if there
    are any (`tapered_online.py`).
    """

    model_type = "tapered"

    def __init__(
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        layers: Any = (),
        online: Any = None,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.layers = list(layers)
        self.online = online
        self.num_hidden_layers = len(self.layers)
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        kwargs.pop("num_hidden_layers", None)
        super().__init__(**kwargs)
